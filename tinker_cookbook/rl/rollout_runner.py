"""One episode: prompt, sample, step, until the environment or a limit ends it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from tinker_cookbook.completers import (
    ContextOverflowError,
    StopCondition,
    TokenCompleter,
    TokensWithLogprobs,
)
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.rollout_limits import ParseErrorPolicy, RolloutConfig, RolloutLimits
from tinker_cookbook.rl.types import (
    STOP_METRIC_PREFIX,
    Env,
    InitialObservationOverflow,
    Metrics,
    Observation,
    StepResult,
    StopReason,
    Trajectory,
    Transition,
    stop_metric,
)

__all__ = [
    "TRUNCATION_METRIC_KEY",
    "RolloutHooks",
    "RolloutState",
    "SamplingTurnTimeoutError",
    "SupportsInjectedMessages",
    "SupportsParseErrorPolicy",
    "SupportsPolicy",
    "SupportsToolCallLimit",
    "SupportsWholeEpisode",
    "run_rollout",
    "stop_reason_from_metrics",
]

CLOCK_SLACK_SECONDS = 0.01
"""The timer of an event loop may fire this much too early."""
TRUNCATION_METRIC_KEY = "num_truncations_max_turn_tokens"
T = TypeVar("T")


class SamplingTurnTimeoutError(Exception):
    """Sampling one reply took longer than allowed."""


@runtime_checkable
class SupportsToolCallLimit(Protocol):
    """An environment that counts tool calls."""

    def set_max_tool_calls(self, max_tool_calls: int) -> None:
        """Limit the number of tool calls of the episode."""
        ...


@runtime_checkable
class SupportsParseErrorPolicy(Protocol):
    """An environment that parses replies with a renderer."""

    def set_parse_error_policy(self, policy: ParseErrorPolicy) -> None:
        """Set what follows a reply that cannot be read."""
        ...


@runtime_checkable
class SupportsPolicy(Protocol):
    """An environment that samples from the policy, such as one with an opponent in self-play."""

    def set_policy(self, policy: TokenCompleter) -> None:
        """Take the policy of the rollout, seeded separately from the replies."""
        ...


@runtime_checkable
class SupportsInjectedMessages(Protocol):
    """An environment that takes messages from outside."""

    async def inject_messages(self, messages: list[Message]) -> tuple[Observation, StopCondition]:
        """Append messages and return the new prompt and what ends the next reply."""
        ...


@runtime_checkable
class SupportsWholeEpisode(Protocol):
    """An environment that calls the policy itself, such as one that runs an agent program."""

    async def run_episode(self, policy: TokenCompleter, limits: RolloutLimits) -> Trajectory:
        """Run the whole episode within the limits."""
        ...


@dataclass
class RolloutState:
    """The state of an episode."""

    turn_index: int = 0
    """Number of turns that are done."""
    observation_tokens: int = 0
    """Number of tokens of the current prompt."""
    sampled_tokens: int = 0
    """Number of sampled tokens of all turns so far."""
    num_length_truncations: int = 0
    """Number of replies that `max_turn_tokens` cut."""
    elapsed_seconds: float = 0.0
    transitions: list[Transition] = field(default_factory=list)


class RolloutHooks(Protocol):
    """Callbacks of an experiment during an episode."""

    async def on_turn_begin(self, state: RolloutState) -> list[Message] | None:
        """Called before each reply; returned messages are appended to the conversation."""
        ...

    async def on_stop_reason(self, reason: str, state: RolloutState) -> str | None:
        """Called at the end; a returned reason replaces the given one."""
        ...

    async def on_grade(self, state: RolloutState) -> None:
        """Called after the last turn."""
        ...

    async def on_artifacts(self, state: RolloutState) -> None:
        """Called after `on_grade`, as the last callback."""
        ...


def stop_reason_from_metrics(metrics: Metrics) -> str | None:
    """Return the reason that a metric `stop/<reason>` of a turn names, or None."""
    for key, value in metrics.items():
        if key.startswith(STOP_METRIC_PREFIX) and value:
            return key.removeprefix(STOP_METRIC_PREFIX)
    return None


async def run_rollout(
    policy: TokenCompleter,
    env: Env,
    *,
    limits: RolloutLimits | None = None,
    hooks: RolloutHooks | None = None,
    parse_errors: ParseErrorPolicy | None = None,
    config: RolloutConfig | None = None,
) -> Trajectory:
    """Run one episode.

    Args:
        policy: Samples the replies.
        env: A fresh environment.
        limits: Limits on the episode. At a limit it ends with the turns so far, possibly none.
        hooks: Callbacks of the experiment.
        parse_errors: What follows an unreadable reply, for environments that support it.
        config: The source of `limits` and `parse_errors` if they are not given.

    Raises:
        DataValidationError: if the environment returns something that cannot be trained on, or a
            first prompt that fills the model's context.
        SamplingTurnTimeoutError: if one reply takes longer than allowed.
        ConfigurationError: if there are hooks, and the environment runs its episode as a whole.
    """
    config = config or RolloutConfig()
    limits = limits or config.limits
    parse_errors = parse_errors or config.parse_errors
    if isinstance(env, SupportsWholeEpisode):
        if hooks is not None:
            raise ConfigurationError(
                f"hooks cannot be called by {type(env).__name__}, which runs its episode as a "
                "whole; leave them out."
            )
        return await env.run_episode(policy, limits)
    if parse_errors is not None and isinstance(env, SupportsParseErrorPolicy):
        env.set_parse_error_policy(parse_errors)
    if limits.max_tool_calls is not None and isinstance(env, SupportsToolCallLimit):
        env.set_max_tool_calls(limits.max_tool_calls)
    if isinstance(env, SupportsPolicy):
        env.set_policy(policy.for_rollout("environment"))
    return await _Episode(policy, env, limits, hooks).run()


class _Episode:
    def __init__(
        self, policy: TokenCompleter, env: Env, limits: RolloutLimits, hooks: RolloutHooks | None
    ) -> None:
        self._policy = policy
        self._env = env
        self._limits = limits
        self._hooks = hooks
        self._started = time.monotonic()
        self._state = RolloutState()

    async def run(self) -> Trajectory:
        first = await self._first_observation()
        if isinstance(first, InitialObservationOverflow):
            return await self._end_without_turn(StopReason.CONTEXT_OVERFLOW, first)
        if first is None:
            return await self._end_without_turn(StopReason.ROLLOUT_TIMEOUT)
        observation, stop = first
        reason = None
        while reason is None:
            observation, stop = await self._begin_turn(observation, stop)
            reason = self._limit_before(observation)
            if reason is None:
                observation, stop, reason = await self._turn(observation, stop)
        return await self._end(observation, reason)

    async def _first_observation(
        self,
    ) -> tuple[Observation, StopCondition] | InitialObservationOverflow | None:
        """Return the first observation of the environment; None after a timeout."""
        try:
            return await self._in_time(self._env.initial_observation())
        except TimeoutError:
            if not self._out_of_time():
                raise  # the environment itself raised it
            return None

    async def _begin_turn(
        self, observation: Observation, stop: StopCondition
    ) -> tuple[Observation, StopCondition]:
        self._state.elapsed_seconds = time.monotonic() - self._started
        self._state.observation_tokens = observation.length
        if self._hooks is None:
            return observation, stop
        injected = await self._hooks.on_turn_begin(self._state)
        if not injected:
            return observation, stop
        if not isinstance(self._env, SupportsInjectedMessages):
            raise DataValidationError(
                f"{type(self._env).__name__} has no method inject_messages, so on_turn_begin "
                "cannot add messages; use EnvFromMessageEnv, or return None from the hook."
            )
        return await self._env.inject_messages(injected)

    def _limit_before(self, observation: Observation) -> str | None:
        limits, state = self._limits, self._state
        if limits.max_turns is not None and state.turn_index >= limits.max_turns:
            return StopReason.MAX_TURNS
        sampled, whole = limits.max_sampled_tokens, limits.max_trajectory_tokens
        if sampled is not None and state.sampled_tokens >= sampled:
            return StopReason.MAX_SAMPLED_TOKENS
        if whole is not None and observation.length >= whole:
            return StopReason.CONTEXT_OVERFLOW
        return None

    async def _turn(
        self, observation: Observation, stop: StopCondition
    ) -> tuple[Observation, StopCondition, str | None]:
        """Sample and step; return the next prompt, and why the episode ends if it does."""
        try:
            action = await self._sample(observation, stop)
        except ContextOverflowError:
            if not self._state.transitions:
                raise  # even the first prompt is too long: this episode can never be sampled
            return observation, stop, StopReason.CONTEXT_OVERFLOW
        except TimeoutError:
            if not self._out_of_time():
                raise  # the policy itself raised it
            return observation, stop, StopReason.ROLLOUT_TIMEOUT
        _check_action(action, type(self._env).__name__)
        try:
            stepping = self._env.step(action.tokens, extra={"stop_reason": action.stop_reason})
            result = await self._in_time(stepping)
        except TimeoutError:
            if not self._out_of_time():
                raise  # the environment itself raised it
            self._record(observation, action, _cut_off())
            return observation, stop, StopReason.ROLLOUT_TIMEOUT
        _check_step(result, type(self._env).__name__, self._state.turn_index)
        self._record(observation, action, result)
        if not result.episode_done:
            return result.next_observation, result.next_stop_condition, None
        reason = stop_reason_from_metrics(result.metrics) or StopReason.COMPLETED
        return result.next_observation, result.next_stop_condition, reason

    async def _sample(self, observation: Observation, stop: StopCondition) -> TokensWithLogprobs:
        sampling = self._policy(observation, stop, max_tokens=self._turn_tokens(observation))
        limit = self._limits.sampling_turn_timeout_seconds
        left = self._seconds_left()
        if limit is None or (left is not None and left < limit):
            return await self._in_time(sampling)
        try:
            return await asyncio.wait_for(sampling, limit)
        except TimeoutError as error:
            raise SamplingTurnTimeoutError(
                f"sampling turn {self._state.turn_index} took longer than "
                f"sampling_turn_timeout_seconds={limit}; raise it, or lower max_tokens."
            ) from error

    def _turn_tokens(self, observation: Observation) -> int | None:
        limits = self._limits
        room = [limits.max_turn_tokens]
        if limits.max_sampled_tokens is not None:
            room.append(limits.max_sampled_tokens - self._state.sampled_tokens)
        if limits.max_trajectory_tokens is not None:
            room.append(limits.max_trajectory_tokens - observation.length)
        return min((tokens for tokens in room if tokens is not None), default=None)

    def _record(
        self, observation: Observation, action: TokensWithLogprobs, result: StepResult
    ) -> None:
        state = self._state
        metrics = dict(result.metrics)
        cap = self._limits.max_turn_tokens
        if cap is not None and action.stop_reason == "length" and len(action.tokens) >= cap:
            state.num_length_truncations += 1
            metrics[TRUNCATION_METRIC_KEY] = 1
        state.transitions.append(
            Transition(
                ob=observation,
                ac=action,
                reward=float(result.reward),
                episode_done=result.episode_done,
                metrics=metrics,
                logs=result.logs,
            )
        )
        state.turn_index += 1
        state.sampled_tokens += len(action.tokens)

    async def _end(self, observation: Observation, reason: str) -> Trajectory:
        if not self._state.transitions:
            return await self._end_without_turn(reason, final_ob=observation)
        reason = await self._tell_hooks(reason)
        last = self._state.transitions[-1]
        last.episode_done = True
        last.metrics.setdefault(stop_metric(reason), 1)
        return Trajectory(self._state.transitions, observation, str(reason))

    async def _end_without_turn(
        self,
        reason: str,
        overflow: InitialObservationOverflow | None = None,
        *,
        final_ob: Observation | None = None,
    ) -> Trajectory:
        """Record an episode that ended before its first reply.

        Its reward, metrics and logs are recorded on a transition without tokens, which adds nothing
        to the training data. The grading of the group sees the episode as any other.
        """
        import tinker

        found = overflow or InitialObservationOverflow(0.0)
        reason = await self._tell_hooks(reason)
        empty = tinker.ModelInput.empty()
        transition = Transition(
            ob=empty,
            ac=TokensWithLogprobs([], [], "length"),
            reward=float(found.reward),
            episode_done=True,
            metrics={**found.metrics, stop_metric(reason): 1},
            logs=found.logs,
        )
        return Trajectory([transition], empty if final_ob is None else final_ob, str(reason))

    async def _tell_hooks(self, reason: str) -> str:
        self._state.elapsed_seconds = time.monotonic() - self._started
        if self._hooks is not None:
            reason = await self._hooks.on_stop_reason(reason, self._state) or reason
            await self._hooks.on_grade(self._state)
            await self._hooks.on_artifacts(self._state)
        return reason

    async def _in_time(self, work: Awaitable[T]) -> T:
        """Await `work`, at most for the time that the episode has left."""
        left = self._seconds_left()
        return await (work if left is None else asyncio.wait_for(work, max(left, 0.0)))

    def _seconds_left(self) -> float | None:
        limit = self._limits.rollout_timeout_seconds
        return None if limit is None else limit - (time.monotonic() - self._started)

    def _out_of_time(self) -> bool:
        left = self._seconds_left()
        return left is not None and left <= CLOCK_SLACK_SECONDS


def _cut_off() -> StepResult:
    import tinker

    metrics: Metrics = {stop_metric(StopReason.ROLLOUT_TIMEOUT): 1}
    return StepResult(0.0, True, tinker.ModelInput.empty(), [], metrics)


def _check_action(action: TokensWithLogprobs, env_name: str) -> None:
    logprobs = action.maybe_logprobs
    if logprobs is not None and len(logprobs) != len(action.tokens):
        raise DataValidationError(
            f"the policy of {env_name} returned {len(action.tokens)} tokens with {len(logprobs)} "
            "logprobs; give one per token."
        )


def _check_step(result: object, env_name: str, turn: int) -> None:
    if not isinstance(result, StepResult):
        raise DataValidationError(
            f"{env_name}.step returned {type(result).__name__}; return a StepResult."
        )
    try:
        finite = math.isfinite(result.reward)
    except TypeError:
        finite = False
    if not finite:
        raise DataValidationError(
            f"reward={result.reward} of {env_name}.step at turn {turn} is not a finite number; one "
            "such reward would spoil the whole batch. Correct the reward function."
        )
    if not result.episode_done and result.next_observation.length == 0:
        raise DataValidationError(
            f"{env_name}.step returned an empty next_observation at turn {turn}; return a prompt, "
            "or set episode_done."
        )
