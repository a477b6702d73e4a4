"""From logits to tokens: logprobs, temperature, top-k, top-p and the draw, for a batch of rows.

Rows are independent: the result of one does not depend on the others.

Axes: N rows, V vocabulary, B blocks of the vocabulary, K tokens of a block or candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.native import softmax

__all__ = [
    "NO_LOGPROB",
    "Draws",
    "SamplingParams",
    "draw_from_all",
    "draw_tokens",
    "logprobs_of",
    "logsumexp",
    "topk_logprobs",
]

NO_LOGPROB = -99999.0
"""Stands for a missing logprob in a top-k answer, next to token 0."""
_BLOCK = softmax.BLOCK
"""Tokens per block: the draw first picks a block, then a token in it."""
_COLDEST = 1e-30
"""Lowest temperature used: lower ones give the same tokens, but their inverse overflows float32."""
_FIRST_CANDIDATES = 1024
"""Number of most likely tokens searched for the nucleus before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of N rows, one entry per row."""

    temperature_N: np.ndarray
    """float64; 0 is greedy."""
    top_k_N: np.ndarray
    """int64; -1 or 0 is off."""
    top_p_N: np.ndarray
    """float64 in (0, 1]; 1 is off."""


@dataclass(frozen=True)
class Draws:
    """Tokens drawn for N rows."""

    tokens_N: np.ndarray
    """int64."""
    logprobs_N: np.ndarray
    """float32, from the logits before temperature, top-k and top-p. NaN where a row's logits are
    not finite; its token is then meaningless."""


def logsumexp(logits_NV: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) per row, summed in float64 over blocks."""
    compiled = softmax.exp_blocks(logits_NV, None, keep_weights=False)
    return (compiled or _torch_blocks(logits_NV, None))[2]


def topk_logprobs(logits_NV: Tensor, lse_N: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (int32) and logprobs (float32) of the k most likely tokens, best first.

    A vocabulary smaller than k fills the rest with token 0 and `NO_LOGPROB`.
    """
    num_rows, vocab = logits_NV.shape
    values, ids = logits_NV.topk(min(k, vocab), dim=-1)
    ids_NK = np.zeros((num_rows, k), np.int32)
    logprobs_NK = np.full((num_rows, k), NO_LOGPROB, np.float32)
    ids_NK[:, : ids.shape[1]] = ids.cpu().numpy()
    logprobs_NK[:, : ids.shape[1]] = (values - lse_N[:, None]).cpu().numpy()
    return ids_NK, logprobs_NK


def draw_from_all(
    logits_NV: Tensor, temperature_N: np.ndarray, uniforms_N: np.ndarray
) -> Draws | None:
    """Draw what `draw_tokens` does for rows with temperatures, without top-k and top-p.

    Return None where the compiled kernel cannot read the logits.
    """
    drawn = softmax.draw_rows(logits_NV, _inverse(temperature_N), uniforms_N)
    return None if drawn is None else Draws(*drawn)


def draw_tokens(logits_NV: Tensor, params: SamplingParams, uniforms_N: np.ndarray) -> Draws:
    """Draw one token per row by inverting the cumulative distribution at `uniforms_N`.

    Args:
        logits_NV: float32.
        uniforms_N: float64 in [0, 1).
    """
    # three groups of rows, from cheap to expensive: argmax; the whole distribution; a part of it
    greedy_N = (params.temperature_N == 0) | (params.top_k_N == 1)
    restricted_N = ((params.top_k_N > 0) | (params.top_p_N < 1)) & ~greedy_N
    plain_N = ~greedy_N & ~restricted_N
    if plain_N.all():
        draws = draw_from_all(logits_NV, params.temperature_N, uniforms_N)
        if draws is not None:
            return draws
    tokens_N = torch.zeros(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    blocks = _exp_blocks(logits_NV, None)  # at temperature 1: the logprobs of all rows need it
    if greedy_N.any():
        rows, chosen = _select(logits_NV, greedy_N)
        tokens_N = _replace(tokens_N, rows, chosen.argmax(-1))
    if plain_N.any():
        rows, chosen = _select(logits_NV, plain_N)
        temperature = params.temperature_N[rows]
        if np.all(temperature == 1.0) and len(rows) == len(logits_NV):
            tokens_N = _invert(blocks, uniforms_N)
        else:
            drawn_N = _invert(_exp_blocks(chosen, temperature), uniforms_N[rows])
            tokens_N = _replace(tokens_N, rows, drawn_N)
    if restricted_N.any():
        rows, chosen = _select(logits_NV, restricted_N)
        subset = SamplingParams(
            params.temperature_N[rows], params.top_k_N[rows], params.top_p_N[rows]
        )
        drawn_N = torch.from_numpy(_draw_restricted(chosen, subset, uniforms_N[rows]))
        tokens_N = _replace(tokens_N, rows, drawn_N.to(tokens_N.device))
    return _to_host(tokens_N, _logprobs(logits_NV, blocks.lse_N, tokens_N))


def logprobs_of(logits_NV: Tensor, tokens_N: np.ndarray) -> np.ndarray:
    """Return the logprob of one token per row, as `draw_tokens` does; float32."""
    tokens = to_device(tokens_N, logits_NV.device)
    return _logprobs(logits_NV, _exp_blocks(logits_NV, None).lse_N, tokens).cpu().numpy()


def _logprobs(logits_NV: Tensor, lse_N: Tensor, tokens_N: Tensor) -> Tensor:
    chosen_logits_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
    return (chosen_logits_N.double() - lse_N.double()).float()


def _replace(tokens_N: Tensor, rows: np.ndarray, drawn: Tensor) -> Tensor:
    """Return the tokens with those of some rows, in ascending order, replaced."""
    if len(rows) == len(tokens_N):
        return drawn
    tokens_N[to_device(rows, tokens_N.device)] = drawn
    return tokens_N


def _to_host(tokens_N: Tensor, logprobs_N: Tensor) -> Draws:
    """Return what was drawn; a GPU sends it in one copy, since each copy waits for it."""
    if tokens_N.device.type == "cpu":
        return Draws(tokens_N.numpy(), logprobs_N.numpy())
    tokens, logprobs = torch.stack([tokens_N.double(), logprobs_N.double()]).cpu().numpy()
    return Draws(tokens.astype(np.int64), logprobs.astype(np.float32))


@dataclass(frozen=True)
class _Blocks:
    weights_NBK: Tensor
    """exp(logit / temperature - max), cut into blocks of the vocabulary."""
    sums_NB: Tensor
    """float64 sum of each block."""
    lse_N: Tensor
    """float32 logsumexp of the scaled logits."""
    vocab: int


def _select(logits_NV: Tensor, mask_N: np.ndarray) -> tuple[np.ndarray, Tensor]:
    rows = np.flatnonzero(mask_N)
    if len(rows) == len(logits_NV):
        return rows, logits_NV
    return rows, logits_NV[to_device(rows, logits_NV.device)]


def _inverse(temperature_N: np.ndarray) -> np.ndarray:
    """Return 1 / temperature, float32."""
    return (1.0 / np.maximum(temperature_N, _COLDEST)).astype(np.float32)


def _exp_blocks(logits_NV: Tensor, temperature_N: np.ndarray | None) -> _Blocks:
    inverse_N = None
    if temperature_N is not None:
        inverse_N = to_device(_inverse(temperature_N), logits_NV.device)
    compiled = softmax.exp_blocks(logits_NV, inverse_N, keep_weights=True)
    weights_NBK, sums_NB, lse_N = compiled or _torch_blocks(logits_NV, inverse_N)
    assert weights_NBK is not None
    return _Blocks(weights_NBK, sums_NB, lse_N, logits_NV.shape[1])


def _torch_blocks(logits_NV: Tensor, inverse_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    max_N = logits_NV.amax(-1, keepdim=True)
    weights = logits_NV - max_N
    if inverse_N is not None:
        weights.mul_(inverse_N[:, None])
        max_N = max_N * inverse_N[:, None]
    weights.exp_()
    weights = functional.pad(weights, (0, -weights.shape[1] % _BLOCK))
    weights_NBK = weights.view(len(weights), -1, _BLOCK)
    sums_NB = weights_NBK.sum(-1).double()
    lse_N = (max_N[:, 0].double() + sums_NB.sum(-1).log()).float()
    return weights_NBK, sums_NB, lse_N


def _invert(blocks: _Blocks, uniforms_N: np.ndarray) -> Tensor:
    """Two-level inverse of the cumulative distribution: the block, then the token in the block."""
    uniforms = to_device(uniforms_N, blocks.sums_NB.device)
    cumulative_NB = blocks.sums_NB.cumsum(-1)
    target_N = uniforms * cumulative_NB[:, -1]
    block_N = _first_above(cumulative_NB, target_N)
    before_N = (cumulative_NB - blocks.sums_NB).gather(1, block_N[:, None])[:, 0]
    rows = torch.arange(len(block_N), device=block_N.device)
    inner_NK = blocks.weights_NBK[rows, block_N].double().cumsum(-1)
    # The block's float32 sum and this float64 sum differ in the last bits.
    inner_target_N = torch.minimum(target_N - before_N, inner_NK[:, -1] * (1 - 1e-12))
    tokens_N = block_N * _BLOCK + _first_above(inner_NK, inner_target_N)
    return tokens_N.clamp_(max=blocks.vocab - 1)  # NaN could point to the padding


def _first_above(cumulative: Tensor, target_N: Tensor) -> Tensor:
    """Index of the first entry greater than the target, which has a positive weight."""
    index = torch.searchsorted(cumulative, target_N[:, None], right=True)[:, 0]
    return index.clamp_(max=cumulative.shape[1] - 1)


def _draw_restricted(
    logits_NV: Tensor, params: SamplingParams, uniforms_N: np.ndarray
) -> np.ndarray:
    """Draw among the k most likely tokens and then the nucleus of their renormalised mass."""
    vocab = logits_NV.shape[1]
    # Candidates are in descending order: first the `num` most likely tokens; if the nucleus of some
    # row is larger than that, all tokens.
    top_k_N = np.where(params.top_k_N > 0, np.minimum(params.top_k_N, vocab), vocab)
    full = _exp_blocks(logits_NV, params.temperature_N)
    total_N = full.sums_NB.sum(-1).cpu().numpy()
    num = min(vocab, max(_FIRST_CANDIDATES, int(np.max(top_k_N, where=top_k_N < vocab, initial=1))))
    while True:
        values, ids = full.weights_NBK.flatten(1).topk(num, dim=-1)
        weights_NK = values.double().cpu().numpy()
        allowed = np.arange(num)[None, :] < top_k_N[:, None]
        weights_NK = np.where(allowed, weights_NK, 0.0)
        cumulative_NK = weights_NK.cumsum(-1)
        # top-p is a share of the mass that top-k leaves
        mass_N = np.where(top_k_N < vocab, cumulative_NK[:, -1], total_N)
        limit_N = params.top_p_N * mass_N
        enough = (top_k_N <= num) | (cumulative_NK[:, -1] >= limit_N)
        if enough.all() or num == vocab:
            break
        num = vocab
    # a token is in the nucleus if the tokens before it do not reach the limit; the first always is
    before_NK = cumulative_NK - weights_NK
    kept_NK = np.where(before_NK < limit_N[:, None], weights_NK, 0.0)
    kept_NK[:, 0] = weights_NK[:, 0]
    kept_cumulative = kept_NK.cumsum(-1)
    target_N = uniforms_N * kept_cumulative[:, -1] * (1 - 1e-15)
    index_N = (kept_cumulative <= target_N[:, None]).sum(-1).clip(max=num - 1)
    return ids.cpu().numpy()[np.arange(len(index_N)), index_N]
