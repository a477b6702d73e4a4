"""Room for keys and values: rows for sequences, preemption, and the reuse of known prefixes."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tinker_cookbook.local.engine.sampling.batch import CacheRow, SequenceCache
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.prefix_index import hash_beginnings, num_shared
from tinker_cookbook.local.engine.sampling.running import Prefill, RunningSequences
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence
from tinker_cookbook.local.engine.sampling.waiting_queue import WaitingQueue

__all__ = ["RowAllocator"]

_ROOM_AHEAD = 256
"""Tokens that a new row has room for beyond those present. A completion that grows longer moves to
a larger row later, so that requests with a high `max_tokens` do not reserve all memory."""


class RowAllocator:
    """Gives rows of the cache to sequences and takes them back."""

    def __init__(
        self,
        cache: SequenceCache[CacheRow],
        queue: WaitingQueue,
        running: RunningSequences,
        limits: SchedulerLimits,
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._running = running
        self._limits = limits

    def allocate(self, sequence: Sequence) -> CacheRow | None:
        """Give a sequence a row for its tokens and some more; None if no memory is free."""
        request = sequence.request
        # the last token drawn is never computed, so its keys and values do not exist
        longest = len(request.prompt) + request.max_new - 1
        present = len(request.prompt) + len(sequence.tokens)
        expected = self._num_rows_to_come()
        row = self._cache.allocate(min(longest, present + _ROOM_AHEAD), expected)
        if row is None:
            row = self._cache.allocate(min(longest, present + 1))
        if row is not None:
            sequence.row = row
        return row

    def allocate_fairly(self, sequence: Sequence, places: Counter[str]) -> CacheRow | None:
        """Like `allocate`, but where memory is full, preempt clients that have more places.

        Args:
            places: running sequences per client; lowered for those that are preempted.
        """
        client = sequence.request.client
        row = self.allocate(sequence)
        while row is None and places[client] < self._limits.own_sequences:
            decoding = self._running.decoding
            others = [s for s in decoding if places[s.request.client] > places[client] + 1]
            if not others:
                return None
            # a preempted sequence is computed again, so the shortest costs least
            preempted = min(reversed(others), key=lambda s: s.num_cached)
            places[preempted.request.client] -= 1
            self.preempt(preempted)
            row = self.allocate(sequence)
        return row

    def _num_rows_to_come(self) -> int:
        """Return how many rows waiting sequences are likely to take before running ones end."""
        most = self._limits.max_sequences - len(self._running)
        count = sum(1 for _ in self._queue.suspended())
        for request in self._queue.requests():
            if count >= most:
                break
            if request.max_new > 1:  # a request for a single token rarely takes a row
                count += len(request.waiting)
        return max(min(count, most), 1)

    def begin_prefill(self, sequence: Sequence, tokens: np.ndarray) -> Prefill:
        """Copy keys and values of the longest known beginning of `tokens` into a sequence's row.

        Sources are the sequences that decode with the same weights, and the stored prefixes. At
        least the last token is computed, since its hidden state gives the next one.
        """
        store = self._cache.prefixes
        if store is None:
            return Prefill(sequence, tokens, 0)
        assert sequence.row is not None, "a prefix is restored into a row"
        request = sequence.request
        # prompt logprobs come from hidden states; a resumed completion needs none
        first_hidden = len(tokens) - 1 if sequence.tokens else request.first_hidden
        best, other = self._find_decoding(request, tokens[:first_hidden])
        hashes = hash_beginnings(request.adapter_key, tokens)
        prefix, stored = store.find(hashes, tokens, first_hidden)
        if prefix is not None and stored > best:
            self._cache.restore(prefix, sequence.row, stored)
            store.pin(prefix)
            prefill = Prefill(sequence, tokens, stored)
            prefill.use(store, prefix, None)
            return prefill
        if other is not None:
            self._cache.copy(other, sequence.row, best)
        return Prefill(sequence, tokens, best)

    def _find_decoding(self, request: Request, tokens: np.ndarray) -> tuple[int, CacheRow | None]:
        """Return the most leading tokens that a decoding sequence shares, and its row."""
        best, row = 0, None
        for other in self._running.decoding:
            if other.request.adapter is request.adapter and other.row is not None:
                shared = num_shared(other.cached_tokens(), tokens)
                if shared > best:
                    best, row = shared, other.row
        return best, row

    def make_room_for_next_tokens(self) -> None:
        """Grow the rows of decoding sequences by one token each.

        Where memory is full, the newest sequence of the client with the most places is preempted
        until the row fits; that may be the sequence itself.
        """
        for sequence in list(self._running.decoding):
            while sequence.row is not None:
                grown = self._cache.grow(sequence.row, sequence.num_cached + 1)
                if grown is not None:
                    sequence.row = grown
                    break
                places = self._running.places()
                decoding = self._running.decoding
                most = max(places[s.request.client] for s in decoding)
                self.preempt([s for s in decoding if places[s.request.client] == most][-1])

    def preempt(self, sequence: Sequence) -> None:
        """Take a decoding sequence's row and put it back into the queue, first in its line."""
        self._running.remove(sequence)
        self.release(sequence)
        self._queue.suspend(sequence, first=True)

    def fork(self, source: Sequence, sibling: Sequence) -> bool:
        """Give a sibling a row with a copy of the prompt; False if no memory is free."""
        assert source.row is not None, "a prompt is copied from a row"
        row = self.allocate(sibling)
        if row is None:
            return False
        self._cache.copy(source.row, row, len(source.request.prompt))
        return True

    def remember(self, sequence: Sequence) -> None:
        """Keep a copy of a sequence's keys and values for later prompts that begin with it."""
        if sequence.row is not None:
            tokens = sequence.cached_tokens()
            self._cache.remember(sequence.request.adapter_key, tokens, sequence.row)

    def release(self, sequence: Sequence) -> None:
        """Take back a sequence's row, if it has one."""
        if sequence.row is not None:
            self._cache.free(sequence.row)
            sequence.row = None
