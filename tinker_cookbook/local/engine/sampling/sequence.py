"""State of sampling requests while they are served, and the checks they pass first. No torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tinker_cookbook.local.engine.csr import check_csr
from tinker_cookbook.local.engine.sampling.draw import fresh_seed
from tinker_cookbook.local.engine.sampling.speculation import Drafter
from tinker_cookbook.local.engine.sampling.stops import StopRule
from tinker_cookbook.local.engine.types import (
    ImageInput,
    ModelInfo,
    SampledSequence,
    SampleResult,
    SampleSpec,
    SparseRows,
    TokenLogprobs,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import SAMPLING, check_ranges

__all__ = ["OnToken", "Request", "Sequence", "check_sample_spec", "place_images"]

OnToken = Callable[..., None]
"""Called with (sequence index, token, logprob) for every sampled token, in the engine thread.

If top-k logprobs were asked for, a fourth argument holds them: (ids int32 [k], logprobs [k]).
"""

_MAX_TOPK_CELLS = 2**26


class Sequence:
    """One completion while it grows."""

    __slots__ = (
        "drafter",
        "index",
        "logprobs",
        "matcher",
        "request",
        "row",
        "stop_reason",
        "tokens",
        "topk_ids",
        "topk_logprobs",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.topk_ids: list[np.ndarray] = []
        self.topk_logprobs: list[np.ndarray] = []
        self.matcher = request.stop_rule.matcher()
        self.stop_reason: str | None = None
        self.row: Any = None
        """Where its keys and values are; None while it has none."""
        self.drafter: Drafter | None = None
        """Guesses at what follows, if that was tried."""

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values the next decode step needs: all but the newest."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def cached_tokens(self) -> np.ndarray:
        """Return the tokens behind `num_cached`."""
        generated = np.asarray(self.tokens[:-1], np.int32)
        return np.concatenate([self.request.prompt, generated])

    def all_tokens(self) -> list[int]:
        """Prompt and completion."""
        return [*self.request.prompt.tolist(), *self.tokens]

    def append(self, token: int, logprob: float) -> None:
        """Take a drawn token; sets `stop_reason` if it is the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.matcher.ends_at(token):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.request.max_new:
            self.stop_reason = "length"
        if self.request.on_token is not None:
            topk = [(self.topk_ids[-1], self.topk_logprobs[-1])] if self.topk_ids else []
            self.request.on_token(self.index, token, logprob, *topk)

    def result(self) -> SampledSequence:
        """Return what the client gets."""
        topk = None
        if self.request.spec.topk_sample_logprobs:
            topk = TokenLogprobs(np.stack(self.topk_ids), np.stack(self.topk_logprobs))
        return SampledSequence(
            tokens=np.asarray(self.tokens, np.int32),
            logprobs=np.asarray(self.logprobs, np.float32),
            stop_reason="stop" if self.stop_reason == "stop" else "length",
            topk_logprobs=topk,
        )


@dataclass(eq=False)
class Request:
    """One sampling request and its completions."""

    spec: SampleSpec
    adapter: Any
    """The weights it samples from, fixed when it was accepted; None is the base model."""
    future: Future[SampleResult]
    stop_rule: StopRule
    max_new: int
    on_token: OnToken | None = None
    seed: int = 0
    client: str = ""
    """Whose it is: clients share the machine."""
    prompt: np.ndarray = field(init=False)
    """int32 [P]."""
    prompt_scores: Any = None
    """Collects what was asked about the prompt; None if nothing was."""
    waiting: list[Sequence] = field(default_factory=list)
    """Completions that have no first token yet."""
    unfinished: int = 0
    finished: list[SampledSequence | None] = field(default_factory=list)
    cache_hit_tokens: int = 0

    def __post_init__(self) -> None:
        self.prompt = np.ascontiguousarray(self.spec.prompt, np.int32)
        seed = self.spec.seed
        self.seed = fresh_seed() if seed is None else int(seed) & 0xFFFF_FFFF_FFFF_FFFF
        self.waiting = [Sequence(self, index) for index in range(self.spec.num_samples)]
        self.unfinished = self.spec.num_samples
        self.finished = [None] * self.spec.num_samples

    @property
    def end_of_images(self) -> int:
        """Where the last image of the prompt ends; they are prefilled in one piece."""
        return max((i.position + (i.expected_tokens or 0) for i in self.spec.images), default=0)

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs over the prompt are wanted."""
        spec = self.spec
        return bool(
            spec.prompt_logprobs
            or spec.topk_prompt_logprobs
            or spec.prompt_alt_tokens_k
            or spec.target_prompt_logprobs is not None
        )

    def finish(self, sequence: Sequence) -> bool:
        """Record a completion; return whether it was the last one."""
        self.finished[sequence.index] = sequence.result()
        self.unfinished -= 1
        return self.unfinished == 0

    def result(self) -> SampleResult:
        """Return the whole answer; every completion is finished."""
        sequences = [sequence for sequence in self.finished if sequence is not None]
        result = SampleResult(sequences, prompt_cache_hit_tokens=self.cache_hit_tokens)
        if self.prompt_scores is not None:
            self.prompt_scores.fill(result)
        if result.prompt_logprobs is not None:
            for image in self.spec.images:  # no token stands there that could have a probability
                end = image.position + (image.expected_tokens or 0)
                result.prompt_logprobs[image.position : end] = np.nan
        return result


def place_images(spec: SampleSpec, count_tokens: Callable[[ImageInput, str], int]) -> SampleSpec:
    """The request with every image checked, and room made for those that do not say their length.

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
    # One token needs no place of its own: it is drawn from the prompt's last position.
    if spec.max_tokens > max(room, 1):
        raise UserError(
            f"max_tokens={spec.max_tokens} and a prompt of {len(spec.prompt)} tokens exceed the "
            f"context length {info.max_context_length} of {info.name}; "
            f"use max_tokens={room} or less, or a shorter prompt"
        )
    return spec.max_tokens


def _check_answer_size(spec: SampleSpec, max_new: int) -> None:
    """A few bytes may ask for the most likely tokens at many places."""
    of_prompt = max(spec.topk_prompt_logprobs, spec.prompt_alt_tokens_k) * len(spec.prompt)
    of_samples = spec.topk_sample_logprobs * spec.num_samples * max_new
    for name, cells in (("topk_prompt_logprobs", of_prompt), ("topk_sample_logprobs", of_samples)):
        if cells > _MAX_TOPK_CELLS:
            raise UserError(
                f"{name} asks for {cells} logprobs in one answer; at most {_MAX_TOPK_CELLS} are "
                "given. Use fewer of them, fewer samples or a smaller max_tokens"
            )


def _check_prompt(spec: SampleSpec, info: ModelInfo) -> None:
    prompt = np.asarray(spec.prompt)
    if prompt.ndim != 1 or len(prompt) == 0:
        raise UserError("prompt has no tokens; give at least one, for example the first of a text")
    if spec.images and not info.supports_images:
        raise UserError(
            f"prompt has {len(spec.images)} images; {info.name} reads text only. "
            "Use a model with vision or leave the images out"
        )
    limit = info.max_context_length
    needs_room = spec.max_tokens is None or spec.max_tokens > 1
    if len(prompt) > limit - needs_room:
        raise UserError(
            f"prompt has {len(prompt)} tokens; {info.name} has a context length of {limit}, prompt "
            "and completion together. Shorten the prompt"
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
                f"prompt_logprobs_last_n={last_n} needs prompt_logprobs; ask for them too"
            )
        if not 1 <= last_n <= max(len(spec.prompt) - 1, 1):
            raise UserError(
                f"prompt_logprobs_last_n={last_n}; 1 to {len(spec.prompt) - 1} are accepted for a "
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
