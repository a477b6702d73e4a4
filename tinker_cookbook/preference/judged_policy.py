"""What a policy gains by training against a judge: the judge's opinion, and the truth where a rule
knows it.

The two curves together show reward hacking: the judge's win rate rises while the rule falls.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.sampled_comparisons import SampledReply, sample_replies
from tinker_cookbook.preference.types import Comparison, PreferenceModel, connect_to_weights
from tinker_cookbook.renderers.types import Message

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["JudgedPolicyEvaluator", "JudgedPolicyEvaluatorBuilder", "Rule"]

Rule = Callable[[list[Message], SampledReply], float]
"""Grades a reply without a model: `rule(conversation, reply)`."""


class JudgedPolicyEvaluator(SamplingClientEvaluator):
    """Samples replies to held-out prompts and compares them with fixed replies."""

    def __init__(
        self,
        prompts: list[list[Message]],
        renderer: Renderer,
        judge: PreferenceModel,
        opponent: tinker.SamplingClient,
        *,
        rule: Rule | None = None,
        samples: int = 2,
        max_tokens: int = 64,
        seed: int = 7,
    ) -> None:
        """Keep the parts.

        Args:
            prompts: Held-out conversations.
            renderer: Chat format of the policy and of the opponent.
            judge: Compares the replies.
            opponent: Weights whose replies the policy is compared with.
            rule: Grades a reply without a model.
            samples: Replies to each conversation.
            max_tokens: Maximum tokens of a reply.
            seed: Decides the draws, which are the same at every evaluation.
        """
        self._prompts = prompts
        self._renderer = renderer
        self._judge = judge
        self._opponent = opponent
        self._rule = rule
        self._samples = samples
        self._max_tokens = max_tokens
        self._seed = seed
        self._opponent_replies: list[list[SampledReply]] | None = None

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the win rate, the rule's grade, and lengths, with standard errors over prompts."""
        if self._opponent_replies is None:
            self._opponent_replies = await self._sample(self._opponent, self._seed + 1)
        replies = await self._sample(sampling_client, self._seed)
        verdicts = await asyncio.gather(
            *(
                self._win_rate(prompt, own.text, other.text)
                for prompt, found, fixed in zip(
                    self._prompts, replies, self._opponent_replies, strict=True
                )
                for own, other in zip(found, fixed, strict=True)
            )
        )
        rates = np.reshape(verdicts, (len(replies), self._samples)).mean(axis=1)
        metrics = _with_stderr("test/judge_win_rate", rates)
        if self._rule is not None:
            rule = self._rule
            grades = [
                np.mean([rule(prompt, reply) for reply in found])
                for prompt, found in zip(self._prompts, replies, strict=True)
            ]
            metrics |= _with_stderr("test/rule_reward", np.array(grades))
        every = [reply for found in replies for reply in found]
        metrics["test/reply_tokens"] = float(np.mean([reply.num_tokens for reply in every]))
        metrics["test/ended"] = float(np.mean([reply.has_ended for reply in every]))
        return metrics

    async def _sample(self, client: tinker.SamplingClient, seed: int) -> list[list[SampledReply]]:
        return await sample_replies(
            client,
            self._renderer,
            self._prompts,
            self._samples,
            max_tokens=self._max_tokens,
            seed=seed,
        )

    async def _win_rate(self, prompt: list[Message], own: str, other: str) -> float:
        comparison = Comparison(prompt, _reply(other), _reply(own))
        return (1 + await self._judge(comparison)) / 2


@chz.chz
class JudgedPolicyEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    model_name: str
    renderer_name: str
    comparison_builder: ComparisonDatasetBuilder
    """Its held-out prompts are answered."""
    preference_model_builder: Callable[[], PreferenceModel]
    opponent_path: str | None
    """Sampler weights of the opponent; None: the base model."""
    base_url: str | None = None
    rule: Rule | None = None
    num_prompts: int = 32
    samples: int = 2
    max_tokens: int = 64

    def __call__(self) -> JudgedPolicyEvaluator:
        from tinker_cookbook.renderers import load_renderer

        _, held_out = self.comparison_builder.get_labeled_comparisons()
        prompts = [one.comparison.prompt_conversation for one in held_out or []]
        return JudgedPolicyEvaluator(
            prompts[: self.num_prompts],
            load_renderer(self.renderer_name, self.model_name),
            self.preference_model_builder(),
            connect_to_weights(self.opponent_path, self.base_url, self.model_name),
            rule=self.rule,
            samples=self.samples,
            max_tokens=self.max_tokens,
        )


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _with_stderr(name: str, values: np.ndarray) -> dict[str, float]:
    metrics = {name: float(values.mean())}
    if len(values) > 1:
        metrics[f"{name}/stderr"] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return metrics
