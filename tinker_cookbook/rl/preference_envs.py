"""Groups whose members a judge compares two by two; the reward is the mean verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.completers import StopCondition
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, PreferenceModel
from tinker_cookbook.renderers.content import format_content_as_string
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.length_control import LengthControl
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    Metrics,
    Observation,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
    Trajectory,
)

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "PairwisePreferenceDataset",
    "PairwisePreferenceGroupBuilder",
    "PairwisePreferenceRLDatasetBuilder",
    "PreferenceEnv",
    "TournamentPattern",
    "get_pairs",
    "get_pairs_chunked",
]


class PreferenceEnv(Env):
    """One reply to a conversation; its reward comes from the comparisons in its group."""

    def __init__(self, convo_prefix: list[Message], policy_renderer: Renderer) -> None:
        self.convo_prefix = convo_prefix
        self.policy_renderer = policy_renderer

    @property
    def stop_condition(self) -> StopCondition:
        """Return what ends the reply."""
        return self.policy_renderer.get_stop_sequences()

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """Return the conversation as a prompt."""
        prompt = self.policy_renderer.build_generation_prompt(self.convo_prefix)
        return prompt, self.stop_condition

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """End the episode without a reward."""
        import tinker

        return StepResult(0.0, True, tinker.ModelInput.empty(), self.stop_condition)


class TournamentPattern(StrEnum):
    """Which members are compared."""

    ALL_PAIRS_BOTH_WAYS = "all_pairs_both_ways"
    """Every pair in both orders, which cancels a judge's preference for a position."""
    ALL_PAIRS_ONE_WAY = "all_pairs_one_way"
    """Every pair in one order, at half the cost."""


def get_pairs(n: int, pattern: TournamentPattern) -> list[tuple[int, int]]:
    """Return all matches between `n` members as indices of A and B."""
    one_way = [(i, j) for i in range(n) for j in range(i + 1, n)]
    if pattern == TournamentPattern.ALL_PAIRS_ONE_WAY:
        return one_way
    return [match for i, j in one_way for match in ((i, j), (j, i))]


def get_pairs_chunked(n: int, pattern: TournamentPattern, chunk_size: int) -> list[tuple[int, int]]:
    """Return matches within chunks of `chunk_size` members; their number is linear in `n`.

    A single member at the end would never be judged, so it joins the chunk before it.
    """
    if chunk_size < 2:
        raise ConfigurationError(f"matchup_group_size={chunk_size} must be 2 or greater.")
    starts = list(range(0, n, chunk_size))
    if len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], n]
    return [
        (start + i, start + j)
        for start, end in zip(starts, ends, strict=True)
        for i, j in get_pairs(end - start, pattern)
    ]


@dataclass(frozen=True)
class PairwisePreferenceGroupBuilder(EnvGroupBuilder):
    """Replies to one conversation, which a judge compares two by two.

    The reward of a reply is its mean verdict, from -1 to 1, and 1 less if it is badly formed;
    `length_control` may take away more. With `eval_target_completion_A`, every reply is compared
    with that completion instead.
    """

    convo_prefix: list[Message]
    policy_renderer: Renderer
    tournament_pattern: TournamentPattern
    preference_model: PreferenceModel
    num_envs: int
    content_preprocessor: Callable[[str], str] | None = None
    matchup_group_size: int = 4
    eval_target_completion_A: list[Message] | None = None
    length_control: LengthControl | None = None

    def __post_init__(self) -> None:
        if self.num_envs < 2 and self.eval_target_completion_A is None:
            raise ConfigurationError(
                f"group_size={self.num_envs} must be 2 or greater, so that replies can be compared."
            )

    async def make_envs(self) -> Sequence[Env]:
        """Return one environment per reply."""
        return [
            PreferenceEnv(self.convo_prefix, self.policy_renderer) for _ in range(self.num_envs)
        ]

    def get_response_message(self, trajectory: Trajectory) -> tuple[list[Message], bool]:
        """Return the reply as the judge sees it, and whether it ended properly."""
        tokens = trajectory.transitions[0].ac.tokens
        message, termination = self.policy_renderer.parse_response(tokens)
        text = format_content_as_string(message["content"])
        if self.content_preprocessor is not None:
            text = self.content_preprocessor(text)
        return [{"role": "assistant", "content": text}], bool(termination.is_clean)

    def comparison_reward_for_second_messages(
        self, message_i: list[Message], message_j: list[Message]
    ) -> Comparison:
        """Return the question to the judge: reply i as A, reply j as B."""
        return Comparison(self.convo_prefix, message_i, message_j)

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """Judge all matches at once; a member without a match, since others were lost, gets 0."""
        found = [self.get_response_message(trajectory) for trajectory in trajectory_group]
        replies_G = [message for message, _ in found]
        if self.eval_target_completion_A is not None:
            means_G = await self._against_target(replies_G)
        else:
            means_G = await self._tournament(replies_G)
        lengths_G = np.array([len(t.transitions[0].ac.tokens) for t in trajectory_group], float)
        control = self.length_control
        adjusted_G = control.adjustments(means_G, lengths_G) if control else np.zeros(len(found))
        return [
            (
                float(mean + adjusted + (valid - 1.0)),
                {
                    "win_minus_loss": float(mean),
                    "format": float(valid),
                    "length_adjustment": float(adjusted),
                },
            )
            for mean, adjusted, (_, valid) in zip(means_G, adjusted_G, found, strict=True)
        ]

    def logging_tags(self) -> list[str]:
        """Return the tag of all such groups."""
        return ["pair_pref"]

    async def _tournament(self, replies_G: list[list[Message]]) -> np.ndarray:
        num_members = len(replies_G)
        matches = get_pairs_chunked(num_members, self.tournament_pattern, self.matchup_group_size)
        verdicts = await asyncio.gather(
            *(self._judge(replies_G[i], replies_G[j]) for i, j in matches)
        )
        sums, counts = np.zeros(num_members), np.zeros(num_members)
        for (i, j), verdict in zip(matches, verdicts, strict=True):
            sums[i] -= verdict
            sums[j] += verdict
            counts[[i, j]] += 1
        return sums / np.maximum(counts, 1)

    async def _against_target(self, replies_G: list[list[Message]]) -> np.ndarray:
        target = self.eval_target_completion_A
        assert target is not None, "the caller has checked"
        first, second = await asyncio.gather(
            asyncio.gather(*(self._judge(target, reply) for reply in replies_G)),
            asyncio.gather(*(self._judge(reply, target) for reply in replies_G)),
        )
        return (np.array(first) - np.array(second)) / 2

    async def _judge(self, message_i: list[Message], message_j: list[Message]) -> float:
        """Return -1 for a verdict for the first message, 1 for the second."""
        comparison = self.comparison_reward_for_second_messages(message_i, message_j)
        return await self.preference_model(comparison)


class PairwisePreferenceDataset(RLDataset):
    """The prompts of comparisons in batches; the completions are not used."""

    def __init__(
        self,
        comparison_builder: ComparisonDatasetBuilder,
        renderer: Renderer,
        batch_size: int,
        preference_model: PreferenceModel,
        tournament_pattern: TournamentPattern = TournamentPattern.ALL_PAIRS_BOTH_WAYS,
        group_size: int = 4,
        content_preprocessor: Callable[[str], str] | None = None,
        length_control: LengthControl | None = None,
    ) -> None:
        trained, _ = comparison_builder.get_labeled_comparisons()
        self._prompts = [labeled.comparison.prompt_conversation for labeled in trained]
        if len(self._prompts) < batch_size:
            raise ConfigurationError(
                f"batch_size={batch_size} is more than the {len(self._prompts)} comparisons; use a "
                "smaller one."
            )
        self._renderer = renderer
        self._batch_size = batch_size
        self._preference_model = preference_model
        self._pattern = tournament_pattern
        self._group_size = group_size
        self._preprocessor = content_preprocessor
        self._length_control = length_control

    def get_batch(self, index: int) -> list[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self._batch_size
        return [
            PairwisePreferenceGroupBuilder(
                convo_prefix=prompt,
                policy_renderer=self._renderer,
                tournament_pattern=self._pattern,
                preference_model=self._preference_model,
                num_envs=self._group_size,
                content_preprocessor=self._preprocessor,
                length_control=self._length_control,
            )
            for prompt in self._prompts[start : start + self._batch_size]
        ]

    def __len__(self) -> int:
        return len(self._prompts) // self._batch_size


@chz.chz
class PairwisePreferenceRLDatasetBuilder(RLDatasetBuilder):
    """Makes a `PairwisePreferenceDataset` and its judge."""

    comparison_builder: ComparisonDatasetBuilder
    batch_size: int
    policy_renderer_name: str
    policy_model_name: str
    tournament_pattern: TournamentPattern = TournamentPattern.ALL_PAIRS_BOTH_WAYS
    group_size: int
    content_preprocessor: Callable[[str], str] | None = None
    preference_model_builder: Callable[[], PreferenceModel]
    length_control: LengthControl | None = None

    async def __call__(self) -> tuple[PairwisePreferenceDataset, None]:
        """Return the data set; nothing is held out, so measure with `ComparisonEvaluator`."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.policy_renderer_name, self.policy_model_name)
        dataset = PairwisePreferenceDataset(
            self.comparison_builder,
            renderer,
            self.batch_size,
            await asyncio.to_thread(self.preference_model_builder),
            self.tournament_pattern,
            self.group_size,
            self.content_preprocessor,
            self.length_control,
        )
        return dataset, None
