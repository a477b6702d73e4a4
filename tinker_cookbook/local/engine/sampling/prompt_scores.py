"""Prompt scoring: logprobs over the prompt, gathered chunk by chunk during the prefill.

The hidden state at position p gives the distribution of token p + 1. So the first token has no
logprob, and the hidden state of the last position scores nothing in the prompt: it gives the first
completion token.

Scores need hidden states, which the KV cache does not hold. A prompt is therefore copied from the
cache only up to `first_hidden`, the first position that something is asked about.

Axes: P prompt tokens, N rows of one part of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.sampling.logits import (
    NO_LOGPROB,
    SamplingParams,
    draw_tokens,
    logsumexp,
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

_ROWS_AT_ONCE = 64
"""Rows whose logits [N, V] exist at the same time: those of a long prompt would fill memory."""


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
        self._logprobs = np.full(num_tokens, np.nan, np.float32)
        self._topk_ids = np.zeros((num_tokens, self._topk), np.int32)
        self._topk_logprobs = np.zeros((num_tokens, self._topk), np.float32)
        if self._topk:
            self._topk_logprobs[:, 0] = NO_LOGPROB
        self._alt_ids = np.zeros((num_tokens - 1, self._alt_k), np.int32)
        self._alt_logprobs = np.zeros((num_tokens - 1, self._alt_k), np.float32)

    def take(self, start: int, hidden_NH: Tensor, to_logits: Callable[[Tensor], Tensor]) -> None:
        """Score with the hidden states of a chunk.

        Args:
            start: position of the first one. Positions that nothing is asked about are skipped.
            to_logits: hidden states -> float32 logits [N, V]; called on a few rows at a time.
        """
        first = max(start, self.first_hidden)
        last = min(start + len(hidden_NH), len(self._prompt) - 1)
        for low in range(first, last, _ROWS_AT_ONCE):
            high = min(low + _ROWS_AT_ONCE, last)
            self._score(low, to_logits(hidden_NH[low - start : high - start]))

    def fill(self, result: SampleResult) -> None:
        """Put what was asked for into the answer."""
        spec = self._spec
        if spec.prompt_logprobs:
            result.prompt_logprobs = self._logprobs
        if self._topk:
            result.topk_prompt_logprobs = TokenLogprobs(self._topk_ids, self._topk_logprobs)
        if self._alt_k:
            result.prompt_alt_tokens = TokenLogprobs(self._alt_ids, self._alt_logprobs)
        if spec.target_prompt_logprobs is not None:
            result.target_prompt_logprobs = self._targets.answer()

    def _score(self, low: int, logits_NV: Tensor) -> None:
        """Score tokens low + 1, low + 2, ... with the logits of positions low, low + 1, ..."""
        lse_N = logsumexp(logits_NV)
        scored = slice(low + 1, low + 1 + len(logits_NV))
        # alternatives or targets may start at earlier tokens than the logprobs do
        skip = max(self._first_logprob - scored.start, 0)
        if skip < len(logits_NV):
            kept = slice(scored.start + skip, scored.stop)
            wanted = torch.from_numpy(self._prompt[kept].astype(np.int64)).to(logits_NV.device)
            chosen = logits_NV[skip:].gather(1, wanted[:, None])[:, 0]
            self._logprobs[kept] = (chosen - lse_N[skip:]).cpu().numpy()
            if self._topk:
                found = topk_logprobs(logits_NV[skip:], lse_N[skip:], self._topk)
                self._topk_ids[kept], self._topk_logprobs[kept] = found
        if self._targets.any:
            self._targets.score(low, logits_NV, lse_N)
        if self._alt_k:
            self._draw_alternatives(low, logits_NV)

    def _draw_alternatives(self, low: int, logits_NV: Tensor) -> None:
        """Draw k independent tokens per position at the request's temperature."""
        num_rows = len(logits_NV)
        temperature = np.full(num_rows, self._spec.temperature)
        params = SamplingParams(temperature, np.full(num_rows, -1), np.ones(num_rows))
        rows = slice(low, low + num_rows)
        for column in range(self._alt_k):
            uniforms = draw_uniforms(
                np.uint64(self._seed),
                np.uint64(ALTERNATIVES_STREAM + column),
                np.arange(low, low + num_rows, dtype=np.uint64),
            )
            draws = draw_tokens(logits_NV, params, uniforms)
            self._alt_ids[rows, column] = draws.tokens_N
            self._alt_logprobs[rows, column] = draws.logprobs_N


class _Targets:
    """Token ids to score at given positions, dense [P - 1, K] or CSR, as one list of cells.

    Row i is scored by position i. Cells are sorted by row, so the cells of a chunk are a range.
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

    def score(self, low: int, logits_NV: Tensor, lse_N: Tensor) -> None:
        """Fill the cells of rows low, low + 1, ..."""
        begin, end = np.searchsorted(self._rows, [low, low + len(logits_NV)])
        cells = np.arange(begin, end)
        cells = cells[self._ids[cells] >= 0]
        if not len(cells):
            return
        device = logits_NV.device
        rows = torch.from_numpy(self._rows[cells] - low).to(device)
        ids = torch.from_numpy(self._ids[cells]).to(device)
        self._values[cells] = (logits_NV[rows, ids] - lse_N[rows]).cpu().numpy()

    def answer(self) -> np.ndarray | SparseRows:
        """Return the logprobs in the layout of the request; empty cells hold 0."""
        if self._sparse is None:
            return self._values.reshape(self._shape)
        sparse = self._sparse
        return SparseRows(self._values, sparse.crow_indices, sparse.col_indices, sparse.shape)
