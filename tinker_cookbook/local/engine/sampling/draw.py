"""Drawing: the next token of each sequence from its logits, and the checks for its end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tinker_cookbook.local.engine.sampling.finish import Finisher
from tinker_cookbook.local.engine.sampling.logits import (
    Draws,
    SamplingParams,
    draw_from_all,
    draw_tokens,
    logprobs_of,
    logsumexp,
    topk_logprobs,
)
from tinker_cookbook.local.engine.sampling.random_numbers import uniforms_at
from tinker_cookbook.local.engine.sampling.sequence import Request, Sequence
from tinker_cookbook.local.errors import UserError

__all__ = ["Drawer"]

_DRAWS_AT_ONCE = 64


@dataclass(frozen=True)
class _Drawn:
    """Tokens drawn for N rows, not yet added to their sequences."""

    tokens: list[int]
    logprobs: list[float]
    topk: tuple[np.ndarray, np.ndarray] | None
    """Ids and logprobs [N, k] of the most likely tokens, if a row asks for them."""


class Drawer:
    """Draws tokens and adds them to their sequences.

    A draw depends only on the logits, the request's seed, the number of the completion and the
    number of the token. So it does not matter which other rows are drawn together, or whether a
    sequence was preempted meanwhile.
    """

    def __init__(self, finisher: Finisher) -> None:
        self._finisher = finisher
        self.sampled_tokens = 0
        """Number of tokens drawn so far."""

    def draw(self, sequences: list[Sequence], logits_NV: Tensor) -> None:
        """Draw the next token of N different sequences, one per row of logits."""
        if not sequences:
            return
        next_indices = np.array([len(sequence.tokens) for sequence in sequences], np.uint64)
        drawn = self._draw_rows(sequences, next_indices, logits_NV)
        for row, sequence in enumerate(sequences):
            self._take(sequence, drawn, row)

    def draw_first(self, sequences: list[Sequence], logits_V: Tensor) -> None:
        """Draw the first tokens of many sequences from the logits of their common prompt."""
        for first in range(0, len(sequences), _DRAWS_AT_ONCE):
            part = sequences[first : first + _DRAWS_AT_ONCE]
            self.draw(part, logits_V.expand(len(part), -1))

    def verify(self, sequence: Sequence, draft: list[int], logits_NV: Tensor) -> int:
        """Draw the tokens that follow a sequence's newest token and its draft.

        Args:
            logits_NV: [len(draft) + 1, V]. Row 0 follows the newest token, row n + 1 follows
                `draft[n]`. So row n + 1 is valid only if `draft[n]` equals the token drawn from
                row n, and that draft token is accepted; rows after the first rejected token are
                dropped.

        Returns:
            How many draft tokens were accepted.
        """
        before = len(sequence.tokens)
        # a rule must know each token before it can change the logits of the next one
        at_once = len(logits_NV) if sequence.rule is None else 1
        for first in range(0, len(logits_NV), at_once):
            logits = logits_NV[first : first + at_once]
            next_indices = before + first + np.arange(len(logits), dtype=np.uint64)
            drawn = self._draw_rows([sequence] * len(logits), next_indices, logits)
            if not self._take_while_drafted(sequence, drawn, draft[first:]):
                break
        return max(len(sequence.tokens) - before - 1, 0)

    def _take_while_drafted(self, sequence: Sequence, drawn: _Drawn, draft: list[int]) -> bool:
        """Add tokens up to the first that the draft does not have; return whether it has all."""
        for row, token in enumerate(drawn.tokens):
            self._take(sequence, drawn, row)
            has_ended = sequence.stop_reason is not None or sequence.request.future.done()
            if has_ended or draft[row : row + 1] != [token]:
                return False
        return True

    def _take(self, sequence: Sequence, drawn: _Drawn, row: int) -> None:
        """Add the token of a row to its sequence."""
        width = sequence.request.spec.topk_sample_logprobs
        if drawn.topk is not None and width:
            ids, logprobs = drawn.topk
            sequence.topk_ids.append(ids[row, :width])
            sequence.topk_logprobs.append(logprobs[row, :width])
        self.sampled_tokens += 1
        self._append(sequence, drawn.tokens[row], drawn.logprobs[row])

    def _append(self, sequence: Sequence, token: int, logprob: float) -> None:
        request = sequence.request
        if request.future.done():  # another sequence of the request failed in this step
            return
        if not math.isfinite(logprob):
            error = UserError(
                "the sampler's weights give logits that are not finite (NaN or infinity): training "
                "has diverged. Go back to an earlier checkpoint or lower the learning rate"
            )
            self._finisher.fail(request, error)
            return
        try:
            sequence.append(token, logprob)
        except Exception as error:  # from the request's on_token
            self._finisher.fail(request, error)

    def _draw_rows(
        self, sequences: list[Sequence], next_indices: np.ndarray, logits_NV: Tensor
    ) -> _Drawn:
        """Draw one token per row.

        Args:
            sequences: the sequence of each row; one may have several rows.
            next_indices: uint64 [N], the number of the token within its completion.
            logits_NV: float32.
        """
        requests = [sequence.request for sequence in sequences]
        streams = np.array([sequence.stream for sequence in sequences], np.uint64)
        uniforms_N = uniforms_at(streams, next_indices)
        ruled = [row for row, sequence in enumerate(sequences) if sequence.rule is not None]
        if ruled:
            changed_NV = self._change_logits(sequences, ruled, logits_NV)
            draws = _draw(requests, changed_NV, uniforms_N)
            draws.logprobs_N[ruled] = logprobs_of(logits_NV[ruled], draws.tokens_N[ruled])
        else:
            draws = _draw(requests, logits_NV, uniforms_N)
        width = max(request.spec.topk_sample_logprobs for request in requests)
        topk = topk_logprobs(logits_NV, logsumexp(logits_NV), width) if width else None
        return _Drawn(draws.tokens_N.tolist(), draws.logprobs_N.tolist(), topk)

    def _change_logits(
        self, sequences: list[Sequence], ruled: list[int], logits_NV: Tensor
    ) -> Tensor:
        """Return a copy of the logits in which the rules have changed the rows `ruled`."""
        rows_RV = logits_NV[ruled].cpu()  # a copy: the model's logits give the logprobs
        for changed_V, row in zip(rows_RV.numpy(), ruled, strict=True):
            sequence = sequences[row]
            if sequence.rule is None or sequence.request.future.done():
                continue
            try:
                sequence.rule.change(changed_V)
            except Exception as error:
                self._finisher.fail(sequence.request, error)
        changed_NV = logits_NV.clone()
        changed_NV[ruled] = rows_RV.to(logits_NV.device)
        return changed_NV


def _draw(requests: list[Request], logits_NV: Tensor, uniforms_N: np.ndarray) -> Draws:
    """Draw one token per row, with the settings of its request."""
    temperature_N = np.array([request.spec.temperature for request in requests])
    if all(request.draws_from_all for request in requests):
        draws = draw_from_all(logits_NV, temperature_N, uniforms_N)
        if draws is not None:
            return draws
    params = SamplingParams(
        temperature_N,
        np.array([request.spec.top_k for request in requests]),
        np.array([request.spec.top_p for request in requests]),
    )
    return draw_tokens(logits_NV, params, uniforms_N)
