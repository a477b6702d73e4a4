"""Scoring of the prompts in a batch: the logits of several requests are computed together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.sampling.batch import BatchDecoder, CacheRow
from tinker_cookbook.local.engine.sampling.logits import logsumexp
from tinker_cookbook.local.engine.sampling.prompt_scores import PromptScores
from tinker_cookbook.local.engine.sampling.running import Prefill

__all__ = ["PromptScorer"]

_ROWS_AT_ONCE = 64
"""Rows whose logits [N, V] exist at the same time: those of a long prompt would fill memory."""
_ROWS_AT_ONCE_GPU = 256
"""The same on a GPU, which computes more at once and waits for the processor after each part."""


@dataclass(frozen=True)
class _Part:
    """Consecutive entries of what one prefill wants to have scored."""

    prefill: Prefill
    scores: PromptScores
    positions: np.ndarray
    hidden: Tensor
    """One hidden state per position."""

    def split(self, size: int) -> tuple[_Part, _Part]:
        """Return the first `size` entries and the rest."""
        first, rest = self.positions[:size], self.positions[size:]
        return (
            _Part(self.prefill, self.scores, first, self.hidden[:size]),
            _Part(self.prefill, self.scores, rest, self.hidden[size:]),
        )


class PromptScorer:
    """Collects the hidden states of a batch that are needed for scores, then scores them."""

    def __init__(self, decoder: BatchDecoder[CacheRow]) -> None:
        self._decoder = decoder
        self._parts: list[_Part] = []

    def collect(self, prefill: Prefill, start: int, hidden: Tensor) -> None:
        """Note hidden states of a prompt.

        Args:
            start: position of the first one. Positions that nothing is asked about are skipped.
        """
        scores = prefill.request.prompt_scores
        if scores is None or not prefill.draws_first_tokens:
            return  # a preempted sequence is computed again, but its prompt is scored already
        positions = scores.wanted(start, start + len(hidden))
        if len(positions):
            rows = to_device(positions - start, hidden.device)
            self._parts.append(_Part(prefill, scores, positions, hidden[rows]))

    def run(self) -> None:
        """Score everything that was collected."""
        parts, self._parts = self._parts, []
        while parts:
            on_cpu = parts[0].hidden.device.type == "cpu"
            now, room = [], _ROWS_AT_ONCE if on_cpu else _ROWS_AT_ONCE_GPU
            while parts and room:
                part, rest = parts.pop(0).split(room)
                if len(rest.positions):
                    parts.insert(0, rest)
                now.append(part)
                room -= len(part.positions)
            self._score(now)

    def _score(self, parts: list[_Part]) -> None:
        adapters = [(part.prefill.request.adapter, len(part.positions)) for part in parts]
        logits_NV = self._decoder.logits(torch.cat([part.hidden for part in parts]), adapters)
        lse_N = logsumexp(logits_NV)
        first = 0
        for part in parts:
            rows = slice(first, first + len(part.positions))
            part.scores.score(part.positions, logits_NV[rows], lse_N[rows])
            first = rows.stop
