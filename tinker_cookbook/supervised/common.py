"""Datum construction (truncate, shift, normalise), mean NLL and bits per byte.

Axes: T tokens of one conversation, N = T - 1 positions of the datum made from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError, DataValidationError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "compute_bpb",
    "compute_mean_nll",
    "create_rightshifted_model_input_and_leftshifted_targets",
    "datum_from_model_input_weights",
]

Reduction = Literal["none", "mean"]


def compute_mean_nll(
    logprobs_list: list[tinker.TensorData], weights_list: list[tinker.TensorData]
) -> float:
    """Return the weighted mean negative log-likelihood over all tokens of a batch, in nats.

    Args:
        logprobs_list: per datum [N], natural logs.
        weights_list: per datum [N]; a position of weight 0 does not count, whatever its logprob.

    Returns:
        -sum(logprob * weight) / sum(weight); nan if the weights sum to 0.
    """
    logprobs, weights = _joined_pair(logprobs_list, weights_list, "weights_list")
    total_weight = float(weights.sum())
    if total_weight == 0:
        return float("nan")
    counted = weights != 0
    return -float(logprobs[counted] @ weights[counted]) / total_weight


def compute_bpb(
    logprobs_list: list[tinker.TensorData],
    weights_list: list[tinker.TensorData],
    target_tokens_list: list[tinker.TensorData],
    tokenizer: Tokenizer,
) -> float:
    """Return bits per UTF-8 byte over the trained target tokens that are not special.

    Unlike NLL per token it can be compared between tokenizers. A token counts if its weight is
    above 0; the weight's size plays no role. Neighbouring trained tokens are decoded together, so
    that a character split over several tokens has its true number of bytes.

    Returns:
        Bits per byte; nan if no byte is trained.
    """
    logprobs, weights = _joined_pair(logprobs_list, weights_list, "weights_list")
    _, targets = _joined_pair(logprobs_list, target_tokens_list, "target_tokens_list")
    targets = targets.astype(np.int64)
    special_ids = list(getattr(tokenizer, "all_special_ids", None) or [])
    counted = (weights > 0) & ~np.isin(targets, special_ids)
    lengths = [len(data.to_numpy()) for data in logprobs_list]
    run_starts = counted & ~_shifted_within_datums(counted, lengths)
    run_ids = np.cumsum(run_starts)[counted]
    texts = (
        str(tokenizer.decode(run.tolist()))
        for run in np.split(targets[counted], np.flatnonzero(np.diff(run_ids)) + 1)
        if len(run)
    )
    num_bytes = sum(len(text.encode("utf-8", errors="surrogatepass")) for text in texts)
    if num_bytes == 0:
        return float("nan")
    return -float(logprobs[counted].sum()) / float(np.log(2)) / num_bytes


def _shifted_within_datums(mask: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Return `mask` shifted right by one position; the first position of every datum is False."""
    shifted = np.zeros_like(mask)
    shifted[1:] = mask[:-1]
    starts = np.cumsum([0, *lengths[:-1]])
    shifted[starts[starts < len(mask)]] = False
    return shifted


def _joined_pair(
    left_list: list[tinker.TensorData], right_list: list[tinker.TensorData], right_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return each list as one float64 array, after checking that their lengths match for every
    datum."""
    left = [np.asarray(data.to_numpy()).reshape(-1) for data in left_list]
    right = [np.asarray(data.to_numpy()).reshape(-1) for data in right_list]
    left_lengths, right_lengths = [len(a) for a in left], [len(a) for a in right]
    if left_lengths != right_lengths:
        raise DataValidationError(
            f"{right_name} has lengths {right_lengths[:8]} but logprobs_list has "
            f"{left_lengths[:8]}; every datum needs one value per position in both."
        )
    if not left:
        return np.zeros(0), np.zeros(0)
    return np.concatenate(left).astype(np.float64), np.concatenate(right).astype(np.float64)


def create_rightshifted_model_input_and_leftshifted_targets(
    chunks: list[tinker.ModelInputChunk],
) -> tuple[tinker.ModelInput, list[int]]:
    """Split tokens into inputs (all but the last one) and targets (all but the first one).

    Args:
        chunks: T >= 2 tokens; the last chunk must be text, because nothing can predict an image.

    Returns:
        The model input of N = T - 1 positions, and N targets, 0 at the positions of an image.

    Raises:
        DataValidationError: fewer than two tokens, or a last chunk that is not text.
    """
    model_input, targets = _shift(chunks)
    return model_input, targets.tolist()


def datum_from_model_input_weights(
    model_input: tinker.ModelInput,
    weights: np.ndarray,
    max_length: int | None = None,
    reduction: Reduction = "none",
) -> tinker.Datum:
    """Build the datum that trains `model_input` with `weights`.

    The sequence is cut to `max_length` tokens on the right before it is shifted, so the datum has
    at most `max_length - 1` positions. An image that does not fit is dropped whole, and so are
    images left at the end, because no text follows them.

    Args:
        model_input: T tokens, images counted with their `expected_tokens`.
        weights: float32 [T]; weight t belongs to token t, as a target.
        max_length: maximum number of tokens kept; None keeps all.
        reduction: "mean" divides the weights by their sum, which makes the loss of the datum a
            mean over its trained tokens; "none" does not change them. Weights that sum to 0 stay 0.

    Returns:
        A datum with `weights` float32 [N] and `target_tokens` int64 [N].

    Raises:
        DataValidationError: weights of another length or not finite; fewer than two tokens left.
    """
    import tinker

    if reduction not in ("none", "mean"):
        raise ConfigurationError(f"reduction={reduction!r} is unknown; use 'none' or 'mean'.")
    if max_length is not None and max_length < 2:
        raise ConfigurationError(f"max_length={max_length} has no target; use 2 or more.")
    weights_T = _checked_weights(model_input.chunks, weights)
    model_input, targets_N = _shift(_truncated(model_input.chunks, max_length))
    weights_N = weights_T[1 : len(targets_N) + 1].copy()
    total = weights_N.sum(dtype=np.float64)
    if reduction == "mean" and total > 0:
        weights_N = (weights_N / total).astype(np.float32)
    shape = [len(targets_N)]
    return tinker.Datum(
        model_input=model_input,
        loss_fn_inputs={
            "weights": tinker.TensorData(data=weights_N, dtype="float32", shape=shape),
            "target_tokens": tinker.TensorData(data=targets_N, dtype="int64", shape=shape),
        },
    )


def _checked_weights(chunks: Iterable[tinker.ModelInputChunk], weights: np.ndarray) -> np.ndarray:
    weights_T = np.asarray(weights, dtype=np.float32)
    num_tokens = sum(_chunk_length(chunk) for chunk in chunks)
    if weights_T.shape != (num_tokens,):
        raise DataValidationError(
            f"weights has shape {list(weights_T.shape)} but model_input has {num_tokens} tokens; "
            "give one weight per token, image tokens included."
        )
    if not np.isfinite(weights_T).all():
        raise DataValidationError("weights has a value that is not finite; use finite numbers.")
    return weights_T


def _chunk_length(chunk: tinker.ModelInputChunk) -> int:
    if chunk.type == "encoded_text":
        return len(chunk.tokens)
    if getattr(chunk, "expected_tokens", 0) is None:
        raise DataValidationError(
            "expected_tokens=None in an image chunk leaves its length unknown; set expected_tokens."
        )
    return chunk.length


def _truncated(
    chunks: Sequence[tinker.ModelInputChunk], max_length: int | None
) -> list[tinker.ModelInputChunk]:
    """Return the longest prefix of at most `max_length` tokens that ends in text; no chunk is
    empty."""
    import tinker

    room = float("inf") if max_length is None else max_length
    kept: list[tinker.ModelInputChunk] = []
    for chunk in chunks:
        length = _chunk_length(chunk)
        if length <= room:
            room -= length
            if length:
                kept.append(chunk)
            continue
        if isinstance(chunk, tinker.EncodedTextChunk) and room > 0:
            kept.append(_text_chunk(chunk.tokens[: int(room)]))
        break
    while kept and not isinstance(kept[-1], tinker.EncodedTextChunk):
        kept.pop()
    return kept


def _shift(chunks: Sequence[tinker.ModelInputChunk]) -> tuple[tinker.ModelInput, np.ndarray]:
    """Do the same as `create_rightshifted_model_input_and_leftshifted_targets`, with int64 [N]
    targets."""
    import tinker

    num_tokens = sum(_chunk_length(chunk) for chunk in chunks)
    if num_tokens < 2:
        raise DataValidationError(
            f"a sequence of {num_tokens} tokens has no target; at least 2 tokens are needed."
        )
    last = chunks[-1]
    if not isinstance(last, tinker.EncodedTextChunk):
        raise DataValidationError(
            f"the last chunk is of type {last.type!r}; it must be text, since only text tokens "
            "can be targets."
        )
    tokens = itertools.chain.from_iterable(
        chunk.tokens
        if isinstance(chunk, tinker.EncodedTextChunk)
        else itertools.repeat(0, chunk.length)
        for chunk in chunks
    )
    tokens_T = np.fromiter(tokens, dtype=np.int64, count=num_tokens)
    inputs = list(chunks[:-1])
    if len(last.tokens) > 1:
        inputs.append(_text_chunk(last.tokens[:-1]))
    return tinker.ModelInput.model_construct(chunks=inputs), tokens_T[1:].copy()


def _text_chunk(tokens: Sequence[int]) -> tinker.EncodedTextChunk:
    # The ids come from a validated chunk; validating them again would take longer than everything
    # else here.
    import tinker

    return tinker.EncodedTextChunk.model_construct(tokens=list(tokens))
