"""The win rate of the policy's completions against given ones."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.completers import TinkerMessageCompleter
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.types import Comparison, PreferenceModel
from tinker_cookbook.renderers.content import format_content_as_string
from tinker_cookbook.renderers.types import Message

if TYPE_CHECKING:
    import tinker

__all__ = ["ComparisonEvaluator"]


class ComparisonEvaluator(SamplingClientEvaluator):
    """Samples a completion per comparison and lets a judge compare it with completion A."""

    def __init__(
        self,
        preference_model_builder: Callable[[], PreferenceModel],
        comparisons: Sequence[Comparison],
        renderer_name: str,
        model_name_for_tokenizer: str,
        both_ways: bool = True,
        max_tokens: int = 1024,
        content_preprocessor: Callable[[str], str] | None = None,
    ) -> None:
        """Keep the comparisons.

        Args:
            preference_model_builder: Builds the judge.
            comparisons: Prompts; completion A is the one that the policy is compared with.
            renderer_name: Chat format of the policy.
            model_name_for_tokenizer: The policy's base model.
            both_ways: Whether to ask twice, with A and B exchanged, so that a judge's preference
                for a place cancels out.
            max_tokens: Maximum tokens per completion.
            content_preprocessor: Function applied to the policy's text before it is judged.
        """
        if not comparisons:
            raise ConfigurationError("comparisons is empty; give at least one.")
        self.preference_model_builder = preference_model_builder
        self.comparisons = list(comparisons)
        self.renderer_name = renderer_name
        self.model_name_for_tokenizer = model_name_for_tokenizer
        self.both_ways = both_ways
        self.max_tokens = max_tokens
        self.content_preprocessor = content_preprocessor or (lambda text: text)

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return `win_rate` from 0 to 1 (a tie counts half) and `win_rate/stderr`."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name_for_tokenizer)
        policy = TinkerMessageCompleter(sampling_client, renderer, self.max_tokens)
        judge = self.preference_model_builder()
        rates = await asyncio.gather(
            *(self._win_rate(comparison, policy, judge) for comparison in self.comparisons)
        )
        metrics = {"win_rate": float(np.mean(rates))}
        if len(rates) > 1:
            metrics["win_rate/stderr"] = float(np.std(rates, ddof=1) / math.sqrt(len(rates)))
        return metrics

    async def _win_rate(
        self, comparison: Comparison, policy: TinkerMessageCompleter, judge: PreferenceModel
    ) -> float:
        reply = await policy(comparison.prompt_conversation)
        text = self.content_preprocessor(format_content_as_string(reply["content"]))
        own: list[Message] = [{"role": "assistant", "content": text}]
        shown = Comparison(comparison.prompt_conversation, comparison.completion_A, own)
        scores = [(1 + await judge(shown)) / 2]
        if self.both_ways:
            scores.append((1 - await judge(shown.swap())) / 2)
        return sum(scores) / len(scores)
