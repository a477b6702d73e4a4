"""An environment that runs a program and trains on the calls that the program makes to its model.

    async def run(problem, address):                 # starts the agent; it may be any program
        command = [sys.executable, "agent.py"]
        return await run_program(command, address, stdin=problem.question)

    def score(outcome, problem):                     # grades what `run` returned
        return float(problem.answer in outcome.stdout)

    Data = agent_data(problems, run, score)

The agent talks to an OpenAI-style endpoint (`tinker_cookbook.capture`) whose address and key belong
to its rollout. The tokens and logprobs that were sampled for it become the trajectory. The agent
itself does not import this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from tinker_cookbook.capture.calls import RecordedCall, count_sequences, ordered, prompt
from tinker_cookbook.capture.endpoint import RecordingEndpoint
from tinker_cookbook.capture.rollout import Address, CallLimits, Rollout
from tinker_cookbook.capture.samplers import PolicySampler
from tinker_cookbook.capture.store import CallLog
from tinker_cookbook.completers import TokenCompleter, TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.problem_env import Grade
from tinker_cookbook.rl.problems import (
    ProblemDatasetBuilder,
    ProblemLike,
    ProblemsFunction,
    episode_data,
)
from tinker_cookbook.rl.rollout_limits import RolloutLimits
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    Logs,
    Metrics,
    StepResult,
    StopReason,
    Trajectory,
    Transition,
    stop_metric,
)

if TYPE_CHECKING:
    import tinker

__all__ = ["AgentEnv", "AgentTask", "agent_data", "recorded_trajectory"]

logger = logging.getLogger(__name__)

# The problem and the outcome have the types that the functions of the task give them.
RunFunction: TypeAlias = Callable[[Any, Address], Awaitable[Any]]
ScoreResult: TypeAlias = float | Grade
ScoreFunction: TypeAlias = Callable[[Any, Any], ScoreResult | Awaitable[ScoreResult]]


@dataclass(frozen=True)
class AgentTask:
    """Makes the environment in which an agent works on one problem."""

    run: RunFunction
    """Runs the agent: `run(problem, address)`. It must not block the event loop."""
    score: ScoreFunction
    """Grades what `run` returned: `score(outcome, problem)`, a number or `Grade`. May be async."""
    timeout_seconds: float = 600.0
    """Maximum seconds of `run`; `rollout_timeout_seconds` of the loop's limits holds as well."""
    max_calls: int = 100
    """Maximum number of calls; `max_turns` of the loop's limits holds as well."""
    limit_reward: float = 0.0
    """Reward of an agent that a limit ended; `score` is not called then."""
    record_to: str = ""
    """Folder for files of recorded calls, one per group or process; "" for none."""
    free_tool_choice: bool = False
    """Whether to accept requests that force a tool call; the model may then reply without one."""

    def __call__(self, problem: ProblemLike, renderer: Renderer) -> Env:
        """Return a new environment for a problem."""
        return AgentEnv(self, problem, renderer)


def agent_data(
    problems: ProblemsFunction,
    run: RunFunction,
    score: ScoreFunction,
    *,
    name: str = "agent",
    timeout_seconds: float = 600.0,
    max_calls: int = 100,
    limit_reward: float = 0.0,
    record_to: str = "",
) -> type[ProblemDatasetBuilder]:
    """Return the data set builder of a task that an agent solves.

    Args:
        problems: Returns the problems of a split, "train" or "test".
        run: Runs the agent on a problem: `run(problem, address)`.
        score: Grades what `run` returned: `score(outcome, problem)`.
        name: A tag for metrics.
        timeout_seconds: Maximum seconds of `run`.
        max_calls: Maximum number of calls of one run.
        limit_reward: Reward of an agent that a limit ended.
        record_to: Folder for files of recorded calls.
    """
    task = AgentTask(run, score, timeout_seconds, max_calls, limit_reward, record_to)
    return episode_data(problems, task, name=name)


class AgentEnv(Env):
    """One run of an agent. The agent decides when to call the model, so it runs as a whole."""

    def __init__(self, task: AgentTask, problem: ProblemLike, renderer: Renderer) -> None:
        self._task = task
        self._problem = problem
        self._renderer = renderer

    async def run_episode(self, policy: TokenCompleter, limits: RolloutLimits) -> Trajectory:
        """Run the agent on the policy and return its calls as a trajectory.

        Raises:
            DataValidationError: the reward is not a finite number.
            Exception: what `run` or `score` raised, or the error of the policy. An error of `run`
                after a refused call counts as the end of the episode instead.
        """
        async with _endpoint(self._task.record_to) as endpoint:
            rollout = endpoint.open(
                PolicySampler(policy),
                self._renderer,
                limits=_call_limits(limits, self._task.max_calls),
                free_tool_choice=self._task.free_tool_choice,
            )
            try:
                outcome, reason = await self._run(rollout, limits.rollout_timeout_seconds)
            finally:
                endpoint.close(rollout)
        grade = Grade(self._task.limit_reward)
        if reason is None:
            grade = await self._score(outcome)
        return recorded_trajectory(
            rollout.calls,
            grade.reward,
            stop_reason=reason or StopReason.COMPLETED,
            metrics=grade.metrics,
            logs={"reason": grade.reason} if grade.reason else {},
        )

    async def _run(self, rollout: Rollout, seconds: float | None) -> tuple[object, str | None]:
        """Return what the agent returned, or None and the limit that ended it."""
        limit = min(self._task.timeout_seconds, math.inf if seconds is None else seconds)
        timer = asyncio.timeout(limit)
        try:
            async with timer:
                outcome = await self._task.run(self._problem, rollout.address)
        except Exception as error:
            if isinstance(error, TimeoutError) and timer.expired():
                return None, StopReason.ROLLOUT_TIMEOUT
            if rollout.refused is not None:
                return None, rollout.refused
            # An agent tells only that a call failed; the policy's error tells why.
            if rollout.failure is not None:
                raise rollout.failure from error
            raise
        if rollout.failure is not None:
            raise rollout.failure
        return outcome, None

    async def _score(self, outcome: object) -> Grade:
        result = self._task.score(outcome, self._problem)
        if inspect.isawaitable(result):
            result = await result
        grade = result if isinstance(result, Grade) else Grade(float(result))
        if not math.isfinite(grade.reward):
            raise DataValidationError(
                f"reward={grade.reward} of the agent's score is not a finite number; one such "
                "reward would spoil the whole batch. Correct the score function."
            )
        return grade

    async def initial_observation(self) -> NoReturn:
        """Raise an error: the agent decides what the first prompt is."""
        raise _not_by_turns()

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Raise an error: the agent reads its replies from its endpoint."""
        raise _not_by_turns()


def recorded_trajectory(
    calls: Sequence[RecordedCall],
    reward: float,
    *,
    stop_reason: str = StopReason.COMPLETED,
    metrics: Metrics | None = None,
    logs: Logs | None = None,
) -> Trajectory:
    """Return the calls of a rollout as a trajectory.

    Calls that continue each other are neighbours, so they merge into one datum. Each sampled token
    occurs once. The reward is that of the last turn; all turns share the trajectory's advantage.

    Args:
        calls: All calls of the rollout, in the order in which they were recorded.
        reward: The reward of the whole run.
        stop_reason: Why the run ended.
        metrics: Further metrics.
        logs: Texts and numbers for the transcript.
    """
    import tinker

    transitions = [
        _transition(tinker.ModelInput.from_ints(prompt(calls, call.index)), call)
        for call in ordered(calls)
    ]
    if not transitions:
        nothing = TokensWithLogprobs([], [], "length")
        transitions = [Transition(tinker.ModelInput.empty(), nothing, 0.0, True)]
    last = transitions[-1]
    last.reward = reward
    last.episode_done = True
    last.logs = dict(logs or {})
    last.metrics = {
        "agent_calls": len(calls),
        "agent_sequences": count_sequences(calls),
        **(metrics or {}),
        stop_metric(stop_reason): 1,
    }
    return Trajectory(transitions, tinker.ModelInput.empty(), str(stop_reason))


def _transition(observation: tinker.ModelInput, call: RecordedCall) -> Transition:
    stop_reason = "length" if call.stop_reason == "length" else "stop"
    action = TokensWithLogprobs(
        call.tokens, call.logprobs, stop_reason=stop_reason, sequence_id=call.sequence_id
    )
    return Transition(ob=observation, ac=action, reward=0.0, episode_done=False)


def _call_limits(limits: RolloutLimits, max_calls: int) -> CallLimits:
    return CallLimits(
        max_calls=max_calls if limits.max_turns is None else min(max_calls, limits.max_turns),
        max_turn_tokens=limits.max_turn_tokens,
        max_sampled_tokens=limits.max_sampled_tokens,
        max_sequence_tokens=limits.max_trajectory_tokens,
        max_tool_calls=limits.max_tool_calls,
        call_timeout_seconds=limits.sampling_turn_timeout_seconds,
    )


def _not_by_turns() -> ConfigurationError:
    return ConfigurationError(
        "AgentEnv runs its program as a whole and cannot be played turn by turn; use "
        "rl.rollout_runner.run_rollout, as the train loop does."
    )


# ---- one endpoint per event loop, while rollouts use it ----


@dataclass
class _Shared:
    """The endpoint of an event loop, and how many rollouts use it."""

    ready: asyncio.Lock = field(default_factory=asyncio.Lock)
    endpoint: RecordingEndpoint | None = None
    log: CallLog | None = None
    num_users: int = 0


_shared: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = (
    weakref.WeakKeyDictionary()
)


@contextlib.asynccontextmanager
async def _endpoint(record_to: str) -> AsyncIterator[RecordingEndpoint]:
    """Give the endpoint of this event loop and folder; the last user stops it."""
    by_folder = _shared.setdefault(asyncio.get_running_loop(), {})
    shared = by_folder.setdefault(record_to, _Shared())
    shared.num_users += 1
    try:
        async with shared.ready:
            if shared.endpoint is None:
                await _open_shared(shared, record_to)
            endpoint = shared.endpoint
        assert endpoint is not None, "just opened, and kept while it has users"
        yield endpoint
    finally:
        shared.num_users -= 1
        if not shared.num_users:
            async with shared.ready:
                if not shared.num_users:
                    await _close_shared(shared)


async def _open_shared(shared: _Shared, record_to: str) -> None:
    if record_to:
        name = f"calls-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        shared.log = CallLog(Path(record_to) / name)
    endpoint = RecordingEndpoint(log=shared.log)
    await endpoint.start()
    shared.endpoint = endpoint


async def _close_shared(shared: _Shared) -> None:
    endpoint, log = shared.endpoint, shared.log
    shared.endpoint = shared.log = None
    if endpoint is not None:
        await endpoint.stop()
    if log is not None:
        log.close()
