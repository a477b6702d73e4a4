"""Order within a training run: requests start in the order of `seq_id`, repeats are recognized.

A request is held until all lower numbers have arrived. The SDK skips a number when it refuses a
call itself, so after a grace period the missing numbers are skipped. Refused requests count as
arrived. A request may also pause the run until it has finished, while it prepares its work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from tinker_cookbook.local.engine.types import LoraSpec

__all__ = ["Run", "SequenceGate"]

logger = logging.getLogger(__name__)

Start = Callable[[], None]


class SequenceGate:
    """Starts numbered requests in order. Use it only on the event loop's thread."""

    def __init__(self, *, grace_seconds: float, first: int = 1) -> None:
        self._grace_seconds = grace_seconds
        self._next = first
        self._held: dict[int, Start] = {}
        self._request_ids: OrderedDict[int, str] = OrderedDict()
        self._forgotten = first - 1
        """Numbers up to this one are no longer accepted."""
        self._timer: asyncio.TimerHandle | None = None
        self._late: list[Start] = []
        """Requests that arrived after their number was skipped, while the gate was paused."""
        self._is_paused = False
        self._is_closing = False

    def request_id_of(self, seq_id: int) -> str | None:
        """Return the request that used this number first, or None."""
        return self._request_ids.get(seq_id)

    def has_forgotten(self, seq_id: int) -> bool:
        """Return whether a number is so old that it is unknown whether it was used."""
        return seq_id <= self._forgotten and seq_id not in self._request_ids

    def forget_answered(self, is_kept: Callable[[str], bool]) -> None:
        """Forget requests whose results are no longer kept; their numbers are refused."""
        while self._request_ids:
            seq_id, request_id = next(iter(self._request_ids.items()))
            if seq_id >= self._next or is_kept(request_id):
                return
            del self._request_ids[seq_id]
            self._forgotten = max(self._forgotten, seq_id)

    def submit(self, seq_id: int, request_id: str, start: Start) -> None:
        """Register a new number. `start` is called when its turn has come, which may be at once."""
        assert seq_id not in self._request_ids, f"seq_id {seq_id} was submitted twice"
        self._request_ids[seq_id] = request_id
        if seq_id < self._next:
            self._late.append(start)  # arrived after its number was skipped
        else:
            self._held[seq_id] = start
        self._start_ready()

    def pause(self) -> None:
        """Hold all requests after the one that is being started."""
        self._is_paused = True

    def resume(self) -> None:
        """Start the requests that were held since `pause`, in order."""
        self._is_paused = False
        if self._is_closing:
            self.close()
        else:
            self._start_ready()

    def _start_ready(self) -> None:
        before = self._next
        while self._late and not self._is_paused:
            self._late.pop(0)()
        while self._next in self._held and not self._is_paused:
            start = self._held.pop(self._next)
            self._next += 1
            start()
        if self._timer is not None and (self._next != before or not self._held):
            self._timer.cancel()
            self._timer = None
        if self._held and self._timer is None and not self._is_paused:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._grace_seconds, self._give_up_gap)

    def _give_up_gap(self) -> None:
        self._timer = None
        if self._held and not self._is_paused:
            lowest = min(self._held)
            logger.warning(
                "seq_id %d to %d did not arrive; they are skipped", self._next, lowest - 1
            )
            self._next = lowest
            self._start_ready()

    @property
    def num_held(self) -> int:
        return len(self._held) + len(self._late)

    def close(self) -> None:
        """Start all held requests in order, now or when the pause ends."""
        self._is_closing = True
        self._start_ready()
        while self._held and not self._is_paused:
            self._next = min(self._held)
            self._start_ready()


@dataclass(eq=False)
class Run:
    """A training run in this process's engine."""

    run_id: str
    session_id: str
    base_model: str
    lora: LoraSpec
    gate: SequenceGate
    create_request_id: str
    last_request_at: float
    num_running: int = 0
    is_closed: bool = False
    inflight_sampler: str | None = None
    """Engine sampler that the run's in-flight sampling sessions share."""

    def touch(self) -> None:
        self.last_request_at = time.time()
