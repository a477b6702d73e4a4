"""Admission: which waiting requests and sequences start to run, and when."""

from __future__ import annotations

from collections import Counter

from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.prefix_index import num_shared
from tinker_cookbook.local.engine.sampling.row_allocator import RowAllocator
from tinker_cookbook.local.engine.sampling.running import Prefill, RunningSequences
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence
from tinker_cookbook.local.engine.sampling.shared_prefixes import SharedPrefixes
from tinker_cookbook.local.engine.sampling.waiting_queue import WaitingQueue

__all__ = ["Admission"]


class Admission:
    """Moves what waits in the queue to the running sequences."""

    def __init__(
        self,
        queue: WaitingQueue,
        running: RunningSequences,
        rows: RowAllocator,
        prefixes: SharedPrefixes,
        limits: SchedulerLimits,
    ) -> None:
        self._queue = queue
        self._running = running
        self._rows = rows
        self._prefixes = prefixes
        self._limits = limits

    def admit(self) -> None:
        """Start prefills while places and memory are free; the client with the fewest places first.

        Where the next sequence in this order gets no memory, nothing else is admitted: otherwise
        short sequences of clients with more places would overtake it again and again.
        """
        if not self._queue:
            return
        places = self._running.places()
        pending = Counter[str]()
        for prefill in self._running.prefills:
            pending[prefill.request.client] += prefill.remaining
        held_back: set[str] = set()
        while True:
            ready = [client for client in self._queue.clients() if client not in held_back]
            if not ready:
                return
            client = min(ready, key=lambda c: places[c])
            # a full batch of prompt tokens is enough: more would only hold memory
            is_full = pending[client] >= self._limits.max_batch_tokens
            has_place = self._running.has_place(client, places)
            waiting = None if is_full or not has_place else self._next(client)
            if waiting is None:
                held_back.add(client)
                continue
            prefill = self._start(waiting, places)
            if prefill is None:
                return
            self._running.start_prefill(prefill)
            places[client] += 1
            pending[client] += prefill.remaining

    def start_decoding(self, sequence: Sequence) -> None:
        """Let a prefilled sequence decode, and its siblings with copies of their prompt.

        Siblings that find no place or memory stay suspended and are prefilled again later.
        """
        self._running.start_decoding(sequence)
        siblings = [
            other
            for other in self._queue.suspended()
            if other.request is sequence.request and len(other.tokens) == 1
        ]
        for sibling in siblings:
            has_place = self._running.has_place(sequence.request.client, self._running.places())
            if not has_place or not self._rows.fork(sequence, sibling):
                return
            self._queue.take_sequence(sibling)
            self._running.start_decoding(sibling)

    def _next(self, client: str) -> Sequence | Request | None:
        """Return what a client's next place is for; None if all wait for running prefills.

        A request for one token that waits is overtaken. Its wait is short, and what comes behind it
        may fill the batch meanwhile.
        """
        for waiting in self._queue.line_of(client):
            if isinstance(waiting, Sequence):
                return waiting
            if waiting.is_single_pass and self._prefixes.waits(waiting):
                continue
            return None if self._waits_for_prompt(waiting) else waiting
        return None

    def _start(self, waiting: Sequence | Request, places: Counter[str]) -> Prefill | None:
        """Take a sequence or request out of the queue; None where memory is missing."""
        if isinstance(waiting, Sequence):
            return self._resume(waiting, places)
        return self._begin(waiting, places)

    def _resume(self, sequence: Sequence, places: Counter[str]) -> Prefill | None:
        """Compute a suspended sequence again, up to its newest token."""
        if self._rows.allocate_fairly(sequence, places) is None:
            return None
        self._queue.take_sequence(sequence)
        return self._rows.begin_prefill(sequence, sequence.cached_tokens())

    def _begin(self, request: Request, places: Counter[str]) -> Prefill | None:
        """Compute the prompt of a request; its first sequence holds the place and the row."""
        prefill = self._prefixes.begin(request)
        if prefill is None:
            sequence = request.waiting[0]
            if self._rows.allocate_fairly(sequence, places) is None:
                return None
            prefill = self._rows.begin_prefill(sequence, request.prompt)
            request.cache_hit_tokens = prefill.done
        self._queue.take_request(request)
        return prefill

    def _waits_for_prompt(self, request: Request) -> bool:
        """Return whether a running prefill computes at least half of a prompt to be continued.

        The prompt is then copied from that sequence as soon as it decodes.
        """
        if request.scores_prompt or request.is_single_pass:
            return False
        return any(
            prefill.request.adapter is request.adapter
            and num_shared(prefill.tokens, request.prompt) >= max(32, len(request.prompt) // 2)
            for prefill in self._running.prefills
            if prefill.sequence.row is not None
        )
