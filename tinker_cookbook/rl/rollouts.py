"""Groups of rollouts: run, grade and clean up, in this process or in an executor."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tinker_cookbook.completers import TinkerTokenCompleter, TokenCompleter
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.rl.rollout_limits import RolloutConfig, TerminationRewardPolicy
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.rollout_strategy import (
    FailFast,
    RolloutResult,
    RolloutStrategy,
    describe_error,
)
from tinker_cookbook.rl.types import (
    Env,
    EnvGroupBuilder,
    Metrics,
    StopReason,
    Trajectory,
    TrajectoryGroup,
)
from tinker_cookbook.utils import logtree
from tinker_cookbook.utils.misc_utils import all_same

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    import tinker

__all__ = [
    "RolloutErrorCounter",
    "RolloutSettings",
    "do_group_rollout",
    "do_group_rollout_and_filter_constant_reward",
    "do_single_rollout",
    "get_rollout_executor",
    "rollout_group",
    "set_rollout_executor",
]

logger = logging.getLogger(__name__)

CLEANUP_TIMEOUT_SECONDS = 60.0
_executor: ContextVar[Executor | None] = ContextVar("rollout_executor", default=None)


@dataclass(frozen=True)
class RolloutSettings:
    """How the groups of a run are rolled out."""

    strategy: RolloutStrategy = field(default_factory=FailFast)
    config: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class RolloutErrorCounter:
    """Counts failed rollouts and lost groups over a run."""

    errors_by_type: Counter[str] = field(default_factory=Counter)
    num_failed_groups: int = 0

    def ingest(self, result: TrajectoryGroup | None) -> None:
        """Count the errors of a group. None, or a group without trajectories, is a lost group."""
        if result is None or not result.trajectories_G:
            self.num_failed_groups += 1
        if result is not None:
            self.errors_by_type.update(error.error_type for error in result.rollout_errors)

    def get_metrics(self, prefix: str = "rollout_errors") -> dict[str, float]:
        """Return totals since the start of the run; empty if nothing has failed."""
        total = sum(self.errors_by_type.values())
        if not total and not self.num_failed_groups:
            return {}
        by_type = {f"{prefix}/{name}": float(n) for name, n in self.errors_by_type.items()}
        totals = {"total": float(total), "groups_failed": float(self.num_failed_groups)}
        return by_type | {f"{prefix}/{name}": value for name, value in totals.items()}


async def do_single_rollout(policy: TokenCompleter, env: Env) -> Trajectory:
    """Run one episode without limits."""
    return await run_rollout(policy, env)


async def do_group_rollout(
    env_group_builder: EnvGroupBuilder,
    policy: TokenCompleter,
    strategy: RolloutStrategy | None = None,
    termination: TerminationRewardPolicy | None = None,
    *,
    config: RolloutConfig | None = None,
) -> TrajectoryGroup:
    """Run and grade one group.

    Args:
        env_group_builder: The group.
        policy: Samples the replies.
        strategy: What happens when members fail; None: `FailFast`.
        termination: Rewards at a limit and time for grading; None: those of `config`.
        config: Limits of each episode.

    Raises:
        DataValidationError: if the group rewards are not finite, or not one per trajectory.
    """
    termination = termination or (config.termination if config else None)
    work = _run_group(
        env_group_builder,
        policy,
        strategy or FailFast(),
        termination or TerminationRewardPolicy(),
        config,
    )
    if logtree.current_trace() is not None:  # the caller collects the report itself
        with logtree.scope_header("Group Rollout"):
            return await work
    with logtree.init_trace("Group Rollout") as report, logtree.scope_header("Group Rollout"):
        group = await work
    return replace(group, report=report)


async def _run_group(
    env_group_builder: EnvGroupBuilder,
    policy: TokenCompleter,
    strategy: RolloutStrategy,
    termination: TerminationRewardPolicy,
    config: RolloutConfig | None,
) -> TrajectoryGroup:
    try:
        given = {} if config is None or not _takes_config(strategy) else {"config": config}
        result = await strategy.execute(env_group_builder, policy, **given)
        graded = await _grade(env_group_builder, result, termination)
    finally:
        await _clean_up(env_group_builder)
    trajectories = [_end_reward(trajectory, termination) for trajectory in result.trajectories]
    return TrajectoryGroup(
        trajectories,
        [reward for reward, _ in graded],
        [metrics for _, metrics in graded],
        result.errors,
    )


async def rollout_group(
    builder: EnvGroupBuilder, policy: TokenCompleter, settings: RolloutSettings
) -> TrajectoryGroup:
    """Run and grade one group; a tolerated failure gives a group without trajectories.

    If an executor is set, the group runs there in a separate event loop, so that an environment
    that blocks does not delay the others.
    """
    executor = get_rollout_executor()
    try:
        if executor is None:
            return await do_group_rollout(
                builder, policy, settings.strategy, config=settings.config
            )
        payload = _pickle_group(builder, policy, settings)
        work = asyncio.get_running_loop().run_in_executor(executor, _run_pickled, payload)
        return await asyncio.wait_for(work, _executor_timeout(settings))
    except ConfigurationError:
        raise
    except Exception as error:  # a failure to build or grade costs only this group
        if not settings.strategy.catches_group_errors:
            raise
        described = describe_error(error, builder, _executor_timeout(settings))
        logger.warning("a group is left out: %s", described.error_message)
        return TrajectoryGroup([], [], [], [described])


async def do_group_rollout_and_filter_constant_reward(
    sampling_client: tinker.SamplingClient,
    env_group_builder: EnvGroupBuilder,
    max_tokens: int,
    temperature: float,
    do_remove_constant_reward_groups: bool,
    enable_logging: bool = True,
    strategy: RolloutStrategy | None = None,
    termination: TerminationRewardPolicy | None = None,
) -> TrajectoryGroup | None:
    """Run one group with the weights of a sampling client; for training loops of programs.

    Returns:
        The group; None if it was lost, or if `do_remove_constant_reward_groups` is set and all of
        its rewards are equal.
    """
    policy = TinkerTokenCompleter(sampling_client, max_tokens, temperature)
    config = RolloutConfig(termination=termination)
    group = await rollout_group(
        env_group_builder, policy, RolloutSettings(strategy or FailFast(), config)
    )
    if enable_logging and group.rollout_errors:
        logger.warning("rollout errors: %s", [e.error_message for e in group.rollout_errors])
    equal = do_remove_constant_reward_groups and all_same(group.get_total_rewards())
    return None if equal or not group.trajectories_G else group


def set_rollout_executor(executor: Executor | None) -> None:
    """Run groups in `executor` from now on; None: in this event loop.

    Raises:
        ConfigurationError: for a process pool that forks, which deadlocks with the SDK's threads.
    """
    if isinstance(executor, ProcessPoolExecutor):
        context: BaseContext | None = getattr(executor, "_mp_context", None)
        if context is not None and context.get_start_method() == "fork":
            raise ConfigurationError(
                "rollout_executor forks, which deadlocks with the threads of the SDK; use "
                "ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))."
            )
    _executor.set(executor)


def get_rollout_executor() -> Executor | None:
    """Return the executor of this context, or None."""
    return _executor.get()


def _takes_config(strategy: RolloutStrategy) -> bool:
    """Return whether `execute` takes `config`; a strategy of a program may lack that parameter."""
    parameters = inspect.signature(strategy.execute).parameters.values()
    return any(p.name == "config" or p.kind is p.VAR_KEYWORD for p in parameters)


async def _grade(
    builder: EnvGroupBuilder, result: RolloutResult, termination: TerminationRewardPolicy
) -> list[tuple[float, Metrics]]:
    """Return a group reward and metrics per trajectory, in the order of the result."""
    graded = [
        index
        for index, trajectory in enumerate(result.trajectories)
        if not (
            termination.skip_grading_on_timeout
            and trajectory.stop_reason == StopReason.ROLLOUT_TIMEOUT
        )
    ]
    outcome: list[tuple[float, Metrics]] = [(0.0, {}) for _ in result.trajectories]
    if not graded:
        return outcome
    rewards = await asyncio.wait_for(
        builder.compute_group_rewards(
            [result.trajectories[index] for index in graded],
            [result.envs[index] for index in graded],
        ),
        termination.grader_timeout_seconds,
    )
    _check_group_rewards(builder, rewards, len(graded))
    for index, pair in zip(graded, rewards, strict=True):
        limited = _at_limit(result.trajectories[index], termination)
        outcome[index] = (0.0, pair[1]) if limited else pair
    return outcome


def _check_group_rewards(
    builder: EnvGroupBuilder, rewards: Sequence[tuple[float, Metrics]], expected: int
) -> None:
    name = type(builder).__name__
    if len(rewards) != expected:
        raise DataValidationError(
            f"{name}.compute_group_rewards returned {len(rewards)} rewards for {expected} "
            "trajectories; return one (reward, metrics) each, in their order."
        )
    for index, (reward, _) in enumerate(rewards):
        if not math.isfinite(reward):
            raise DataValidationError(
                f"reward={reward} of {name}.compute_group_rewards for trajectory {index} is not "
                "a finite number. Correct the reward function."
            )


def _at_limit(trajectory: Trajectory, termination: TerminationRewardPolicy) -> bool:
    return (
        termination.zero_reward_on_limit
        and trajectory.stop_reason in termination.limit_stop_reasons
    )


def _end_reward(trajectory: Trajectory, termination: TerminationRewardPolicy) -> Trajectory:
    if not _at_limit(trajectory, termination):
        return trajectory
    transitions = [replace(transition, reward=0.0) for transition in trajectory.transitions]
    return replace(trajectory, transitions=transitions)


async def _clean_up(builder: EnvGroupBuilder) -> None:
    """Clean up; an error here is logged, so that finished rollouts are kept."""
    try:
        await asyncio.wait_for(builder.cleanup(), CLEANUP_TIMEOUT_SECONDS)
    except Exception as error:  # cleanup is code of the user
        logger.warning("cleanup failed: %s", describe_error(error, builder).error_message)


def _pickle_group(
    builder: EnvGroupBuilder, policy: TokenCompleter, settings: RolloutSettings
) -> bytes:
    for name, part in (("env group builder", builder), ("policy", policy)):
        try:
            pickle.dumps(part)
        except Exception as error:  # pickling runs code of the objects
            raise ConfigurationError(
                f"{name} {type(part).__name__} cannot be pickled ({error}), which a rollout "
                "executor needs; keep plain data in it (no lambdas, clients or open files) and "
                "make the rest in make_envs, or run without an executor."
            ) from error
    return pickle.dumps((builder, policy, settings))


def _run_pickled(payload: bytes) -> TrajectoryGroup:
    builder, policy, settings = pickle.loads(payload)
    work = do_group_rollout(builder, policy, settings.strategy, config=settings.config)
    return asyncio.run(work)


def _executor_timeout(settings: RolloutSettings) -> float | None:
    """Return the timeout of a group; a blocked worker cannot stop itself, so it is doubled."""
    seconds = settings.config.limits.rollout_timeout_seconds
    return None if seconds is None else 2 * seconds
