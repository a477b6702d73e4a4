"""Return memory to the system after large requests."""

from __future__ import annotations

import asyncio

from tinker_cookbook.local.engine.memory import resident_bytes, return_freed_memory

__all__ = ["FreedMemory"]

IDLE_GROWTH_BYTES, BUSY_GROWTH_BYTES = 32 * 2**20, 512 * 2**20
"""Growth of the process after which freed memory is returned. The limit is higher while it works,
because returning memory takes time and the work takes most of it again."""
MAX_ROUNDS = 32


class FreedMemory:
    """Returns freed memory to the system, one round per housekeeping."""

    def __init__(self) -> None:
        self._settled_bytes = 0
        self._rounds_left = self._rounds = 0
        """Rounds until the next try without growth; 0: no try."""

    async def give_back(self, *, is_idle: bool) -> None:
        """Do one round. Memory that was in use in an earlier round may be free now.

        A try takes some time, so after each try that frees nothing the interval doubles.
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
