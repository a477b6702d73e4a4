"""The running sequences: those in prefill and those that decode. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence, SequenceStatus

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.sampling.batch import CacheRow
    from tinker_cookbook.local.engine.sampling.prefix_store import PrefixStore, StoredPrefix

__all__ = ["Prefill", "RunningSequences"]


@dataclass(eq=False)
class Prefill:
    """The tokens of one sequence whose keys and values are being computed."""

    sequence: Sequence
    tokens: np.ndarray
    """int32 [T]: the prompt; after a preemption also the completion without its newest token."""
    done: int
    """How many of them are computed, or are known from another sequence."""
    source: StoredPrefix | None = None
    """Stored prefix that the prefill began with; pinned."""
    kept: StoredPrefix | None = None
    """Stored prefix that the prefill fills; pinned."""
    num_shared: int = 0
    """Number of tokens that were not computed."""
    _store: PrefixStore | None = None

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def remaining(self) -> int:
        """Number of tokens to compute."""
        return len(self.tokens) - self.done

    @property
    def draws_first_tokens(self) -> bool:
        """Whether this is the prompt of a new request, not a sequence that is resumed."""
        return not self.sequence.tokens

    @property
    def row(self) -> CacheRow | None:
        """Where the keys and values go; None if nothing reads them after this pass."""
        return self.sequence.row if self.kept is None else self.kept.row

    def use(
        self, store: PrefixStore | None, source: StoredPrefix | None, kept: StoredPrefix | None
    ) -> None:
        """Begin with a stored prefix and fill another one; both are pinned, each may be None."""
        self._store, self.source, self.kept = store, source, kept
        self.num_shared = self.done
        scores = self.request.prompt_scores
        if source is not None and scores is not None:
            scores.take_known(source.scores, self.done)

    def share(self) -> None:
        """Give what was computed to later requests; all tokens are computed."""
        if self._store is None:
            return
        if self.kept is not None:
            self._store.finish(self.kept)
        scores = self.request.prompt_scores
        if scores is None:
            return
        for prefix, count in ((self.kept, len(self.tokens)), (self.source, self.num_shared)):
            if prefix is not None:
                self._store.learn(prefix, scores.known, count)

    def close(self) -> None:
        """Free the prefixes; one that is not filled completely is dropped."""
        for prefix in (self.source, self.kept):
            if prefix is not None and self._store is not None:
                self._store.release(prefix)
        self.source = self.kept = None


class RunningSequences:
    """The sequences that hold one of the limited places, each in the order in which they got it."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self.prefills: list[Prefill] = []
        self.decoding: list[Sequence] = []

    def __len__(self) -> int:
        """Number of places in use."""
        return len(self.decoding) + len(self.prefills)

    def sequences(self) -> list[Sequence]:
        """Return all of them."""
        return [*self.decoding, *(prefill.sequence for prefill in self.prefills)]

    def places(self) -> Counter[str]:
        """Return the number of running sequences per client."""
        return Counter(sequence.request.client for sequence in self.sequences())

    def has_place(self, client: str, places: Counter[str]) -> bool:
        """Return whether one more sequence of a client may run.

        Args:
            places: the number of running sequences per client.
        """
        limit = self._limits.max_sequences
        if places[client] < self._limits.own_sequences:
            limit *= 2  # the total stays bounded, however many clients come
        return places.total() < limit

    def start_prefill(self, prefill: Prefill) -> None:
        """Give a sequence a place to compute its tokens so far."""
        prefill.sequence.status = SequenceStatus.PREFILLING
        self.prefills.append(prefill)

    def start_decoding(self, sequence: Sequence) -> None:
        """Give a sequence, all of whose tokens are computed, a place among those that decode."""
        assert sequence.row is not None, "a sequence decodes only with a row"
        sequence.row.activate()
        sequence.status = SequenceStatus.DECODING
        self.decoding.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take away the place of a sequence, if it has one; its next status is up to the caller."""
        if sequence.status is SequenceStatus.DECODING:
            self.decoding.remove(sequence)
        elif sequence.status is SequenceStatus.PREFILLING:
            for prefill in self.prefills:
                if prefill.sequence is sequence:
                    prefill.close()
            self.prefills = [p for p in self.prefills if p.sequence is not sequence]
