"""Environments of the package `verifiers` 0.4 (`verifiers.v1`): needs it installed.

An environment of this version runs a program, the harness, that talks to a model's endpoint, and
grades what happened. So it is an agent: each episode gets the address of a recording endpoint. The
version before, 0.1, is in `verifiers_env`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import chz

from tinker_cookbook.capture.rollout import Address
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.rl.agent_env import AgentEnv, AgentTask
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.problem_env import Grade
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset

__all__ = ["VerifiersTasksetBuilder"]


class _Trace(Protocol):
    """What is used of a `verifiers.v1.Trace`: one agent's part of an episode."""

    @property
    def reward(self) -> float: ...
    @property
    def metrics(self) -> Mapping[str, float | None]: ...
    @property
    def errors(self) -> Sequence[object]: ...


class _Episode(Protocol):
    """What is used of a `verifiers.v1.Episode`."""

    ok: bool
    errors: Sequence[object]
    traces: Sequence[_Trace]


@dataclass(frozen=True)
class _TaskProblem:
    """A task of a taskset, found again by its number where it is used."""

    env_config: str
    number: int

    @property
    def question(self) -> str:
        return f"task {self.number}"


@dataclass
class _TaskGroup(EnvGroupBuilder):
    """One task, several times. It can be pickled: the taskset is loaded where it is used."""

    data: VerifiersTasksetBuilder
    first: int
    num_tasks: int
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Return new episodes of the task."""
        data = self.data
        problem = _TaskProblem(data.env_config, self.first + self.number % self.num_tasks)
        agent = AgentTask(
            _run, _score, timeout_seconds=data.timeout_seconds, record_to=data.record_to
        )
        renderer = data.build_renderer()
        return [AgentEnv(agent, problem, renderer) for _ in range(data.group_size)]

    def logging_tags(self) -> list[str]:
        """Return the name of the taskset."""
        return [str(json.loads(self.data.env_config)["taskset"]["id"])]


@chz.chz
class VerifiersTasksetBuilder(RenderedDatasetBuilder):
    """The tasks of an installed taskset in order; the first ones are held out."""

    env_config: str = chz.field(
        doc='Settings of the environment (vf.EnvConfig) as a JSON object: {"taskset": {"id": ...}}.'
    )
    num_batches: int = chz.field(doc="Number of training steps.")
    num_tasks: int = chz.field(default=10_000, doc="Maximum number of tasks to train on.")
    test_problems: int = chz.field(default=0, doc="Number of held-out tasks.")
    timeout_seconds: float = chz.field(default=600.0, doc="Maximum seconds of one episode.")
    record_to: str = chz.field(default="", doc="Folder for files of recorded calls; none if empty.")

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return training and held-out tasks.

        Raises:
            ConfigurationError: the environment cannot be loaded, or has too few tasks.
        """
        wanted = self.test_problems + self.num_tasks
        found = len(await asyncio.to_thread(_load_tasks, self.env_config, wanted))
        num_trained = found - self.test_problems
        if num_trained < 1:
            raise ConfigurationError(
                f"test_problems={self.test_problems} leaves none of {found} tasks to train on; use "
                "a smaller number."
            )
        trained = NumberedDataset(
            partial(_TaskGroup, self, self.test_problems, num_trained),
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
            first=self.seed * self.num_batches * self.groups_per_batch,
        )
        if not self.test_problems:
            return trained, None
        held_out = NumberedDataset(
            partial(_TaskGroup, self, 0, self.test_problems),
            num_batches=1,
            groups_per_batch=self.test_problems,
        )
        return trained, held_out


async def _run(problem: _TaskProblem, address: Address) -> _Episode:
    """Run one episode on the endpoint."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    task = await asyncio.to_thread(_load_task, problem.env_config, problem.number)
    # The environment holds the servers of its episode, so each episode has a separate one.
    environment = await asyncio.to_thread(_load_environment, problem.env_config)
    # verifiers reads keys from variables. A name with API_KEY is not passed to the harness.
    variable = f"ROLLOUT_API_KEY_{secrets.token_hex(8)}"
    os.environ[variable] = address.api_key
    try:
        client = vf.EvalClientConfig(base_url=address.base_url, api_key_var=variable)
        context = vf.ModelContext(model=address.model, client=client)
        async with environment.serving():
            episode: _Episode = await environment.run_episode(task, context)
    finally:
        del os.environ[variable]
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise TrainingError(f"{problem.question} of verifiers failed: {_describe(errors)}")
    return episode


def _score(episode: _Episode, problem: _TaskProblem) -> Grade:
    """Return the reward that the task gave, and its metrics."""
    metrics: dict[str, float] = {}
    for trace in episode.traces:
        found = {name: value for name, value in trace.metrics.items() if value is not None}
        metrics |= {name: float(value) for name, value in found.items()}
    return Grade(float(sum(trace.reward for trace in episode.traces)), metrics=metrics)


def _describe(errors: Sequence[object]) -> str:
    if not errors:
        return "without an error message"
    last = errors[-1]
    return f"{getattr(last, 'type', 'error')}: {str(getattr(last, 'message', last))[-1000:]}"


def _load_environment(env_config: str) -> Any:
    """Return a new environment.

    Raises:
        ConfigurationError: without the package, or if the environment cannot be loaded.
    """
    try:
        import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
        from verifiers.v1.configs.agent import (  # pyright: ignore[reportMissingImports]
            agent_config_fields,
        )
    except ImportError as error:
        raise ConfigurationError(
            "VerifiersTasksetBuilder needs verifiers 0.4; run pip install 'verifiers>=0.4,<0.5'."
        ) from error
    try:
        config = vf.resolve_env_config(json.loads(env_config))
        environment = vf.load_environment(config)
    except Exception as error:  # loading runs code of the environment
        raise ConfigurationError(
            f"env_config={env_config} cannot be loaded ({type(error).__name__}: {error}); install "
            "the environment, and check its settings."
        ) from error
    agents = agent_config_fields(config)
    if len(agents) != 1:
        raise ConfigurationError(
            f"env_config={env_config} has the agents {', '.join(agents)}, and all their calls "
            "would be trained on; use an environment with one agent."
        )
    return environment


@functools.lru_cache(maxsize=4)
def _load_tasks(env_config: str, limit: int) -> Sequence[object]:
    return list(itertools.islice(_load_environment(env_config).taskset, limit))


@functools.lru_cache(maxsize=1024)
def _load_task(env_config: str, number: int) -> object:
    return next(itertools.islice(_load_environment(env_config).taskset, number, None))
