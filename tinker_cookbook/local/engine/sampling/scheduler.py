"""Continuous batching: a step decodes one token of every running sequence and prefills some more.

A request waits until there is memory for its prompt, is prefilled in chunks beside the sequences
that decode, and starts all its completions from that one prefill. Where one or two sequences decode
alone, tokens that likely follow are computed beside the newest (see `drafts`). A sequence whose
keys and values no longer fit is paused and later computed again; the draws do not depend on it (see
`draws`).

Clients share places, memory and time: the one with the fewest places is admitted first, each gets a
few places whatever the others hold, and `turns` says whose tokens a step computes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tinker_cookbook.local.engine.sampling.waiting_queue import Backlog
from tinker_cookbook.local.engine.sampling.batch import Batch, BatchDecoder, Chunk, SequenceCache
from tinker_cookbook.local.engine.sampling.random_numbers import draw_uniforms
from tinker_cookbook.local.engine.sampling.kv_cache import num_shared
from tinker_cookbook.local.engine.sampling.logits import (
    SamplingParams,
    draw_tokens,
    logsumexp,
    topk_logprobs,
)
from tinker_cookbook.local.engine.sampling.prompt_scores import PromptScores
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence
from tinker_cookbook.local.engine.sampling.speculation import Drafter
from tinker_cookbook.local.engine.sampling.fairness import Turns
from tinker_cookbook.local.errors import UserError

__all__ = ["GenerationLimits", "Generator"]

_ROOM_AHEAD = 256
"""New rows have room for this many tokens beyond the prompt; longer completions move later."""
_DRAWS_AT_ONCE = 64
_DRAFT_ROWS = 6
"""Sequences and guesses that are computed together: one tile of the compiled kernels."""
_DRAFT_SEQUENCES = 2


@dataclass(frozen=True)
class GenerationLimits:
    """How much one step may hold."""

    max_batch_tokens: int = 512
    """Tokens of one forward pass: decoding sequences and prompt chunks together."""
    max_sequences: int = 128
    """Sequences that decode together."""
    own_sequences: int = 8
    """Of those, places that a client gets at once even where others hold all."""


@dataclass(eq=False)
class _Prefill:
    """Tokens of one sequence that are being computed."""

    sequence: Sequence
    tokens: np.ndarray
    row: Any
    done: int
    """How many are in the cache already."""

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.done


class Generator:
    """All sampling on one base model. Used by one thread."""

    def __init__(
        self, decoder: BatchDecoder, cache: SequenceCache, limits: GenerationLimits
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._limits = limits
        self._turns = Turns(decoder.overhead_tokens)
        self._waiting = Backlog()
        self._prefills: list[_Prefill] = []
        self._running: list[Sequence] = []
        self.prompt_tokens = 0
        """Prompt tokens computed so far."""
        self.sampled_tokens = 0
        """Tokens drawn so far."""
        self.busy_seconds = 0.0

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
                f"{megabytes:.0f} MiB for keys and values; {budget:.0f} MiB, enough for {limit} "
                "tokens, are set aside. Shorten the prompt or max_tokens"
            )
        if request.scores_prompt:
            request.prompt_scores = PromptScores(request)
        self._waiting.add_request(request)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._prefills or self._running)

    @property
    def num_running(self) -> int:
        """Sequences that decode or are being prefilled."""
        return len(self._running) + len(self._prefills)

    @property
    def num_waiting(self) -> int:
        """Requests and paused sequences that wait for memory."""
        return len(self._waiting)

    @property
    def num_cache_bytes(self) -> int:
        """Memory held by keys and values."""
        return self._cache.num_bytes

    def uses(self, adapter: object) -> bool:
        """Whether a queued or running request samples from these weights."""
        return any(request.adapter is adapter for request in self._requests())

    def forget(self, key: int) -> None:
        """Drop stored prefixes of weights that are gone."""
        self._cache.forget(key)

    def fail_all(self, error: Exception) -> None:
        """Fail everything queued or running."""
        for request in self._requests():
            self._fail(request, error)

    def step(self) -> None:
        """Run one forward pass and hand out the tokens it gives."""
        started = time.perf_counter()
        self._drop_cancelled()
        self._admit()
        self._make_room()
        clients = self._places()
        batch, prefills = self._build_batch(self._turns.choose(clients))
        self._turns.charge(clients, _tokens_by_client(batch, prefills))
        drafts = self._add_drafts(batch)
        if any(drafts):
            self._run_drafts(batch, drafts)
        elif batch.decode_tokens or batch.chunks:
            self._run(batch, prefills)
        self.busy_seconds += time.perf_counter() - started

    def _run(self, batch: Batch, prefills: list[_Prefill]) -> None:
        decoding = batch.sequences()
        hidden = self._decoder.forward(batch)
        wanted, first = list(range(len(decoding))), len(decoding)
        completed: list[_Prefill] = []
        for prefill, chunk in zip(prefills, batch.chunks, strict=True):
            last = first + len(chunk.tokens)
            self._score_prompt(prefill, hidden[first:last])
            prefill.done += len(chunk.tokens)
            self.prompt_tokens += len(chunk.tokens)
            if not prefill.remaining:
                completed.append(prefill)
                if not prefill.sequence.tokens:
                    wanted.append(last - 1)
            first = last
        starting = [prefill for prefill in completed if not prefill.sequence.tokens]
        owners = [*decoding, *(prefill.sequence for prefill in starting)]
        if owners:
            adapters = [(sequence.request.adapter, 1) for sequence in owners]
            logits = self._decoder.logits(hidden[wanted], adapters)
            self._draw(decoding, logits[: len(decoding)])
            for prefill, row_logits in zip(starting, logits[len(decoding) :], strict=True):
                self._start(prefill, row_logits)
        for prefill in completed:
            if prefill in self._prefills:  # its request may just have failed
                self._prefills.remove(prefill)
                self._after_prefill(prefill)
        for sequence in decoding:
            if sequence.stop_reason is not None:
                self._finish(sequence)

    # --- guessed tokens ------------------------------------------------------------------------

    def _add_drafts(self, batch: Batch) -> list[list[int]]:
        """Put guesses for each decoding sequence into the batch, where that may pay."""
        count = len(batch.decode_tokens)
        if not self._decoder.exact or batch.chunks or not 1 <= count <= _DRAFT_SEQUENCES:
            return []
        drafts = []
        for sequence in batch.sequences():
            request, row = sequence.request, sequence.row
            if sequence.drafter is None:
                sequence.drafter = Drafter()
            start = sequence.num_cached + 1
            most = min(
                _DRAFT_ROWS // count - 1,
                row.pool.capacity - start,
                request.max_new - len(sequence.tokens) - 1,
            )
            draft = sequence.drafter.propose(sequence.all_tokens(), most)
            drafts.append(draft)
            if draft:
                tokens = np.asarray(draft, np.int32)
                batch.chunks.append(Chunk(tokens, start, row, request.adapter))
        return drafts

    def _run_drafts(self, batch: Batch, drafts: list[list[int]]) -> None:
        """As `_run` for decoding sequences: a guess is right if it is what the row before drew."""
        decoding = batch.sequences()
        hidden = self._decoder.forward(batch)
        logits = self._decoder.logits(hidden, batch.adapters())
        first = len(decoding)
        for number, (sequence, draft) in enumerate(zip(decoding, drafts, strict=True)):
            rows = [number, *range(first, first + len(draft))]
            first += len(draft)
            before = len(sequence.tokens)
            self._draw([sequence] * len(rows), logits[rows], draft)
            if draft and sequence.drafter is not None:
                right = max(len(sequence.tokens) - before - 1, 0)
                length = len(sequence.request.prompt) + len(sequence.tokens)
                sequence.drafter.learn(length, right)
            if sequence.stop_reason is not None:
                self._finish(sequence)

    # --- admission -----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin prefills while there are places and memory, for the clients with the fewest first.

        A client whose next sequence finds no memory is not overtaken by those with more places.
        """
        if not self._waiting:
            return
        places = self._places()
        pending = Counter[str]()
        for prefill in self._prefills:
            pending[prefill.request.client] += prefill.remaining
        passed: set[str] = set()
        while True:
            ready = [c for c in self._waiting.clients() if c not in passed]
            if not ready:
                return
            client = min(ready, key=lambda c: places[c])
            full = pending[client] >= self._limits.max_batch_tokens
            if full or not self._has_place(client, places) or self._waits_for_prefill(client):
                passed.add(client)
                continue
            prefill = self._next_prefill(client, places)
            if prefill is None:
                return
            self._prefills.append(prefill)
            places[client] += 1
            pending[client] += prefill.remaining

    def _places(self) -> Counter[str]:
        """How many sequences of each client decode or are being prefilled."""
        holders = (*self._running, *(prefill.sequence for prefill in self._prefills))
        return Counter(sequence.request.client for sequence in holders)

    def _has_place(self, client: str, places: Counter[str]) -> bool:
        """Whether one more sequence of a client may be computed."""
        limit = self._limits.max_sequences
        if places[client] < self._limits.own_sequences:
            limit *= 2  # bounds how many clients can have places of their own
        return places.total() < limit

    def _waits_for_prefill(self, client: str) -> bool:
        waiting = self._waiting.next_of(client)
        return isinstance(waiting, Request) and self._shares_prefill_in_progress(waiting)

    def _next_prefill(self, client: str, places: Counter[str]) -> _Prefill | None:
        """Begin what a client waits for; None where memory is missing."""
        waiting = self._waiting.next_of(client)
        if isinstance(waiting, Sequence):
            row = self._allocate_fairly(waiting, places)
            if row is None:
                return None
            self._waiting.remove_sequence(waiting)
            tokens = waiting.cached_tokens()
            return _Prefill(waiting, tokens, row, self._restore(waiting, tokens, row))
        request, sequence = waiting, waiting.waiting[0]
        if self._needs_no_row(request):
            self._waiting.take_request(client)
            return _Prefill(sequence, request.prompt, None, 0)
        row = self._allocate_fairly(sequence, places)
        if row is None:
            return None
        self._waiting.take_request(client)
        shared = self._restore(sequence, request.prompt, row)
        request.cache_hit_tokens = shared
        return _Prefill(sequence, request.prompt, row, shared)

    def _needs_no_row(self, request: Request) -> bool:
        """Whether a prompt goes through in one piece and nothing comes after it."""
        fits = len(request.prompt) <= self._limits.max_batch_tokens
        return request.max_new == 1 and not request.spec.images and fits

    def _allocate_fairly(self, sequence: Sequence, places: Counter[str]) -> Any:
        """A row; where memory has none, one of a client with more places makes room for it."""
        client = sequence.request.client
        row = self._allocate(sequence)
        while row is None and places[client] < self._limits.own_sequences:
            others = [s for s in self._running if places[s.request.client] > places[client] + 1]
            if not others:
                return None
            # what it has computed is computed again, so the shortest pauses
            paused = min(reversed(others), key=lambda s: s.num_cached)
            places[paused.request.client] -= 1
            self._pause(paused)
            row = self._allocate(sequence)
        return row

    def _shares_prefill_in_progress(self, request: Request) -> bool:
        """Whether waiting for a running prefill gives most of this prompt for a copy."""
        if request.scores_prompt or self._needs_no_row(request):
            return False
        return any(
            prefill.request.adapter is request.adapter
            and num_shared(prefill.tokens, request.prompt) >= max(32, len(request.prompt) // 2)
            for prefill in self._prefills
            if prefill.row is not None
        )

    def _allocate(self, sequence: Sequence) -> Any:
        request = sequence.request
        longest = len(request.prompt) + request.max_new - 1
        present = len(request.prompt) + len(sequence.tokens)
        expected = self._num_rows_to_come()
        row = self._cache.allocate(min(longest, present + _ROOM_AHEAD), expected)
        if row is None:
            row = self._cache.allocate(min(longest, present + 1))
        if row is not None:
            row.owner = sequence
            sequence.row = row
        return row

    def _num_rows_to_come(self) -> int:
        """How many rows waiting sequences will take before others end."""
        most = self._limits.max_sequences - self.num_running
        count = sum(1 for _ in self._waiting.sequences())
        for request in self._waiting.requests():
            if count >= most:
                break
            if request.max_new > 1:  # the others hardly ever take one
                count += len(request.waiting)
        return max(min(count, most), 1)

    def _restore(self, sequence: Sequence, tokens: np.ndarray, row: Any) -> int:
        """Copy what is known of the beginning of `tokens`; return how many tokens that are."""
        if not self._cache.shares_prefixes:
            return 0
        request = sequence.request
        limit = len(tokens) - 1
        if request.prompt_scores is not None and not sequence.tokens:
            limit = min(limit, request.prompt_scores.first_hidden)
        key = 0 if request.adapter is None else request.adapter.key
        best, source = 0, None
        for other in self._running:
            if other.request.adapter is request.adapter and other.row is not None:
                shared = num_shared(other.cached_tokens(), tokens[:limit])
                if shared > best:
                    best, source = shared, other.row
        stored = self._cache.restore(key, tokens[:limit], row, longer_than=best)
        if stored:
            return stored
        if source is not None:
            self._cache.copy(source, row, best)
        return best

    def _make_room(self) -> None:
        """Give every decoding sequence room for a token; where memory ends, pause the newest of the
        client with the most places.
        """
        for sequence in list(self._running):
            while sequence.row is not None:
                grown = self._cache.grow(sequence.row, sequence.num_cached + 1)
                if grown is not None:
                    sequence.row = grown
                    break
                places = self._places()
                most = max(places[s.request.client] for s in self._running)
                holders = [s for s in self._running if places[s.request.client] == most]
                self._pause(holders[-1])

    def _pause(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.add_sequence(sequence, first=True)

    # --- one step ------------------------------------------------------------------------------

    def _build_batch(self, clients: Collection[str]) -> tuple[Batch, list[_Prefill]]:
        """The next tokens of some clients, and the prefills that the batch's chunks belong to."""
        batch = Batch()
        first_of: dict[Request, int] = {}
        for pool in self._cache.active_pools():
            for row in pool.rows[: pool.num_active]:
                sequence: Sequence = row.owner
                if sequence.request.client not in clients:
                    continue
                number = len(batch.decode_tokens)
                first = first_of.setdefault(sequence.request, number)
                shared = len(sequence.request.prompt) if first < number else 0
                batch.decode_same.append((first, shared))
                batch.decode_tokens.append(sequence.tokens[-1])
                batch.decode_positions.append(sequence.num_cached)
                batch.decode_adapters.append(sequence.request.adapter)
                batch.decode_rows.append(row)
        return batch, self._add_chunks(batch, clients)

    def _add_chunks(self, batch: Batch, clients: Collection[str]) -> list[_Prefill]:
        """Fill a batch with parts of prompts; returns whose they are."""
        budget = max(self._limits.max_batch_tokens - len(batch.decode_tokens), 1)
        added: list[_Prefill] = []
        for prefill in self._prefills:
            if prefill.request.client not in clients:
                continue
            count = prefill.remaining
            images = () if prefill.done else prefill.request.spec.images
            if images and batch.chunks:
                break
            if count > budget and images:
                count = max(budget, min(count, prefill.request.end_of_images))
            elif count > budget and prefill.row is not None:
                count = budget
            if count <= 0 or (count > budget and batch.chunks):
                break
            tokens = prefill.tokens[prefill.done : prefill.done + count]
            adapter = prefill.request.adapter
            batch.chunks.append(Chunk(tokens, prefill.done, prefill.row, adapter, images))
            added.append(prefill)
            budget -= count
        return added

    def _score_prompt(self, prefill: _Prefill, hidden: Tensor) -> None:
        request = prefill.request
        if request.prompt_scores is None or prefill.sequence.tokens:
            return
        request.prompt_scores.take(
            prefill.done,
            hidden,
            lambda rows: self._decoder.logits(rows, [(request.adapter, len(rows))]),
        )

    def _start(self, prefill: _Prefill, logits_V: Tensor) -> None:
        """Draw the first token of every completion from the prompt's last logits."""
        waiting = prefill.request.waiting
        prefill.request.waiting = []
        for first in range(0, len(waiting), _DRAWS_AT_ONCE):
            part = waiting[first : first + _DRAWS_AT_ONCE]
            self._draw(part, logits_V.expand(len(part), -1))
        if prefill.request.future.done():
            return
        for sequence in waiting[1:]:
            if sequence.stop_reason is None:
                self._waiting.add_sequence(sequence)
            else:
                self._finish(sequence)

    def _after_prefill(self, prefill: _Prefill) -> None:
        sequence = prefill.sequence
        if prefill.request.future.done():
            self._release(sequence)
        elif sequence.stop_reason is not None:
            self._finish(sequence)
        else:
            self._activate(sequence)

    def _activate(self, sequence: Sequence) -> None:
        """Let a sequence whose tokens are all cached decode, and its siblings by copies of it."""
        assert sequence.row is not None, "a sequence decodes only with a row"
        sequence.row.pool.activate(sequence.row)
        self._running.append(sequence)
        waiting = self._waiting.sequences()
        siblings = [s for s in waiting if s.request is sequence.request and len(s.tokens) == 1]
        for sibling in siblings:
            if not self._has_place(sequence.request.client, self._places()):
                return
            row = self._allocate(sibling)
            if row is None:
                return
            self._cache.copy(sequence.row, row, len(sequence.request.prompt))
            self._waiting.remove_sequence(sibling)
            row.pool.activate(row)
            self._running.append(sibling)

    def _draw(
        self, sequences: list[Sequence], logits_NV: Tensor, draft: list[int] | None = None
    ) -> None:
        """Draw a token for each row; with a draft, the rows are one sequence's, one behind the
        other, and those after a wrong guess mean nothing."""
        if not sequences:
            return
        specs = [sequence.request.spec for sequence in sequences]
        params = SamplingParams(
            np.array([spec.temperature for spec in specs]),
            np.array([spec.top_k for spec in specs]),
            np.array([spec.top_p for spec in specs]),
        )
        places = np.array([len(sequence.tokens) for sequence in sequences], np.uint64)
        if draft is not None:
            places += np.arange(len(places), dtype=np.uint64)
        uniforms = draw_uniforms(
            np.array([sequence.request.seed for sequence in sequences], np.uint64),
            np.array([sequence.index for sequence in sequences], np.uint64),
            places,
        )
        draws = draw_tokens(logits_NV, params, uniforms)
        widths = [spec.topk_sample_logprobs for spec in specs]
        topk = topk_logprobs(logits_NV, logsumexp(logits_NV), max(widths)) if any(widths) else None
        for row, (sequence, token) in enumerate(
            zip(sequences, draws.tokens_N.tolist(), strict=True)
        ):
            if topk is not None and widths[row]:
                sequence.topk_ids.append(topk[0][row, : widths[row]])
                sequence.topk_logprobs.append(topk[1][row, : widths[row]])
            self.sampled_tokens += 1
            self._append(sequence, token, float(draws.logprobs_N[row]))
            ended = sequence.stop_reason is not None or sequence.request.future.done()
            if draft is not None and (ended or draft[row : row + 1] != [token]):
                return

    def _append(self, sequence: Sequence, token: int, logprob: float) -> None:
        request = sequence.request
        if request.future.done():
            return
        if not np.isfinite(logprob):
            self._fail(
                request,
                UserError(
                    "the sampler's weights give logits that are not finite, so there is nothing to "
                    "sample from. Training has diverged; go back to an earlier checkpoint or lower "
                    "the learning rate"
                ),
            )
            return
        try:
            sequence.append(token, logprob)
        except Exception as error:  # the caller's on_token
            self._fail(request, error)

    # --- the end of sequences ------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.future.done():
            return
        if sequence in self._running:
            self._running.remove(sequence)
        if sequence.row is not None and sequence.row.index < sequence.row.pool.num_active:
            key = 0 if request.adapter is None else request.adapter.key
            self._cache.remember(key, sequence.cached_tokens(), sequence.row)
        self._release(sequence)
        if request.finish(sequence) and request.future.set_running_or_notify_cancel():
            request.future.set_result(request.result())

    def _release(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self._cache.free(sequence.row)
            sequence.row = None

    def _requests(self) -> Iterable[Request]:
        holders = [*self._running, *(p.sequence for p in self._prefills)]
        holders += self._waiting.sequences()
        begun = (sequence.request for sequence in holders)
        return list(dict.fromkeys([*self._waiting.requests(), *begun]))

    def _drop_cancelled(self) -> None:
        for request in self._requests():
            if request.future.cancelled():
                self._remove(request)

    def _fail(self, request: Request, error: Exception) -> None:
        if not request.future.done() and request.future.set_running_or_notify_cancel():
            request.future.set_exception(error)
        self._remove(request)

    def _remove(self, request: Request) -> None:
        """Take every trace of a request out of the engine."""
        self._waiting.remove(request)
        for sequence in [s for s in self._running if s.request is request]:
            self._running.remove(sequence)
            self._release(sequence)
        for prefill in [p for p in self._prefills if p.request is request]:
            self._prefills.remove(prefill)
            self._release(prefill.sequence)


def _tokens_by_client(batch: Batch, prefills: list[_Prefill]) -> Counter[str]:
    """How many tokens a batch computes for each client."""
    counts = Counter(sequence.request.client for sequence in batch.sequences())
    for prefill, chunk in zip(prefills, batch.chunks, strict=True):
        counts[prefill.request.client] += len(chunk.tokens)
    return counts
