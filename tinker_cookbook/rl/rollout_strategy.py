"""Strategies: how the members of a group are run, and what happens when some of them fail.

A member is one environment of the group. A failed member is retried in a new environment with new
draws, and all members of a group share its retries.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tinker_cookbook.completers import TokenCompleter
from tinker_cookbook.exceptions import (
    AllTrajectoriesFailedError,
    ConfigurationError,
    TinkerCookbookError,
)
from tinker_cookbook.rl.rollout_limits import RolloutConfig
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RolloutError, Trajectory

__all__ = [
    "FailFast",
    "MinViableGroup",
    "RetryOnFailure",
    "RolloutResult",
    "RolloutStrategy",
    "describe_error",
    "gather_or_cancel",
    "rollout_strategy_from_config",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RolloutResult:
    """The members that succeeded, and the errors of those that failed."""

    trajectories: list[Trajectory]
    envs: Sequence[Env]
    errors: list[RolloutError]


class RolloutStrategy(ABC):
    """How the members of a group are run."""

    @property
    def catches_group_errors(self) -> bool:
        """Whether a group that fails is left out of the batch; otherwise it ends the run."""
        return False

    @abstractmethod
    async def execute(
        self,
        env_group_builder: EnvGroupBuilder,
        policy: TokenCompleter,
        *,
        config: RolloutConfig | None = None,
    ) -> RolloutResult:
        """Make the environments of a group and run all of them at once.

        `config` holds the limits of the run. A strategy whose `execute` does not take it has to set
        limits itself.
        """


@dataclass(frozen=True)
class FailFast(RolloutStrategy):
    """The first error ends the run; for debugging an environment."""

    async def execute(
        self,
        env_group_builder: EnvGroupBuilder,
        policy: TokenCompleter,
        *,
        config: RolloutConfig | None = None,
    ) -> RolloutResult:
        """Run all members; the first error is raised at once."""
        envs = await make_envs(env_group_builder)
        trajectories = await gather_or_cancel(
            run_rollout(policy.for_rollout(index, 0), env, config=config)
            for index, env in enumerate(envs)
        )
        return RolloutResult(trajectories, envs, [])


@dataclass(frozen=True)
class RetryOnFailure(RolloutStrategy):
    """A failed member is retried in a new environment; an incomplete group is left out."""

    max_retries: int = 3
    """For the whole group."""
    per_rollout_timeout: float = 0
    """Timeout of one rollout, in seconds; 0: none."""

    @property
    def catches_group_errors(self) -> bool:
        """A group that cannot be completed is left out."""
        return True

    async def execute(
        self,
        env_group_builder: EnvGroupBuilder,
        policy: TokenCompleter,
        *,
        config: RolloutConfig | None = None,
    ) -> RolloutResult:
        """Run all members.

        Raises:
            AllTrajectoriesFailedError: if a member fails after all retries are used.
        """
        attempt = _GroupAttempt(
            env_group_builder, policy, config, self.max_retries, self.per_rollout_timeout or None
        )
        result = await attempt.run()
        if len(result.trajectories) < attempt.group_size:
            raise AllTrajectoriesFailedError(
                f"a rollout failed and the {self.max_retries} retries of its group are used; "
                f"last error: {_show(result.errors)}"
            )
        return result


@dataclass(frozen=True)
class MinViableGroup(RolloutStrategy):
    """A failed member is retried, then left out, as long as enough members remain to compare."""

    min_successful: int | None = None
    """Minimum number of successful members; None: three quarters of the group, but at least 2."""
    max_retries: int = 3
    """For the whole group."""
    per_rollout_timeout: float | None = None
    """Timeout of one rollout, in seconds; None: none."""

    @property
    def catches_group_errors(self) -> bool:
        """A group that is too small is left out."""
        return True

    async def execute(
        self,
        env_group_builder: EnvGroupBuilder,
        policy: TokenCompleter,
        *,
        config: RolloutConfig | None = None,
    ) -> RolloutResult:
        """Run all members.

        Raises:
            AllTrajectoriesFailedError: if fewer than `min_successful` members succeeded.
        """
        attempt = _GroupAttempt(
            env_group_builder, policy, config, self.max_retries, self.per_rollout_timeout
        )
        result = await attempt.run()
        needed = self.min_successful or max(
            math.ceil(0.75 * attempt.group_size), min(2, attempt.group_size)
        )
        if len(result.trajectories) < needed:
            raise AllTrajectoriesFailedError(
                f"{len(result.trajectories)} of {attempt.group_size} rollouts of a group "
                f"succeeded, {needed} are needed; last error: {_show(result.errors)}"
            )
        return result


def rollout_strategy_from_config(
    rollout_error_tolerance: bool | RolloutStrategy,
) -> RolloutStrategy:
    """Return FailFast for False, RetryOnFailure for True, and a strategy unchanged."""
    if isinstance(rollout_error_tolerance, RolloutStrategy):
        return rollout_error_tolerance
    return RetryOnFailure() if rollout_error_tolerance else FailFast()


@dataclass
class _GroupAttempt:
    """One run of a group: its members, and the retries that they share."""

    builder: EnvGroupBuilder
    policy: TokenCompleter
    config: RolloutConfig | None
    retries_left: int
    timeout: float | None
    group_size: int = 0
    errors: list[RolloutError] = field(default_factory=list)

    async def run(self) -> RolloutResult:
        envs = await make_envs(self.builder)
        self.group_size = len(envs)
        done = await gather_or_cancel(self._member(index, env) for index, env in enumerate(envs))
        survivors = [pair for pair in done if pair is not None]
        return RolloutResult(
            [trajectory for _, trajectory in survivors], [env for env, _ in survivors], self.errors
        )

    async def _member(self, index: int, first: Env) -> tuple[Env, Trajectory] | None:
        """Run one member until it succeeds; None if it fails and the retries are used."""
        # The attempt's number is part of the seed (`for_rollout`): a retry samples other replies,
        # and a resumed run that retries in the same way samples the same ones.
        attempt = 0
        env: Env | None = first
        while True:
            try:
                env = env or await asyncio.wait_for(self._make_again(index), self.timeout)
                rollout = run_rollout(
                    self.policy.for_rollout(index, attempt), env, config=self.config
                )
                return env, await asyncio.wait_for(rollout, self.timeout)
            except Exception as error:  # whatever an environment raises costs one rollout only
                where = self.builder if env is None else env
                self.errors.append(describe_error(error, where, self.timeout))
                logger.warning("a rollout failed: %s", self.errors[-1].error_message)
            if self.retries_left == 0:
                return None
            self.retries_left -= 1
            attempt += 1
            env = None

    async def _make_again(self, index: int) -> Env:
        """Make a new environment for one member."""
        envs = await make_envs(self.builder)
        if index >= len(envs):
            raise ConfigurationError(
                f"{type(self.builder).__name__}.make_envs returned {len(envs)} environments for a "
                f"retry and {self.group_size} before; return as many each time."
            )
        return envs[index]


async def make_envs(builder: EnvGroupBuilder) -> list[Env]:
    """Make the environments of a group.

    Raises:
        ConfigurationError: if the builder returns none.
    """
    envs = list(await builder.make_envs())
    if not envs:
        raise ConfigurationError(
            f"{type(builder).__name__}.make_envs returned no environment; a group has at least 2 "
            "members to compare. Check its group size."
        )
    return envs


def describe_error(error: Exception, where: object, timeout: float | None = None) -> RolloutError:
    """Return the error and the line that raised it, without the whole traceback.

    Errors of the toolkit explain themselves; the line would only distract from what they say.
    """
    name = type(error).__name__
    if isinstance(error, TimeoutError) and not str(error):
        message = f"{type(where).__name__} took longer than per_rollout_timeout={timeout} seconds"
        return RolloutError(name, message)
    if isinstance(error, TinkerCookbookError):
        return RolloutError(name, f"{type(where).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return RolloutError(name, f"{type(where).__name__}: {name}{place}: {error}")


async def gather_or_cancel(work: Iterable[Coroutine[object, object, T]]) -> list[T]:
    """Run coroutines concurrently; the first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _show(errors: list[RolloutError]) -> str:
    return errors[-1].error_message if errors else "none"
