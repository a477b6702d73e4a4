"""One example of a benchmark: sample its replies and grade them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.completers import ContextOverflowError, TinkerTokenCompleter, derive_seed
from tinker_cookbook.eval.benchmarks._conversations import Conversations
from tinker_cookbook.eval.benchmarks._sampling import FirstReplies, RecordingPolicy
from tinker_cookbook.eval.benchmarks._types import (
    METRIC_CONTEXT_OVERFLOW,
    METRIC_MAX_TOKENS_REACHED,
    BenchmarkConfig,
    Metrics,
    ScoringEnv,
    StoredTrajectory,
)
from tinker_cookbook.eval.endpoint import EndpointClient
from tinker_cookbook.exceptions import SandboxError, TrainingError
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import STOP_METRIC_PREFIX, Env, Logs, Trajectory

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["Example", "Outcome", "run_example"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One example of a benchmark, with an environment per sample."""

    idx: int
    benchmark: str
    example_id: str
    prompt_key: str
    envs: Sequence[Env | ScoringEnv]


@dataclass(frozen=True)
class Outcome:
    """The trajectory of one sample."""

    trajectory: StoredTrajectory
    may_retry: bool = False
    """Whether another attempt may succeed: the service or the sandbox failed, or time ran out."""


async def run_example(
    example: Example,
    client: tinker.SamplingClient | EndpointClient,
    renderer: Renderer,
    config: BenchmarkConfig,
) -> list[Outcome]:
    """Return one outcome per sample. A sample that fails has an `error` instead of a grade."""
    seed = None if config.seed is None else derive_seed(config.seed, example.example_id)
    if isinstance(client, EndpointClient):
        first = Conversations(client, config, seed, len(example.envs))
        samples = [
            _Sample(example, number, env, client, first) for number, env in enumerate(example.envs)
        ]
    else:
        first = FirstReplies(_completer(client, config, seed), len(example.envs))
        samples = [
            _Sample(
                example, number, env, client, RecordingPolicy(first.policy(number), env, renderer)
            )
            for number, env in enumerate(example.envs)
        ]
    try:
        return await asyncio.gather(*(each.run(config.timeout_seconds) for each in samples))
    finally:
        first.close()
        await asyncio.gather(*map(_clean_up, example.envs))


def _completer(
    client: tinker.SamplingClient, config: BenchmarkConfig, seed: int | None
) -> TinkerTokenCompleter:
    return TinkerTokenCompleter(
        client, config.max_tokens, config.temperature, config.context_window, seed
    )


@dataclass
class _Sample:
    example: Example
    number: int
    env: Env | ScoringEnv
    client: tinker.SamplingClient | EndpointClient
    policy: RecordingPolicy | Conversations

    async def run(self, timeout_seconds: float) -> Outcome:
        """Run the sample; any error is recorded, because it must cost only this example."""
        import tinker

        started = time.monotonic()
        found = StoredTrajectory(
            idx=self.example.idx,
            benchmark=self.example.benchmark,
            example_id=self.example.example_id,
            sample=self.number,
            prompt_key=self.example.prompt_key,
        )
        may_retry = False
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._fill(found)
        except TimeoutError as error:
            found.error = f"TimeoutError: {error or f'no grade after {timeout_seconds} seconds'}"
            may_retry = True
        except (TrainingError, SandboxError, tinker.TinkerError) as error:
            found.error, may_retry = _describe(error), True
        except Exception as error:  # of the environment or its grader
            found.error = _describe(error)
        if found.error is not None:
            found.reward, found.metrics = 0.0, {}
        if isinstance(self.policy, RecordingPolicy):
            found.turns = found.turns or self.policy.turns
        found.time_seconds = round(time.monotonic() - started, 3)
        return Outcome(found, may_retry)

    async def _fill(self, found: StoredTrajectory) -> None:
        if isinstance(self.env, ScoringEnv):
            grade = await self.env.score_directly(self.client)
            found.reward, found.metrics, found.logs = grade.reward, grade.metrics, grade.logs
            found.turns = list(getattr(self.env, "turns", []))
            return
        try:
            if isinstance(self.policy, Conversations):
                await self.policy.run(self.number, self.env, found)
                return
            trajectory = await run_rollout(self.policy, self.env)
        except ContextOverflowError:
            found.metrics = {METRIC_CONTEXT_OVERFLOW: 1}
            return
        found.reward = sum(step.reward for step in trajectory.transitions)
        found.metrics, found.logs = _merge(trajectory)
        found.turns = self.policy.turns


def _merge(trajectory: Trajectory) -> tuple[Metrics, Logs]:
    """Return the metrics and logs of all turns; of equal names, the last one counts."""
    metrics: Metrics = {}
    logs: Logs = {}
    for step in trajectory.transitions:
        logs |= step.logs
        metrics |= {
            name: value
            for name, value in step.metrics.items()
            if not name.startswith(STOP_METRIC_PREFIX)
        }
    last = trajectory.transitions[-1]
    if last.ac.tokens and last.ac.stop_reason == "length":
        metrics[METRIC_MAX_TOKENS_REACHED] = 1
    return metrics, logs


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


async def _clean_up(env: object) -> None:
    """Let an environment, or the message environment in it, release what it holds."""
    for holder in (env, getattr(env, "message_env", None)):
        release = getattr(holder, "cleanup", None)
        if release is None:
            continue
        try:
            await release()
        except Exception as error:
            logger.warning("an environment could not be cleaned up: %s", _describe(error))
