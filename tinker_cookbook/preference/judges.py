"""Judges that are trained on comparisons and read from the probabilities of their labels.

`PairwiseJudge` sees both completions and answers A, B or Tie. `PointwiseJudge` sees one completion
and answers Yes or No; its score is a reward. Neither samples, and a judge's verdict is a number
between -1 and 1 instead of one of three words.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import chz
import numpy as np

from tinker_cookbook.preference.label_logprobs import find_label_tokens, read_label_logprobs
from tinker_cookbook.preference.types import (
    Comparison,
    ComparisonRendererFromChatRenderer,
    PreferenceModel,
    PreferenceModelBuilder,
    connect_to_weights,
)
from tinker_cookbook.renderers.types import Message

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "JudgeBuilder",
    "JudgeKind",
    "PairwiseJudge",
    "PointwiseJudge",
    "build_judge",
    "pointwise_messages",
]

JudgeKind = Literal["pairwise", "pointwise"]
PAIR_LABELS = ("A", "B", "Tie")
POINT_LABELS = ("Yes", "No")
QUESTION = "==== Is this a good reply? Yes or No ===="
MAX_REMEMBERED = 4096
"""Scores that a pointwise judge keeps, so that a reply in several matches is scored once."""


class PairwiseJudge(PreferenceModel):
    """A judge trained on `ComparisonRendererFromChatRenderer`, asked in both orders."""

    def __init__(self, renderer: Renderer, sampling_client: tinker.SamplingClient) -> None:
        self.comparison_renderer = ComparisonRendererFromChatRenderer(renderer)
        self.sampling_client = sampling_client
        self._tokens = find_label_tokens(renderer, PAIR_LABELS)

    async def __call__(self, comparison: Comparison) -> float:
        """Return the mean verdict of both orders; exchanging A and B changes only its sign."""
        first, second = await asyncio.gather(
            self.verdict(comparison), self.verdict(comparison.swap())
        )
        return (first - second) / 2

    async def verdict(self, comparison: Comparison) -> float:
        """Return P(B) - P(A) in the given order alone: one prefill."""
        prompt = self.comparison_renderer.build_generation_prompt(comparison)
        logprobs = await read_label_logprobs(self.sampling_client, prompt, self._tokens)
        a, b, _ = np.exp(logprobs)
        return float(b - a)


class PointwiseJudge(PreferenceModel):
    """A reward model: the score of one completion is log P(Yes) - log P(No).

    A comparison needs the scores of its two completions. Scores are remembered, so a tournament
    between G replies needs G prefills.
    """

    def __init__(self, renderer: Renderer, sampling_client: tinker.SamplingClient) -> None:
        self.renderer = renderer
        self.sampling_client = sampling_client
        self.num_scored = 0
        """Completions that the service has scored for this object."""
        self._tokens = find_label_tokens(renderer, POINT_LABELS)
        self._scores: dict[str, asyncio.Task[float]] = {}

    async def __call__(self, comparison: Comparison) -> float:
        """Return 2 sigmoid(score of B - score of A) - 1."""
        prompt = comparison.prompt_conversation
        a, b = await asyncio.gather(
            self.score(prompt, comparison.completion_A), self.score(prompt, comparison.completion_B)
        )
        return float(np.tanh((b - a) / 2))

    async def score(self, prompt: Sequence[Message], completion: Sequence[Message]) -> float:
        """Return the reward of a completion, in nats; higher is better."""
        messages = pointwise_messages(prompt, completion)
        key = json.dumps(messages, default=str)
        task = self._scores.get(key)
        if task is None or _has_failed(task):
            task = asyncio.create_task(self._score(messages))
            self._scores[key] = task
            while len(self._scores) > MAX_REMEMBERED:
                del self._scores[next(iter(self._scores))]
        # Another match may await the same score, so a cancelled match does not cancel it.
        return await asyncio.shield(task)

    async def _score(self, messages: list[Message]) -> float:
        prompt = self.renderer.build_generation_prompt(messages)
        yes, no = await read_label_logprobs(self.sampling_client, prompt, self._tokens)
        self.num_scored += 1
        return float(yes - no)


def _has_failed(task: asyncio.Task[float]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def pointwise_messages(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """Return the chat that a pointwise judge answers with Yes or No."""
    return [*prompt, *completion, {"role": "system", "content": QUESTION}]


def build_judge(
    kind: JudgeKind, renderer: Renderer, sampling_client: tinker.SamplingClient
) -> PairwiseJudge | PointwiseJudge:
    """Return a judge of a kind."""
    judge = PairwiseJudge if kind == "pairwise" else PointwiseJudge
    return judge(renderer, sampling_client)


@chz.chz
class JudgeBuilder(PreferenceModelBuilder):
    """Builds a judge from saved weights."""

    kind: JudgeKind = "pairwise"
    renderer_name: str
    model_name: str
    rm_weights_path: str
    base_url: str | None = None

    def __call__(self) -> PairwiseJudge | PointwiseJudge:
        """Return the judge, on `base_url` or on the service that the run uses."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        client = connect_to_weights(self.rm_weights_path, self.base_url)
        return build_judge(self.kind, renderer, client)
