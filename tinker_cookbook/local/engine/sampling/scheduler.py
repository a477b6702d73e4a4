"""Continuous batching: each step decodes one token of every running sequence and prefills prompts.

A request waits until there is memory for its prompt. Its prompt is prefilled in chunks, in the same
batches as the sequences that decode, and all its completions start from that one prefill. Where one
or two sequences decode alone, speculative decoding computes draft tokens with the newest ones. A
sequence whose keys and values no longer fit is preempted and computed again later; the tokens drawn
do not depend on it.

Clients share places, memory and time: the client with the fewest places is admitted first, each
gets a few places whatever the others hold, and `fairness` chooses whose tokens a step computes.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import cast

from torch import Tensor

from tinker_cookbook.local.engine.sampling.admission import Admission
from tinker_cookbook.local.engine.sampling.batch import (
    BatchDecoder,
    CacheRow,
    RowT,
    SequenceCache,
)
from tinker_cookbook.local.engine.sampling.batch_builder import BatchBuilder, ScheduledBatch
from tinker_cookbook.local.engine.sampling.draw import Drawer
from tinker_cookbook.local.engine.sampling.fairness import FairTurns
from tinker_cookbook.local.engine.sampling.finish import Finisher
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.prompt_scorer import PromptScorer
from tinker_cookbook.local.engine.sampling.prompt_scores import PromptScores
from tinker_cookbook.local.engine.sampling.row_allocator import RowAllocator
from tinker_cookbook.local.engine.sampling.running import Prefill, RunningSequences
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence, SequenceStatus
from tinker_cookbook.local.engine.sampling.shared_prefixes import SharedPrefixes
from tinker_cookbook.local.engine.sampling.waiting_queue import WaitingQueue
from tinker_cookbook.local.errors import UserError

__all__ = ["Scheduler"]


class Scheduler:
    """All sampling from one base model. Used by one thread."""

    def __init__(
        self,
        decoder: BatchDecoder[RowT],
        cache: SequenceCache[RowT],
        limits: SchedulerLimits | None = None,
    ) -> None:
        # rows come from this cache and go only to it and its decoder: their type does not matter
        self._decoder = cast("BatchDecoder[CacheRow]", decoder)
        self._cache = cast("SequenceCache[CacheRow]", cache)
        limits = limits or SchedulerLimits()
        self._queue = WaitingQueue()
        self._running = RunningSequences(limits)
        self._rows = RowAllocator(self._cache, self._queue, self._running, limits)
        overhead = decoder.overhead_tokens
        prefixes = SharedPrefixes(self._cache.prefixes, self._queue, limits, overhead)
        self._admission = Admission(self._queue, self._running, self._rows, prefixes, limits)
        self._scorer = PromptScorer(self._decoder)
        self._turns = FairTurns(overhead)
        self._builder = BatchBuilder(self._running, limits)
        self._finisher = Finisher(self._queue, self._running, self._rows)
        self._drawer = Drawer(self._finisher)
        self.prompt_tokens = 0
        """Number of prompt tokens computed so far."""
        self.busy_seconds = 0.0
        """Time spent in `step`."""

    def add(self, request: Request) -> None:
        """Queue a checked request; its future gets the answer.

        Raises:
            UserError: if it could never fit into the memory for keys and values.
        """
        limit = self._cache.max_row_tokens
        if request.spec.max_tokens is None:
            request.max_new = max(min(request.max_new, limit - len(request.prompt) + 1), 1)
        needed = len(request.prompt) + request.max_new - 1
        if needed > limit:
            megabytes = needed * self._cache.bytes_per_token / 2**20
            budget = self._cache.max_bytes / 2**20
            raise UserError(
                f"prompt of {len(request.prompt)} tokens and max_tokens={request.max_new} need "
                f"{megabytes:.0f} MiB for keys and values; the limit is {budget:.0f} MiB, enough "
                f"for {limit} tokens. Shorten the prompt or max_tokens"
            )
        if request.scores_prompt:
            request.prompt_scores = PromptScores(request.spec, request.prompt, request.seed)
        self._queue.add_request(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._queue) or len(self._running) > 0

    @property
    def num_running(self) -> int:
        """Number of sequences that decode or are being prefilled."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of requests and suspended sequences that wait for a place or memory."""
        return len(self._queue)

    @property
    def num_cache_bytes(self) -> int:
        """Memory held by keys and values."""
        return self._cache.num_bytes

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens drawn so far."""
        return self._drawer.sampled_tokens

    def places(self) -> Counter[str]:
        """Return the number of running sequences per client."""
        return self._running.places()

    def uses(self, adapter: object) -> bool:
        """Return whether a queued or running request samples from these weights."""
        return any(request.adapter is adapter for request in self._finisher.requests())

    def forget(self, key: int) -> None:
        """Drop the stored prefixes of weights that are gone."""
        if self._cache.prefixes is not None:
            self._cache.prefixes.forget(key)

    def fail_all(self, error: Exception) -> None:
        """Fail everything queued or running."""
        self._finisher.fail_all(error)

    def step(self) -> None:
        """Run one step of continuous batching: admit, make room, build a batch, compute, draw."""
        started = time.perf_counter()
        self._finisher.drop_cancelled()
        self._admission.admit()
        self._rows.make_room_for_next_tokens()
        scheduled = self._build_batch()
        if scheduled.drafts:
            self._compute_with_drafts(scheduled)
        elif scheduled.prefills:
            self._compute(scheduled)
        elif scheduled.decoding:
            self._decode(scheduled)
        self.busy_seconds += time.perf_counter() - started

    def _build_batch(self) -> ScheduledBatch:
        """Build the batch of the clients whose turn it is, and charge them for it."""
        clients = self._running.places()
        scheduled = self._builder.build(self._turns.choose(clients))
        self._turns.charge(clients, scheduled.tokens_by_client())
        if self._decoder.exact:
            self._builder.add_drafts(scheduled)
        return scheduled

    def _decode(self, scheduled: ScheduledBatch) -> None:
        """Compute and draw the next token of sequences that all decode."""
        logits = self._decoder.next_logits(scheduled.batch)
        self._drawer.draw(scheduled.decoding, logits)
        self._finish_ended(scheduled.decoding)

    def _compute(self, scheduled: ScheduledBatch) -> None:
        """Compute a batch with prompts, and draw where a sequence is ready for a token.

        These are the sequences that decode, and the requests whose prompts end with this batch.
        """
        decoding = scheduled.decoding
        hidden = self._decoder.forward(scheduled.batch)  # [N, ...], one per token
        completed, last_rows = self._advance_prefills(scheduled, hidden)
        rows = [*range(len(decoding)), *last_rows]
        starting = [prefill for prefill in completed if prefill.draws_first_tokens]
        if rows:
            owners = [*decoding, *(prefill.sequence for prefill in starting)]
            adapters = [(sequence.request.adapter, 1) for sequence in owners]
            # for prompts of one token these are all rows, in their order
            chosen = hidden if len(rows) == len(hidden) else hidden[rows]
            logits = self._decoder.logits(chosen, adapters)
            self._drawer.draw(decoding, logits[: len(decoding)])
            for prefill, logits_V in zip(starting, logits[len(decoding) :], strict=True):
                self._start_completions(prefill.request, logits_V)
        for prefill in completed:
            if prefill.sequence.status is SequenceStatus.PREFILLING:  # its request has not failed
                self._end_prefill(prefill)
        self._finish_ended(decoding)

    def _advance_prefills(
        self, scheduled: ScheduledBatch, hidden: Tensor
    ) -> tuple[list[Prefill], list[int]]:
        """Score the prompt tokens of a batch and count them as computed.

        Returns:
            The prefills that are complete, and the rows of `hidden` that belong to the last prompt
            tokens of those that draw their first tokens now.
        """
        completed, last_rows = [], []
        first = len(scheduled.decoding)
        for prefill, chunk in zip(scheduled.prefills, scheduled.batch.chunks, strict=True):
            end = first + len(chunk.tokens)
            self._collect_hidden(prefill, hidden[first:end])
            prefill.done += len(chunk.tokens)
            self.prompt_tokens += len(chunk.tokens)
            if not prefill.remaining:
                completed.append(prefill)
                if prefill.draws_first_tokens:
                    last_rows.append(end - 1)
            first = end
        self._scorer.run()
        return completed, last_rows

    def _collect_hidden(self, prefill: Prefill, hidden: Tensor) -> None:
        """Hand on the hidden states of a chunk and, with the first chunk, of the prefix before."""
        source, kept = prefill.source, prefill.kept
        is_first = prefill.done == prefill.num_shared
        if is_first and source is not None and source.hidden is not None:
            self._scorer.collect(prefill, 0, source.hidden[: prefill.num_shared])
        self._scorer.collect(prefill, prefill.done, hidden)
        if kept is not None:
            kept.keep_hidden(prefill.done, hidden)

    def _start_completions(self, request: Request, logits_V: Tensor) -> None:
        """Draw the first token of every completion from the logits of the prompt's last token.

        The first completion holds the row of the prompt; see `_end_prefill`. The others wait in the
        queue until the prompt can be copied.
        """
        completions = request.waiting
        self._drawer.draw_first(completions, logits_V)
        request.waiting = []
        if request.future.done():
            return
        for sequence in completions[1:]:
            if sequence.stop_reason is None:
                self._queue.suspend(sequence)
            else:
                self._finisher.finish([sequence])

    def _end_prefill(self, prefill: Prefill) -> None:
        """Let a sequence whose tokens are all computed decode, unless its first token ended it."""
        sequence = prefill.sequence
        if not sequence.request.future.done():
            prefill.share()
        self._running.remove(sequence)
        if sequence.request.future.done():  # cancelled during this step
            self._rows.release(sequence)
            sequence.status = SequenceStatus.ABORTED
        elif sequence.stop_reason is not None:
            self._finisher.finish([sequence])
        else:
            self._admission.start_decoding(sequence)

    def _compute_with_drafts(self, scheduled: ScheduledBatch) -> None:
        """Compute sequences that decode with draft tokens, and draw while drafts are accepted.

        The rows of logits are the newest tokens of all sequences, then the draft tokens of the
        first sequence, then those of the second.
        """
        batch, decoding = scheduled.batch, scheduled.decoding
        hidden = self._decoder.forward(batch)
        logits = self._decoder.logits(hidden, batch.adapters())
        first = len(decoding)
        for number, (sequence, draft) in enumerate(zip(decoding, scheduled.drafts, strict=True)):
            rows = [number, *range(first, first + len(draft))]
            first += len(draft)
            num_accepted = self._drawer.verify(sequence, draft, logits[rows])
            if draft and sequence.drafter is not None:
                length = len(sequence.request.prompt) + len(sequence.tokens)
                sequence.drafter.learn(length, num_accepted)
        self._finish_ended(decoding)

    def _finish_ended(self, sequences: list[Sequence]) -> None:
        ended = [sequence for sequence in sequences if sequence.stop_reason is not None]
        if ended:
            self._finisher.finish(ended)
