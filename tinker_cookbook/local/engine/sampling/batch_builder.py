"""Batch building: which tokens of which sequences enter the next forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from tinker_cookbook.local.engine.sampling.batch import Batch, CacheRow, Chunk
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.running import Prefill, RunningSequences
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence
from tinker_cookbook.local.engine.sampling.speculation import Drafter

__all__ = ["BatchBuilder", "ScheduledBatch"]

_DRAFT_ROWS = 6
"""Maximum newest and draft tokens per pass: one tile of the compiled kernels, which costs about as
much as a single row."""
_DRAFT_SEQUENCES = 2
"""Maximum sequences that decode with drafts; with more of them the tile is full anyway."""


@dataclass
class ScheduledBatch:
    """A batch, and the sequences that its rows belong to.

    Its N rows are: one per sequence in `decoding`, in this order; then either the chunks of
    `prefills`, in this order, or the chunks of `drafts`. A batch never has both.
    """

    batch: Batch[CacheRow] = field(default_factory=Batch[CacheRow])
    decoding: list[Sequence] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    """Draft tokens per decoding sequence, [] for one without a chunk; empty where no sequence has
    any."""

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prefills)

    def tokens_by_client(self) -> Counter[str]:
        """Return how many tokens the batch computes for each client, without draft tokens."""
        counts = Counter(sequence.request.client for sequence in self.decoding)
        for prefill, chunk in zip(self.prefills, self.batch.chunks, strict=True):
            counts[prefill.request.client] += len(chunk.tokens)
        return counts


class BatchBuilder:
    """Builds batches from the running sequences."""

    def __init__(self, running: RunningSequences, limits: SchedulerLimits) -> None:
        self._running = running
        self._limits = limits

    def build(self, clients: Collection[str]) -> ScheduledBatch:
        """Return the newest token of every decoding sequence and some prompt tokens.

        Args:
            clients: whose sequences the batch may contain.
        """
        scheduled = ScheduledBatch()
        self._add_decoding(scheduled, clients)
        self._add_chunks(scheduled, clients)
        return scheduled

    def _add_decoding(self, scheduled: ScheduledBatch, clients: Collection[str]) -> None:
        """Add the newest token of each decoding sequence, in the order of the cache.

        The rows of a pool are one tensor, and its decoding rows come first in it. In this order,
        attention over a pool is a single call that copies no keys.
        """
        batch = scheduled.batch
        first_of: dict[Request, int] = {}
        for sequence, row in sorted(self._rows(), key=_place):
            request = sequence.request
            if request.client not in clients:
                continue
            number = len(scheduled.decoding)
            # completions of one request have its prompt in common
            first = first_of.setdefault(request, number)
            batch.decode_same.append((first, len(request.prompt) if first < number else 0))
            batch.decode_tokens.append(sequence.tokens[-1])
            batch.decode_positions.append(sequence.num_cached)
            batch.decode_adapters.append(request.adapter)
            batch.decode_rows.append(row)
            scheduled.decoding.append(sequence)

    def _rows(self) -> list[tuple[Sequence, CacheRow]]:
        decoding = self._running.decoding
        return [(sequence, sequence.row) for sequence in decoding if sequence.row is not None]

    def _add_chunks(self, scheduled: ScheduledBatch, clients: Collection[str]) -> None:
        """Fill the rest of the token budget with chunks of prefills, oldest first.

        A prefill that is longer than the rest is cut there and continued by the next step, with two
        exceptions. A prompt without a row is never cut: its keys exist only within one pass. And
        the chunk that holds a prompt's images is not cut before the last image ends, since the
        vision model needs all of them at once; it comes alone, even if it exceeds the budget.
        """
        batch = scheduled.batch
        budget = max(self._limits.max_batch_tokens - len(scheduled.decoding), 1)
        for prefill in self._running.prefills:
            if prefill.request.client not in clients:
                continue
            count = prefill.remaining
            images = () if prefill.done else prefill.request.spec.images
            if images and batch.chunks:
                break
            row = prefill.row
            if count > budget and images:
                count = max(budget, min(count, prefill.request.end_of_images))
            elif count > budget and row is not None:
                count = budget
            if count <= 0 or (count > budget and batch.chunks):
                break
            tokens = prefill.tokens[prefill.done : prefill.done + count]
            source = prefill.source if row is None else None
            prefix = None if source is None else source.row
            adapter = prefill.request.adapter
            batch.chunks.append(Chunk(tokens, prefill.done, row, adapter, images, prefix))
            scheduled.prefills.append(prefill)
            budget -= count

    def add_drafts(self, scheduled: ScheduledBatch) -> None:
        """Add draft tokens behind the newest token of each sequence, where that may pay.

        Where one or two sequences decode alone, the pass is limited by reading the weights, so the
        rest of a tile is almost free. The decoder must be exact: a token that is computed in a
        chunk of drafts has then the same bits as one that is decoded alone.
        """
        batch, count = scheduled.batch, len(scheduled.decoding)
        if batch.chunks or not 1 <= count <= _DRAFT_SEQUENCES:
            return
        drafts = []
        for sequence, row in zip(scheduled.decoding, batch.decode_rows, strict=True):
            draft = self._draft(sequence, row, _DRAFT_ROWS // count - 1)
            drafts.append(draft)
            if draft:
                tokens = np.asarray(draft, np.int32)
                start = sequence.num_cached + 1
                batch.chunks.append(Chunk(tokens, start, row, sequence.request.adapter))
        if any(drafts):
            scheduled.drafts = drafts

    def _draft(self, sequence: Sequence, row: CacheRow, most: int) -> list[int]:
        """Return at most `most` draft tokens that fit into the row and into `max_new`."""
        if sequence.drafter is None:
            sequence.drafter = Drafter()
        room = row.pool.capacity - (sequence.num_cached + 1)
        # every accepted token is drawn, and one more follows the last of them
        to_come = sequence.request.max_new - len(sequence.tokens) - 1
        return sequence.drafter.propose(sequence.all_tokens(), min(most, room, to_come))


def _place(item: tuple[Sequence, CacheRow]) -> tuple[int, int]:
    row = item[1]
    return row.pool.capacity, row.index
