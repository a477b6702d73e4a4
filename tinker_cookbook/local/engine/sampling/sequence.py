"""Sampling requests, their sequences, and the status of each sequence."""

from __future__ import annotations

import enum
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from tinker_cookbook.local.engine.sampling.prefix_index import hash_beginnings
from tinker_cookbook.local.engine.sampling.random_numbers import fresh_seed, hash_streams
from tinker_cookbook.local.engine.types import (
    OnToken,
    SampledSequence,
    SampleResult,
    SampleSpec,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.sampling.adapters import StackedLora
    from tinker_cookbook.local.engine.sampling.batch import CacheRow
    from tinker_cookbook.local.engine.sampling.prompt_scores import PromptScores
    from tinker_cookbook.local.engine.sampling.speculation import Drafter
    from tinker_cookbook.local.engine.sampling.stops import StopRule

__all__ = ["Request", "Sequence", "SequenceStatus"]


class SequenceStatus(enum.Enum):
    """Stage of a sequence between the queue and its end."""

    WAITING = "waiting"
    """It has no token yet: its request is in the queue, or the request's first sequence computes
    the prompt that all of them share."""
    PREFILLING = "prefilling"
    """Its tokens so far are being computed in chunks: the prompt or, after a preemption, the prompt
    and the completion."""
    DECODING = "decoding"
    """Every step computes its newest token and draws the next one."""
    SUSPENDED = "suspended"
    """It has tokens but no keys and values, and waits in the queue: it was preempted, or got its
    first token when no row was free."""
    FINISHED = "finished"
    """It ended at a stop or at its length."""
    ABORTED = "aborted"
    """Its request was cancelled or failed."""


class Sequence:
    """One completion of a request."""

    __slots__ = (
        "drafter",
        "index",
        "logprobs",
        "matcher",
        "request",
        "row",
        "rule",
        "status",
        "stop_reason",
        "tokens",
        "topk_ids",
        "topk_logprobs",
    )

    def __init__(self, request: Request, index: int) -> None:
        """`index` is the number of the completion within its request."""
        self.request = request
        self.index = index
        self.status = SequenceStatus.WAITING
        self.tokens: list[int] = []
        """Tokens of the completion, without the prompt."""
        self.logprobs: list[float] = []
        self.topk_ids: list[np.ndarray] = []
        self.topk_logprobs: list[np.ndarray] = []
        self.matcher = request.stop_rule.matcher()
        new_rule = request.spec.new_rule
        self.rule = None if new_rule is None else new_rule()
        """Changes the logits that tokens are drawn from."""
        self.stop_reason: Literal["stop", "length"] | None = None
        self.row: CacheRow | None = None
        """Where its keys and values are; None while it has none."""
        self.drafter: Drafter | None = None
        """Proposes draft tokens; created by the first step that may use them."""

    @property
    def stream(self) -> int:
        """Where its random numbers come from: the hash for `random_numbers.uniforms_at`."""
        return self.request.streams[self.index]

    @property
    def num_cached(self) -> int:
        """Number of tokens whose keys and values the next decode step reads: all but the newest.

        It is also the position of the newest token.
        """
        return len(self.request.prompt) + len(self.tokens) - 1

    def cached_tokens(self) -> np.ndarray:
        """Return the tokens that `num_cached` counts."""
        generated = np.asarray(self.tokens[:-1], np.int32)
        return np.concatenate([self.request.prompt, generated])

    def all_tokens(self) -> list[int]:
        """Return prompt and completion."""
        return [*self.request.prompt.tolist(), *self.tokens]

    def append(self, token: int, logprob: float) -> None:
        """Add a drawn token, set `stop_reason` if it is the last one, and call the listener."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.matcher.ends_at(token):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.request.max_new:
            self.stop_reason = "length"
        if self.rule is not None and self.stop_reason is None:
            self.rule.add(token)
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
    adapter: StackedLora | None
    """Weights that it samples from, fixed when it was accepted; None is the base model."""
    future: Future[SampleResult]
    stop_rule: StopRule
    max_new: int
    """Maximum tokens per completion."""
    on_token: OnToken | None = None
    seed: int = 0
    client: str = ""
    """Who sent it: clients share the machine evenly."""
    prompt: np.ndarray = field(init=False)
    """int32 [P]."""
    prompt_scores: PromptScores | None = None
    """Collects the requested logprobs over the prompt; None if none were requested."""
    waiting: list[Sequence] = field(default_factory=list)
    """Completions without a first token, in the order of their indices."""
    unfinished: int = 0
    """Number of completions that have not ended."""
    finished: list[SampledSequence | None] = field(default_factory=list)
    """Results of the completions by their indices; None for one that has not ended."""
    cache_hit_tokens: int = 0
    """Prompt tokens whose keys and values were known and not computed."""
    streams: list[int] = field(default_factory=list)
    """Hash of the seed and each completion's index, from which its random numbers come."""

    def __post_init__(self) -> None:
        self.prompt = np.ascontiguousarray(self.spec.prompt, np.int32)
        seed = self.spec.seed
        self.seed = fresh_seed() if seed is None else int(seed) & 0xFFFF_FFFF_FFFF_FFFF
        completions = np.arange(self.spec.num_samples, dtype=np.uint64)
        self.streams = hash_streams(np.uint64(self.seed), completions).tolist()
        self.waiting = [Sequence(self, index) for index in range(self.spec.num_samples)]
        self.unfinished = self.spec.num_samples
        self.finished = [None] * self.spec.num_samples

    @cached_property
    def draws_from_all(self) -> bool:
        """Whether every token of the vocabulary may be drawn: neither greedy, top-k nor top-p."""
        spec = self.spec
        return spec.temperature != 0 and spec.top_k <= 0 and spec.top_p >= 1

    @property
    def is_single_pass(self) -> bool:
        """Whether one token is drawn and nothing follows it, so that no later pass reads its keys.

        Most requests that only score a prompt are like this.
        """
        return self.max_new <= 1 and not self.spec.images

    @cached_property
    def hashes(self) -> list[int]:
        """Hashes of the prompt's beginnings; see `prefix_index`."""
        return hash_beginnings(self.adapter_key, self.prompt)

    @property
    def first_hidden(self) -> int:
        """First position of the prompt whose hidden state is needed."""
        last = len(self.prompt) - 1
        return last if self.prompt_scores is None else min(self.prompt_scores.first_hidden, last)

    @property
    def adapter_key(self) -> int:
        """Number of its weights in the prefix store; 0 is the base model."""
        return 0 if self.adapter is None else self.adapter.key

    @property
    def end_of_images(self) -> int:
        """Position after the last image; everything up to it is prefilled in one chunk."""
        return max((i.position + (i.expected_tokens or 0) for i in self.spec.images), default=0)

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs over the prompt are requested."""
        spec = self.spec
        return bool(
            spec.prompt_logprobs
            or spec.topk_prompt_logprobs
            or spec.prompt_alt_tokens_k
            or spec.target_prompt_logprobs is not None
        )

    def finish(self, sequence: Sequence) -> bool:
        """Record a completion and return whether it was the last one."""
        self.finished[sequence.index] = sequence.result()
        self.unfinished -= 1
        return self.unfinished == 0

    def result(self) -> SampleResult:
        """Return the whole answer; every completion has ended."""
        sequences = [sequence for sequence in self.finished if sequence is not None]
        result = SampleResult(sequences, prompt_cache_hit_tokens=self.cache_hit_tokens)
        if self.prompt_scores is not None:
            self.prompt_scores.fill(result)
        if result.prompt_logprobs is not None:
            for image in self.spec.images:  # the positions of an image have no token to score
                end = image.position + (image.expected_tokens or 0)
                result.prompt_logprobs[image.position : end] = np.nan
        return result
