"""Prompt scoring: logprobs over the prompt, gathered chunk by chunk during the prefill.

The hidden state at position p gives the distribution of token p + 1. So the first token has no
logprob, and the hidden state of the last position scores nothing in the prompt: it gives the first
completion token.

Scores need hidden states, which the KV cache does not hold. Stored prefixes of scored prompts have
them; another prompt is copied from the cache only up to `first_hidden`, the first position that
something is asked about.

Axes: P prompt tokens, N positions that are scored together, V vocabulary.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.sampling.known_scores import KnownScores
from tinker_cookbook.local.engine.sampling.logits import (
    NO_LOGPROB,
    SamplingParams,
    draw_tokens,
    topk_logprobs,
)
from tinker_cookbook.local.engine.sampling.random_numbers import ALTERNATIVES_STREAM, draw_uniforms
from tinker_cookbook.local.engine.types import (
    SampleResult,
    SampleSpec,
    SparseRows,
    TokenLogprobs,
)

__all__ = ["PromptScores"]


class PromptScores:
    """Collects what one request asks about its prompt."""

    def __init__(self, spec: SampleSpec, prompt: np.ndarray, seed: int) -> None:
        """`prompt` is int32 [P]; `seed` decides the alternatives that are drawn."""
        self._spec = spec
        self._prompt = prompt
        self._seed = seed
        num_tokens = len(self._prompt)
        self._alt_k = spec.prompt_alt_tokens_k
        self._topk = spec.topk_prompt_logprobs
        # index of the first token that gets a logprob; P: none
        self._first_logprob = num_tokens
        if spec.prompt_logprobs or self._topk:
            self._first_logprob = max(num_tokens - (spec.prompt_logprobs_last_n or num_tokens), 1)
        self._targets = _Targets(spec.target_prompt_logprobs)
        # index of the first token that anything is asked about
        first_scored = min(
            self._first_logprob,
            1 if self._alt_k else num_tokens,
            self._targets.first_row() + 1 if self._targets.any else num_tokens,
        )
        self.first_hidden = first_scored - 1
        """First position whose hidden state is needed; P - 1 or more means that none is."""
        self.known = KnownScores(num_tokens)
        """Logprobs and most likely tokens so far."""
        self._alt_ids = np.zeros((num_tokens - 1, self._alt_k), np.int32)
        self._alt_logprobs = np.zeros((num_tokens - 1, self._alt_k), np.float32)

    def take_known(self, known: KnownScores, count: int) -> None:
        """Take over known scores of the first `count` prompt tokens, as far as asked for."""
        self.known.learn(known, self._first_logprob, count, topk=(self._topk,))

    def wanted(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in [start, stop) whose logits are needed, int64, ascending."""
        stop = min(stop, len(self._prompt) - 1)
        positions = np.arange(max(start, self.first_hidden), max(stop, self.first_hidden))
        needed = (positions + 1 >= self._first_logprob) & ~self.known.places(self._topk)[
            positions + 1
        ]
        if self._alt_k:
            needed[:] = True
        return positions[needed | self._targets.has(positions)]

    def score(self, positions_N: np.ndarray, logits_NV: Tensor, lse_N: Tensor) -> None:
        """Score the tokens that follow some positions, all of them from `wanted`."""
        # alternatives or targets may start at earlier tokens than the logprobs do
        skip = int(np.searchsorted(positions_N, self._first_logprob - 1))
        if skip < len(positions_N):
            self._score_tokens(positions_N[skip:] + 1, logits_NV[skip:], lse_N[skip:])
        if self._targets.any:
            self._targets.score(positions_N, logits_NV, lse_N)
        if self._alt_k:
            self._draw_alternatives(positions_N, logits_NV)

    def fill(self, result: SampleResult) -> None:
        """Put what was asked for into the answer."""
        spec = self._spec
        if spec.prompt_logprobs:
            result.prompt_logprobs = self.known.logprobs
        if self._topk:
            ids, logprobs = self.known.topk_of(self._topk)
            missing = np.zeros(self._topk, np.float32)
            missing[0] = NO_LOGPROB
            filled = np.where(np.isnan(logprobs[:, :1]), missing, logprobs)
            result.topk_prompt_logprobs = TokenLogprobs(ids, filled)
        if self._alt_k:
            result.prompt_alt_tokens = TokenLogprobs(self._alt_ids, self._alt_logprobs)
        if spec.target_prompt_logprobs is not None:
            result.target_prompt_logprobs = self._targets.answer()

    def _score_tokens(self, tokens_N: np.ndarray, logits_NV: Tensor, lse_N: Tensor) -> None:
        """Score the prompt tokens at N places with the logits of the positions before them."""
        wanted = to_device(self._prompt[tokens_N].astype(np.int64), logits_NV.device)
        chosen = logits_NV.gather(1, wanted[:, None])[:, 0]
        self.known.logprobs[tokens_N] = (chosen - lse_N).cpu().numpy()
        if self._topk:
            ids, logprobs = self.known.topk_of(self._topk)
            ids[tokens_N], logprobs[tokens_N] = topk_logprobs(logits_NV, lse_N, self._topk)

    def _draw_alternatives(self, positions_N: np.ndarray, logits_NV: Tensor) -> None:
        """Draw k independent tokens per position at the request's temperature."""
        num_rows = len(logits_NV)
        temperature = np.full(num_rows, self._spec.temperature)
        params = SamplingParams(temperature, np.full(num_rows, -1), np.ones(num_rows))
        for column in range(self._alt_k):
            uniforms = draw_uniforms(
                np.uint64(self._seed),
                np.uint64(ALTERNATIVES_STREAM + column),
                positions_N.astype(np.uint64),
            )
            draws = draw_tokens(logits_NV, params, uniforms)
            self._alt_ids[positions_N, column] = draws.tokens_N
            self._alt_logprobs[positions_N, column] = draws.logprobs_N


class _Targets:
    """Token ids to score at given positions, dense [P - 1, K] or CSR, as one list of cells.

    Row i is scored by position i.
    """

    def __init__(self, targets: np.ndarray | SparseRows | None) -> None:
        self._sparse = targets if isinstance(targets, SparseRows) else None
        self._shape: tuple[int, ...] = ()
        rows, ids = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if isinstance(targets, SparseRows):
            counts = np.diff(np.asarray(targets.crow_indices))
            rows = np.repeat(np.arange(len(counts)), counts)
            ids = np.asarray(targets.values, np.int64)
        elif targets is not None:
            dense = np.asarray(targets, np.int64)
            self._shape = dense.shape
            rows = np.repeat(np.arange(dense.shape[0]), dense.shape[1])
            ids = dense.ravel()
        self._rows, self._ids = rows, ids
        self._values = np.zeros(len(ids), np.float32)
        self.any = bool(np.any(ids >= 0))

    def first_row(self) -> int:
        """Return the first row with an id; -1 marks an empty cell."""
        return int(self._rows[self._ids >= 0].min())

    def has(self, positions: np.ndarray) -> np.ndarray:
        """Return whether something is asked in the row of each position, bool [N]."""
        return np.isin(positions, self._rows[self._ids >= 0])

    def score(self, positions_N: np.ndarray, logits_NV: Tensor, lse_N: Tensor) -> None:
        """Fill the cells of the rows of some positions."""
        cells = np.flatnonzero(np.isin(self._rows, positions_N) & (self._ids >= 0))
        if not len(cells):
            return
        device = logits_NV.device
        rows = to_device(np.searchsorted(positions_N, self._rows[cells]), device)
        ids = to_device(self._ids[cells], device)
        self._values[cells] = (logits_NV[rows, ids] - lse_N[rows]).cpu().numpy()

    def answer(self) -> np.ndarray | SparseRows:
        """Return the logprobs in the layout of the request; empty cells hold 0."""
        if self._sparse is None:
            return self._values.reshape(self._shape)
        sparse = self._sparse
        return SparseRows(self._values, sparse.crow_indices, sparse.col_indices, sparse.shape)
