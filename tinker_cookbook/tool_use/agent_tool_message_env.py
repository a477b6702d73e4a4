"""An environment in which the model calls tools until it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.types import Message, ToolCall, UnparsedToolCall
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.rollout_limits import (
    DEFAULT_RETRY_MESSAGE_TEMPLATE,
    ParseErrorPolicy,
    RolloutConfig,
    TerminationRewardPolicy,
    ToolExecution,
)
from tinker_cookbook.rl.rollout_presets import default_rollout_config_for_model
from tinker_cookbook.rl.types import StopReason, stop_metric
from tinker_cookbook.tool_use.tools import error_tool_result, handle_tool_call
from tinker_cookbook.tool_use.types import Tool, ToolResult

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["AgentToolMessageEnv", "RewardFn", "RewardResult", "build_agent_tool_env"]

LIMITS = frozenset(
    {
        "context_overflow_reward",
        "max_generation_tokens",
        "max_tool_calls",
        "max_trajectory_tokens",
        "terminate_on_length",
        "terminate_on_parse_error",
    }
)
RewardResult = tuple[float, dict[str, float]]
RewardFn = Callable[[list[Message]], Awaitable[RewardResult]]
"""Grades a finished conversation and returns a reward and metrics."""


@dataclass
class AgentToolMessageEnv(MessageEnv):
    """An environment with tools: a reply that calls no tool ends the episode and is graded.

    A reply with a call that cannot be read earns `failed_parse_reward` and ends the episode. With
    `terminate_on_parse_error=False` the episode continues instead: the model is shown the error,
    together with the results of the calls that can be read.
    """

    tools: list[Tool]
    initial_messages: list[Message]
    max_turns: int
    reward_fn: RewardFn
    failed_parse_reward: float = -0.1
    terminate_on_parse_error: bool = True
    max_tool_calls: int | None = None
    parse_error_policy: ParseErrorPolicy | None = None
    tool_execution: ToolExecution = "parallel"
    termination_policy: TerminationRewardPolicy | None = None
    history: list[Message] = field(default_factory=list)
    """The conversation so far."""
    on_cleanup: Callable[[], Awaitable[None]] | None = None
    """Releases what the tools hold, such as server programs."""

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise ConfigurationError(f"max_turns={self.max_turns} is less than 1; use 1 or more.")
        self._tools = {tool.name: tool for tool in self.tools}
        if len(self._tools) < len(self.tools):
            names = [tool.name for tool in self.tools]
            raise ConfigurationError(
                f"tools={names} has a name twice; give every tool a different name."
            )
        self._num_turns = 0
        self._num_tool_calls = 0

    async def initial_observation(self) -> list[Message]:
        """Return the start of the conversation."""
        self.history = list(self.initial_messages)
        return self.history

    async def cleanup(self) -> None:
        """Release what the tools hold."""
        release, self.on_cleanup = self.on_cleanup, None
        if release is not None:
            await release()

    def set_max_tool_calls(self, max_tool_calls: int) -> None:
        """Limit the calls of the episode; a tighter limit that was set before is kept."""
        known = self.max_tool_calls
        self.max_tool_calls = max_tool_calls if known is None else min(known, max_tool_calls)

    def set_parse_error_policy(self, policy: ParseErrorPolicy) -> None:
        """Set what follows a reply that cannot be read."""
        self.parse_error_policy = policy

    async def observe_truncated_response(self, message: Message) -> list[Message]:
        """Keep a reply that the token limit cut, and let the model continue."""
        self.history = [*self.history, message]
        return self.history

    async def add_messages(self, messages: list[Message]) -> list[Message]:
        """Append messages from outside and return the conversation."""
        self.history = [*self.history, *messages]
        return self.history

    async def observe_parse_error(self, message: Message, details: str) -> MessageStepResult:
        """Run the calls that can be read, and show the model what is wrong with the rest."""
        return await self._take(message, problem=details)

    async def step(self, message: Message) -> MessageStepResult:
        """Run the tool calls of a reply, or grade the conversation if it has none."""
        return await self._take(message)

    async def _take(self, message: Message, problem: str = "") -> MessageStepResult:
        self.history = [*self.history, message]
        self._num_turns += 1
        calls = message.get("tool_calls") or []
        broken = message.get("unparsed_tool_calls") or []
        metrics = {"num_tool_calls": float(len(calls))}
        if broken and self.terminate_on_parse_error:
            metrics[stop_metric(StopReason.PARSE_ERROR)] = 1.0
            return MessageStepResult(self.failed_parse_reward, True, self.history, metrics)
        reward = self.failed_parse_reward if broken or problem else 0.0
        if not calls and not broken and not problem:
            return await self._end(StopReason.COMPLETED, metrics, reward)
        limit = self.max_tool_calls
        if limit is not None and self._num_tool_calls + len(calls) > limit:
            return await self._end(StopReason.MAX_TOOL_CALLS, metrics, reward)
        self._num_tool_calls += len(calls)
        results = await self._run_calls(calls)
        results += [self._describe_broken_call(call) for call in broken]
        for result in results:
            self.history = [*self.history, *result.messages]
            for key, value in result.metrics.items():
                metrics[key] = metrics.get(key, 0.0) + value
        if problem and not broken:
            request = DEFAULT_RETRY_MESSAGE_TEMPLATE.replace("{details}", problem)
            self.history = [*self.history, {"role": "user", "content": request}]
        if any(result.should_stop for result in results):
            return await self._end(StopReason.TOOL_STOPPED, metrics, reward)
        if self._num_turns >= self.max_turns:
            return await self._end(StopReason.MAX_TURNS, metrics, reward)
        return MessageStepResult(reward, False, self.history, metrics)

    def _describe_broken_call(self, call: UnparsedToolCall) -> ToolResult:
        """Return an error as the result of a call that could not be read."""
        # Some formats write the name of the tool with its result, so the name is guessed.
        name = next((name for name in self._tools if name in call.raw_text), "unknown")
        return error_tool_result(
            f"the call could not be read: {call.error}", name=name, error_type="invalid_call"
        )

    async def _run_calls(self, calls: list[ToolCall]) -> list[ToolResult]:
        """Return the results in the order of the calls."""
        if self.tool_execution == "parallel":
            return list(await asyncio.gather(*(self._run_call(call) for call in calls)))
        # `concurrent_safe`: neighbouring calls of safe tools run together; any other call waits for
        # those before it. `sequential` is the case in which no call is safe.
        results: list[ToolResult] = []
        together: list[ToolCall] = []
        for call in calls:
            if self._may_run_together(call):
                together.append(call)
                continue
            results += await asyncio.gather(*(self._run_call(waiting) for waiting in together))
            together = []
            results.append(await self._run_call(call))
        return results + list(await asyncio.gather(*(self._run_call(c) for c in together)))

    def _may_run_together(self, call: ToolCall) -> bool:
        tool = self._tools.get(call.function.name)
        return self.tool_execution == "concurrent_safe" and bool(getattr(tool, "concurrent", False))

    async def _run_call(self, call: ToolCall) -> ToolResult:
        return await handle_tool_call(self._tools, call)

    async def _end(
        self, reason: StopReason, metrics: dict[str, float], turn_reward: float
    ) -> MessageStepResult:
        """Grade the conversation and add what the last turn earned itself."""
        policy = self.termination_policy or TerminationRewardPolicy()
        metrics = metrics | {stop_metric(reason): 1.0}
        if policy.zero_reward_on_limit and reason in policy.limit_stop_reasons:
            return MessageStepResult(0.0, True, self.history, metrics)
        graded = self.history
        if not policy.pass_all_messages_to_grader:
            graded = [message for message in self.history if message["role"] != "system"]
        reward, found = await asyncio.wait_for(
            self.reward_fn(graded), policy.grader_timeout_seconds
        )
        return MessageStepResult(reward + turn_reward, True, self.history, metrics | found)


def build_agent_tool_env(
    renderer: Renderer,
    tools: list[Tool],
    initial_messages: list[Message],
    reward_fn: RewardFn,
    *,
    rollout_config: RolloutConfig | None = None,
    model_name: str | None = None,
    max_turns: int | None = None,
    failed_parse_reward: float = -0.1,
    **limits: Any,
) -> EnvFromMessageEnv:
    """Return an environment in which the model may call tools.

    Args:
        renderer: The chat format, which must have a notation for tools.
        tools: The tools that the model may call.
        initial_messages: The task. The tools are declared in its system message, or in a new one.
        reward_fn: Grades the finished conversation.
        rollout_config: Limits and rules; `max_trajectory_tokens` and `max_tool_calls` are used.
        model_name: Chooses a `rollout_config` if none is given.
        max_turns: Maximum number of replies; None: the limit of the config, else 10.
        failed_parse_reward: Reward of a reply that cannot be read.
        limits: `max_tool_calls` and `max_trajectory_tokens` override those of the config.
            `max_generation_tokens`, `context_overflow_reward`, `terminate_on_parse_error` and
            `terminate_on_length` are passed to `EnvFromMessageEnv`.

    Raises:
        ConfigurationError: for an unknown limit.
    """
    unknown = limits.keys() - LIMITS
    if unknown:
        raise ConfigurationError(
            f"{', '.join(sorted(unknown))} is not a limit; use one of {', '.join(sorted(LIMITS))}."
        )
    config = rollout_config or default_rollout_config_for_model(model_name or "")
    env = AgentToolMessageEnv(
        tools=tools,
        initial_messages=renderer.declare_tools(
            initial_messages, [tool.to_spec() for tool in tools]
        ),
        max_turns=max_turns or config.limits.max_turns or 10,
        reward_fn=reward_fn,
        failed_parse_reward=failed_parse_reward,
        terminate_on_parse_error=limits.get("terminate_on_parse_error", True),
        max_tool_calls=limits.pop("max_tool_calls", None) or config.limits.max_tool_calls,
        parse_error_policy=config.parse_errors,
        tool_execution=config.tool_execution,
        termination_policy=config.termination,
    )
    return EnvFromMessageEnv(
        renderer,
        env,
        failed_parse_reward=failed_parse_reward,
        parse_error_policy=config.parse_errors,
        rollout_limits=chz.replace(config.limits, max_tool_calls=env.max_tool_calls),
        **limits,
    )
