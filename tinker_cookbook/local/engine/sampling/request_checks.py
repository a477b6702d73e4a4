"""Checks of a sampling request before it is queued. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tinker_cookbook.local.engine.csr import check_csr
from tinker_cookbook.local.engine.types import ImageInput, ModelInfo, SampleSpec, SparseRows
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import SAMPLING, check_ranges

__all__ = ["check_sample_spec", "place_images"]

_MAX_TOPK_CELLS = 2**26
"""Maximum logprobs per answer, over all positions: a request of a few bytes may ask for many."""


def place_images(spec: SampleSpec, count_tokens: Callable[[ImageInput, str], int]) -> SampleSpec:
    """Check every image and return the request with each image's tokens in its prompt.

    An image that does not state its length gets as many tokens 0 inserted as the model computes.

    Raises:
        UserError: from `count_tokens`, naming the image.
    """
    prompt, shift = np.asarray(spec.prompt, np.int32), 0
    images = []
    for number, image in enumerate(spec.images):
        count = count_tokens(image, f"image {number} of the prompt")
        position = image.position + shift
        if image.expected_tokens is None:
            prompt = np.insert(prompt, position, np.zeros(count, np.int32))
            shift += count
        images.append(replace(image, position=position, expected_tokens=count))
    return replace(spec, prompt=prompt, images=tuple(images))


def check_sample_spec(spec: SampleSpec, info: ModelInfo) -> int:
    """Check a request against the model and return how many tokens a completion may have.

    Raises:
        UserError: naming the field, its value and what is accepted.
    """
    _check_prompt(spec, info)
    check_ranges(spec, SAMPLING)
    _check_prompt_scores(spec, info)
    max_new = _max_new_tokens(spec, info)
    _check_answer_size(spec, max_new)
    return max_new


def _max_new_tokens(spec: SampleSpec, info: ModelInfo) -> int:
    room = info.max_context_length - len(spec.prompt)
    if spec.max_tokens is None:
        return room
    # the first token is drawn from the prompt's last position, so it fits after any prompt
    if spec.max_tokens > max(room, 1):
        raise UserError(
            f"max_tokens={spec.max_tokens} and a prompt of {len(spec.prompt)} tokens exceed the "
            f"context length {info.max_context_length} of {info.name}; "
            f"use max_tokens={room} or less, or a shorter prompt"
        )
    return spec.max_tokens


def _check_answer_size(spec: SampleSpec, max_new: int) -> None:
    of_prompt = max(spec.topk_prompt_logprobs, spec.prompt_alt_tokens_k) * len(spec.prompt)
    of_samples = spec.topk_sample_logprobs * spec.num_samples * max_new
    for name, cells in (("topk_prompt_logprobs", of_prompt), ("topk_sample_logprobs", of_samples)):
        if cells > _MAX_TOPK_CELLS:
            raise UserError(
                f"{name} asks for {cells} logprobs in one answer; the maximum is "
                f"{_MAX_TOPK_CELLS}. Use a smaller {name}, fewer samples or a smaller max_tokens"
            )


def _check_prompt(spec: SampleSpec, info: ModelInfo) -> None:
    prompt = np.asarray(spec.prompt)
    if prompt.ndim != 1 or len(prompt) == 0:
        raise UserError("prompt has no tokens; it needs at least one")
    if spec.images and not info.supports_images:
        raise UserError(
            f"prompt has {len(spec.images)} images; {info.name} reads text only. "
            "Use a vision model or leave the images out"
        )
    limit = info.max_context_length
    needs_room = spec.max_tokens is None or spec.max_tokens > 1
    if len(prompt) > limit - needs_room:
        raise UserError(
            f"prompt has {len(prompt)} tokens; {info.name} has a context length of {limit} for "
            "prompt and completion together. Shorten the prompt"
        )
    lowest, highest = int(prompt.min()), int(prompt.max())
    if lowest < 0 or highest >= info.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise UserError(
            f"prompt token {bad} is not in the vocabulary; ids of {info.name} are 0 to "
            f"{info.vocab_size - 1}. Was the prompt encoded with another tokenizer?"
        )


def _check_prompt_scores(spec: SampleSpec, info: ModelInfo) -> None:
    last_n = spec.prompt_logprobs_last_n
    if last_n is not None:
        if not (spec.prompt_logprobs or spec.topk_prompt_logprobs):
            raise UserError(
                f"prompt_logprobs_last_n={last_n} needs prompt_logprobs; request them too"
            )
        if not 1 <= last_n <= max(len(spec.prompt) - 1, 1):
            raise UserError(
                f"prompt_logprobs_last_n={last_n} must be 1 to {len(spec.prompt) - 1} for a "
                f"prompt of {len(spec.prompt)} tokens"
            )
    targets = spec.target_prompt_logprobs
    if targets is None:
        return
    rows = len(spec.prompt) - 1
    shape = tuple(targets.shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] < 1:
        raise UserError(
            f"target_prompt_logprobs has shape {list(shape)}; a prompt of {len(spec.prompt)} "
            f"tokens needs [{rows}, K]: row i is scored at prompt position i + 1"
        )
    values = np.asarray(targets.values if isinstance(targets, SparseRows) else targets)
    if values.size and (values.min() < -1 or values.max() >= info.vocab_size):
        bad = int(values.min()) if values.min() < -1 else int(values.max())
        raise UserError(
            f"target_prompt_logprobs holds {bad}; use token ids 0 to {info.vocab_size - 1}, "
            "or -1 for an empty cell"
        )
    if isinstance(targets, SparseRows):
        check_csr(targets, "target_prompt_logprobs")
