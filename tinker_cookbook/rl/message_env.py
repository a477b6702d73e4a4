"""Environments of messages, and the adapter that makes them environments of tokens."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinker_cookbook.completers import StopCondition, TokenCompleter, TokenMessageCompleter
from tinker_cookbook.renderers.content import classify_parse_failure, format_content_as_string
from tinker_cookbook.renderers.tool_calls import declared_tools
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl import types
from tinker_cookbook.rl.rollout_limits import ParseErrorPolicy, RolloutLimits
from tinker_cookbook.rl.types import PARSE_ERROR_MASKED_METRIC_KEY, StopReason, stop_metric

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["EnvFromMessageEnv", "MessageEnv", "MessageStepResult"]

MAX_SHOWN_DETAIL = 1000


@dataclass
class MessageStepResult:
    """The environment's answer to a message."""

    reward: float
    episode_done: bool
    next_messages: list[Message]
    """The whole conversation from which the next reply is sampled."""
    metrics: dict[str, float] = field(default_factory=dict)
    logs: types.Logs = field(default_factory=dict)
    next_stop_condition: StopCondition | None = None
    """What ends the next reply; None: the stop sequences of the renderer."""


class MessageEnv(ABC):
    """One episode in messages. An environment is used once."""

    @abstractmethod
    async def initial_observation(self) -> list[Message]:
        """Return the conversation from which the first reply is sampled."""

    @abstractmethod
    async def step(self, message: Message) -> MessageStepResult:
        """Take a reply and return the reward and the next conversation."""

    async def observe_truncated_response(self, message: Message) -> list[Message] | None:
        """Take a reply that the token limit cut.

        Returns:
            The conversation to continue with, or None to end the episode.
        """
        return None

    async def observe_parse_error(self, message: Message, details: str) -> MessageStepResult | None:
        """Answer a reply that cannot be read; called only if it does not end the episode.

        Args:
            message: The part of the reply that could be read.
            details: What is wrong with it.

        Returns:
            The answer; None to pass the reply to `step` unchanged.
        """
        del message, details
        return None

    async def add_messages(self, messages: list[Message]) -> list[Message] | None:
        """Append messages; return the whole conversation, or None if this is not supported."""
        return None

    async def cleanup(self) -> None:  # noqa: B027 - most environments hold nothing
        """Release what the episode holds. Called once or more, also for unfinished episodes."""


class EnvFromMessageEnv(types.Env):
    """A message environment as a token environment: renders prompts and parses replies."""

    def __init__(
        self,
        renderer: Renderer,
        message_env: MessageEnv,
        failed_parse_reward: float = -1.0,
        terminate_on_parse_error: bool = True,
        max_trajectory_tokens: int | None = None,
        max_generation_tokens: int | None = None,
        context_overflow_reward: float = -0.1,
        terminate_on_length: bool = True,
        parse_error_policy: ParseErrorPolicy | None = None,
        rollout_limits: RolloutLimits | None = None,
    ) -> None:
        """Set the environment and its limits.

        Args:
            renderer: The chat format of prompts and replies.
            message_env: The environment.
            failed_parse_reward: Reward of a reply that cannot be read, if there is not a
                `parse_error_policy`.
            terminate_on_parse_error: Whether such a reply ends the episode. Otherwise it is passed
                to the environment, to `observe_parse_error` or else to `step`.
            max_trajectory_tokens: Maximum tokens of a prompt and its reply together.
            max_generation_tokens: Tokens of that number that are reserved for the reply.
            context_overflow_reward: Added to the reward if the next prompt is too long; the reward
                of a reply that the token limit cut.
            terminate_on_length: Whether a cut reply ends the episode. Otherwise the environment
                may continue it (`observe_truncated_response`).
            parse_error_policy: Retries and rewards of replies that cannot be read.
            rollout_limits: Further source of `max_trajectory_tokens` and `max_tool_calls`; its
                other limits are not used here.
        """
        limits = rollout_limits or RolloutLimits()
        self.renderer = renderer
        self.message_env = message_env
        self.failed_parse_reward = failed_parse_reward
        self.terminate_on_parse_error = terminate_on_parse_error
        self.max_trajectory_tokens = max_trajectory_tokens or limits.max_trajectory_tokens
        self.max_generation_tokens = max_generation_tokens
        self.context_overflow_reward = context_overflow_reward
        self.terminate_on_length = terminate_on_length
        self._policy = parse_error_policy
        self._messages: list[Message] = []
        self._observation: tinker.ModelInput | None = None
        self._errors_in_a_row = 0
        if limits.max_tool_calls is not None:
            self.set_max_tool_calls(limits.max_tool_calls)

    @property
    def messages(self) -> list[Message]:
        """The conversation of the current prompt."""
        return list(self._messages)

    async def initial_observation(
        self,
    ) -> tuple[types.Observation, StopCondition] | types.InitialObservationOverflow:
        """Return the first prompt, or an episode without turns if the prompt is too long."""
        observation = await self._render(await self.message_env.initial_observation())
        if self._too_long(observation):
            return types.InitialObservationOverflow(
                self.context_overflow_reward, {"context_overflow": 1}
            )
        return observation, self.renderer.get_stop_sequences()

    async def step(
        self, action: types.Action, *, extra: types.ActionExtra | None = None
    ) -> types.StepResult:
        """Parse the reply and pass it to the environment."""
        message, termination = self.renderer.parse_response(action)
        if (extra or {}).get("stop_reason") == "length":
            return await self._on_length(message)
        failure = classify_parse_failure(message, termination)
        if failure is not None:
            return await self._on_parse_error(message, failure[1])
        self._errors_in_a_row = 0
        tools = declared_tools(self._messages)
        return await self._pass_on(self.renderer.fit_tool_calls(message, tools))

    def set_parse_error_policy(self, policy: ParseErrorPolicy) -> None:
        """Set what follows a reply that cannot be read."""
        self._policy = policy

    async def inject_messages(
        self, messages: list[Message]
    ) -> tuple[types.Observation, StopCondition]:
        """Append messages to the conversation before the next reply."""
        known = await self.message_env.add_messages(messages)
        observation = await self._render(known or [*self._messages, *messages])
        return observation, self.renderer.get_stop_sequences()

    async def cleanup(self) -> None:
        """Release what the episode holds."""
        await self.message_env.cleanup()

    def set_max_tool_calls(self, max_tool_calls: int) -> None:
        """Pass the limit to the environment, if it counts tool calls."""
        limit = getattr(self.message_env, "set_max_tool_calls", None)
        if limit is not None:
            limit(max_tool_calls)

    def set_policy(self, policy: TokenCompleter) -> None:
        """Give the policy, as a message completer, to an environment that samples from it."""
        take = getattr(self.message_env, "set_policy", None)
        if take is not None:
            take(TokenMessageCompleter(policy, self.renderer))

    async def _pass_on(self, message: Message) -> types.StepResult:
        return await self._answer(await self.message_env.step(message), {"parse_error": 0})

    async def _answer(self, result: MessageStepResult, metrics: types.Metrics) -> types.StepResult:
        found: types.Metrics = {**metrics, **result.metrics}
        if result.episode_done:
            return self._end(result.reward, found, result.logs)
        observation = await self._render(result.next_messages)
        if self._too_long(observation):
            overflow = {"context_overflow": 1, stop_metric(StopReason.CONTEXT_OVERFLOW): 1}
            return self._end(
                result.reward + self.context_overflow_reward, found | overflow, result.logs
            )
        return types.StepResult(
            reward=result.reward,
            episode_done=False,
            next_observation=observation,
            next_stop_condition=result.next_stop_condition or self.renderer.get_stop_sequences(),
            metrics=found,
            logs=result.logs,
        )

    async def _on_length(self, message: Message) -> types.StepResult:
        metrics: types.Metrics = {"max_tokens_reached": 1}
        known = None
        if not self.terminate_on_length:
            known = await self.message_env.observe_truncated_response(message)
        if known is None:
            metrics[stop_metric(StopReason.MAX_TOKENS)] = 1
            return self._end(self.context_overflow_reward, metrics, {})
        return await self._answer(MessageStepResult(0.0, False, known), metrics)

    async def _on_parse_error(self, message: Message, details: str) -> types.StepResult:
        policy = self._policy
        metrics: types.Metrics = {"parse_error": 1}
        logs: types.Logs = {"parse_error_details": details[:MAX_SHOWN_DETAIL]}
        if policy is None:
            if not self.terminate_on_parse_error:
                result = await self.message_env.observe_parse_error(message, details)
                result = result or await self.message_env.step(message)
                result.logs = {**logs, **result.logs}
                return await self._answer(result, metrics)
            metrics[stop_metric(StopReason.PARSE_ERROR)] = 1
            return self._end(self.failed_parse_reward, metrics, logs)
        self._errors_in_a_row += 1
        if policy.mask_error_turns:
            metrics[PARSE_ERROR_MASKED_METRIC_KEY] = 1
        if self._errors_in_a_row > policy.max_consecutive:
            metrics[stop_metric(StopReason.PARSE_ERROR)] = 1
            reward = policy.terminal_reward - policy.penalty_per_error
            return self._end(reward, metrics, logs)
        request = policy.retry_message_template.replace("{details}", details[:MAX_SHOWN_DETAIL])
        # As text, so that a half-written tool call is not rendered as a tool call.
        shown: Message = {
            "role": "assistant",
            "content": format_content_as_string(message["content"]),
        }
        retry: Message = {"role": "user", "content": request}
        known = await self.message_env.add_messages([shown, retry])
        messages = known or [*self._messages, shown, retry]
        return await self._answer(
            MessageStepResult(-policy.penalty_per_error, False, messages), metrics
        )

    def _end(self, reward: float, metrics: types.Metrics, logs: types.Logs) -> types.StepResult:
        import tinker

        stop = self.renderer.get_stop_sequences()
        return types.StepResult(reward, True, tinker.ModelInput.empty(), stop, metrics, logs)

    async def _render(self, messages: list[Message]) -> tinker.ModelInput:
        """Render the prompt, in a thread because a long prompt would block the event loop."""
        self._messages = list(messages)
        return await asyncio.to_thread(self.renderer.build_generation_prompt, self._messages)

    def _too_long(self, observation: types.Observation) -> bool:
        if self.max_trajectory_tokens is None:
            return False
        room = self.max_trajectory_tokens - (self.max_generation_tokens or 0)
        return observation.length > room
