"""Metrics of trajectories, and the evaluator on held-out tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.completers import TinkerTokenCompleter, TokenCompleter
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import AllTrajectoriesFailedError
from tinker_cookbook.rl.rollout_limits import RolloutConfig
from tinker_cookbook.rl.rollout_logging import (
    RolloutSummaryExportConfig,
    RolloutSummaryGroup,
    extends,
)
from tinker_cookbook.rl.rollout_strategy import RetryOnFailure, RolloutStrategy, gather_or_cancel
from tinker_cookbook.rl.rollouts import RolloutErrorCounter, RolloutSettings, rollout_group
from tinker_cookbook.rl.types import (
    STOP_METRIC_PREFIX,
    EnvGroupBuilder,
    Metrics,
    RLDataset,
    Trajectory,
    TrajectoryGroup,
)
from tinker_cookbook.utils.misc_utils import all_same, dict_mean

if TYPE_CHECKING:
    import tinker

__all__ = [
    "RLTestSetEvaluator",
    "compute_trajectory_metrics",
    "dataset_to_env_group_builders",
]


def compute_trajectory_metrics(
    trajectory_groups_P: list[TrajectoryGroup], taglist_P: list[list[str]]
) -> dict[str, float]:
    """Average rewards, tokens, turns and the metrics of the environments.

    Args:
        trajectory_groups_P: All groups of a batch, including those with equal rewards.
        taglist_P: The tags of each group.

    Returns:
        `env/all/<name>`, and `env/<tag>/<name>` if the groups have different tags.
    """
    tags = {tag for tags in taglist_P for tag in tags}
    metrics = _prefixed("env/all", _compute_metrics(trajectory_groups_P))
    if all_same([sorted(tags) for tags in taglist_P]):
        return metrics
    for tag in sorted(tags):
        tagged = [
            group
            for group, group_tags in zip(trajectory_groups_P, taglist_P, strict=True)
            if tag in group_tags
        ]
        metrics |= _prefixed(f"env/{tag}", _compute_metrics(tagged))
    return metrics


def dataset_to_env_group_builders(dataset: RLDataset) -> list[EnvGroupBuilder]:
    """Return the groups of all batches."""
    return [builder for index in range(len(dataset)) for builder in dataset.get_batch(index)]


class RLTestSetEvaluator(SamplingClientEvaluator):
    """Rolls out held-out tasks with the current weights.

    `last_result` holds the groups of the last call.
    """

    def __init__(
        self,
        dataset: RLDataset,
        max_tokens: int,
        name: str = "test",
        num_groups_to_log: int = 4,
        strategy: RolloutStrategy | None = None,
        *,
        temperature: float = 1.0,
        config: RolloutConfig | None = None,
        seed: int | None = 0,
        context_window: int | None = None,
    ) -> None:
        """Set the tasks and how they are rolled out.

        Args:
            dataset: Held-out tasks; all batches are used.
            max_tokens: Maximum tokens per reply.
            name: Prefix of the metrics.
            num_groups_to_log: Number of groups on the transcript page.
            strategy: What happens when rollouts fail; None: `RetryOnFailure`.
            temperature: Sampling temperature; 0 is greedy.
            config: Limits of each episode.
            seed: Seed of all draws. With a seed, evaluations differ only by the weights; None:
                new draws at every evaluation.
            context_window: Maximum tokens of prompt and reply together; None: unknown.
        """
        self.env_group_builders_P = dataset_to_env_group_builders(dataset)
        self.max_tokens = max_tokens
        self.name = name
        self.num_groups_to_log = num_groups_to_log
        self.temperature = temperature
        self.seed = seed
        self.context_window = context_window
        self.last_result: list[TrajectoryGroup] = []
        self._settings = RolloutSettings(strategy or RetryOnFailure(), config or RolloutConfig())

    async def eval_token_completer(
        self,
        policy: TokenCompleter,
        *,
        rollout_summary_export: RolloutSummaryExportConfig | None = None,
    ) -> dict[str, float]:
        """Roll out all tasks.

        Args:
            policy: Samples the replies.
            rollout_summary_export: Where to write the transcripts; None: do not write them.

        Returns:
            `<name>/env/all/<metric>`, including `reward/stderr`, the standard error of the mean
            reward over tasks.

        Raises:
            AllTrajectoriesFailedError: if no task could be rolled out.
        """
        groups_P = await gather_or_cancel(
            rollout_group(builder, policy.for_rollout(self.name, index), self._settings)
            for index, builder in enumerate(self.env_group_builders_P)
        )
        self.last_result = groups_P
        if rollout_summary_export is not None:
            self._export(rollout_summary_export, groups_P)
        done = [
            (group, builder.logging_tags())
            for group, builder in zip(groups_P, self.env_group_builders_P, strict=True)
            if group.trajectories_G
        ]
        if not done:
            errors = [error.error_message for group in groups_P for error in group.rollout_errors]
            raise AllTrajectoriesFailedError(
                f"none of the {len(groups_P)} held-out tasks could be rolled out; last error: "
                f"{errors[-1] if errors else 'the data set is empty'}"
            )
        metrics = compute_trajectory_metrics(
            [group for group, _ in done], [tags for _, tags in done]
        )
        if len(done) > 1:
            metrics["env/all/reward/stderr"] = _standard_error([group for group, _ in done])
        counter = RolloutErrorCounter()
        for group in groups_P:
            counter.ingest(group)
        return _prefixed(self.name, metrics | counter.get_metrics())

    async def __call__(
        self,
        sampling_client: tinker.SamplingClient,
        *,
        rollout_summary_export: RolloutSummaryExportConfig | None = None,
    ) -> dict[str, float]:
        """Roll out all tasks with the weights of a sampling client."""
        policy = TinkerTokenCompleter(
            sampling_client,
            self.max_tokens,
            self.temperature,
            self.context_window,
            seed=self.seed,
        )
        return await self.eval_token_completer(
            policy, rollout_summary_export=rollout_summary_export
        )

    def _export(
        self, export: RolloutSummaryExportConfig, groups_P: Sequence[TrajectoryGroup]
    ) -> None:
        from tinker_cookbook.rl.transcripts.page import write_transcripts

        write_transcripts(
            export,
            [
                RolloutSummaryGroup(group, builder.logging_tags(), export.sampling_client_step)
                for group, builder in zip(groups_P, self.env_group_builders_P, strict=True)
            ],
            num_groups_on_page=self.num_groups_to_log,
        )


def _compute_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories_G]
    if not trajectories:
        return {}
    rewards = [reward for group in groups for reward in group.get_total_rewards()]
    return (
        _env_metrics(groups)
        | _count_tokens(trajectories)
        | _by_group(groups)
        | {
            "reward/total": float(np.mean(rewards)),
            "total_episodes": len(trajectories),
        }
    )


def _env_metrics(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Average each metric over the turns that have it, and stop reasons over all trajectories."""
    reported: list[Metrics] = []
    stops: list[Metrics] = []
    for group in groups:
        reported += group.metrics_G
        for trajectory in group.trajectories_G:
            reported += [_without_stops(turn.metrics) for turn in trajectory.transitions]
            stops.append(_only_stops(trajectory))
    names = {name for found in stops for name in found}
    return dict_mean(reported) | dict_mean([dict.fromkeys(names, 0) | found for found in stops])


def _without_stops(metrics: Metrics) -> Metrics:
    return {k: v for k, v in metrics.items() if not k.startswith(STOP_METRIC_PREFIX)}


def _only_stops(trajectory: Trajectory) -> Metrics:
    return {
        key: value
        for turn in trajectory.transitions
        for key, value in turn.metrics.items()
        if key.startswith(STOP_METRIC_PREFIX)
    }


def _count_tokens(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    turns = [
        transition
        for trajectory in trajectories
        for transition in trajectory.transitions
        if transition.ob.length
    ]
    action_tokens = sum(len(turn.ac.tokens) for turn in turns)
    observation_tokens = sum(turn.ob.length for turn in turns)
    num_turns = max(len(turns), 1)
    return {
        "ac_tokens_per_turn": action_tokens / num_turns,
        "ob_tokens_per_turn": observation_tokens / num_turns,
        "turns_per_episode": len(turns) / len(trajectories),
        "total_turns": len(turns),
        "total_ac_tokens": action_tokens,
        "total_ob_tokens": observation_tokens,
        "total_cached_ob_tokens": sum(turn.ac.prompt_cache_hit_tokens for turn in turns),
        "prefix_breaks": sum(map(_count_prefix_breaks, trajectories)),
    }


def _count_prefix_breaks(trajectory: Trajectory) -> int:
    """Count turns whose prompt does not extend what came before; each is a separate datum."""
    return sum(
        not extends(after, before) for before, after in itertools.pairwise(trajectory.transitions)
    )


def _by_group(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Return the share of groups with different rewards, which alone give a gradient."""
    counts = {"frac_mixed": 0, "frac_all_good": 0, "frac_all_bad": 0}
    filled = [group for group in groups if group.trajectories_G]
    for group in filled:
        rewards = group.get_total_rewards()
        if not all_same(rewards):
            counts["frac_mixed"] += 1
        elif rewards[0] >= 0.5:
            counts["frac_all_good"] += 1
        else:
            counts["frac_all_bad"] += 1
    return {f"by_group/{key}": count / len(filled) for key, count in counts.items()}


def _standard_error(groups: Sequence[TrajectoryGroup]) -> float:
    """Return the standard error of the mean over groups, not samples.

    Samples of one task are not independent of each other.
    """
    means = [float(np.mean(group.get_total_rewards())) for group in groups]
    return float(np.std(means, ddof=1) / math.sqrt(len(means)))


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{key}": value for key, value in metrics.items()}
