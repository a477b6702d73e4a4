"""Gives memory back to the system that large requests took and no longer use."""

from __future__ import annotations

import asyncio

from tinker_cookbook.local.engine.memory import resident_bytes, return_freed_memory

__all__ = ["FreedMemory"]

IDLE_GROWTH_BYTES, BUSY_GROWTH_BYTES = 32 * 2**20, 512 * 2**20
"""Freed memory is given back once the process has grown by so much. While it works, that costs
time, as the work takes most of it again."""
MAX_ROUNDS = 32


class FreedMemory:
    """Looks after the size of this process, a round of housekeeping at a time."""

    def __init__(self) -> None:
        self._settled_bytes = 0
        self._rounds_left = self._rounds = 0
        """Until it is tried again although nothing has grown; 0 is never."""

    async def give_back(self, *, is_idle: bool) -> None:
        """One round. What was still in use in an earlier one may be free by now.

        Tries that find nothing come at longer and longer intervals, as they cost some time.
        """
        before = resident_bytes()
        least = IDLE_GROWTH_BYTES if is_idle else BUSY_GROWTH_BYTES
        has_grown = before - self._settled_bytes > least
        self._rounds_left -= is_idle and self._rounds_left > 0
        is_due = is_idle and self._rounds > 0 and not self._rounds_left
        if not has_grown and not is_due:
            return
        await asyncio.to_thread(return_freed_memory, collect=is_idle)
        self._settled_bytes = resident_bytes()
        found_some = before - self._settled_bytes > IDLE_GROWTH_BYTES
        self._rounds = 1 if has_grown or found_some else min(2 * self._rounds, MAX_ROUNDS)
        self._rounds_left = self._rounds
