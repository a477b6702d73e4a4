"""Environments that run a program: its calls become the trajectory, within limits."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.rl.envs import ScriptedPolicy
from tinker_cookbook.capture import Address, read_calls, run_program
from tinker_cookbook.completers import TinkerTokenCompleter, TokenCompleter
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, TrainingError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.agent_env import AgentEnv, AgentTask, agent_data
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.problem_env import Grade
from tinker_cookbook.rl.problems import Problem
from tinker_cookbook.rl.rollout_limits import RolloutConfig, RolloutLimits
from tinker_cookbook.rl.rollout_runner import RolloutHooks, RolloutState, run_rollout
from tinker_cookbook.rl.rollouts import RolloutSettings, rollout_group, set_rollout_executor
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.utils.sdk_compat import wait_for_client

PROBLEM = Problem("What is snow?", "water")
PROGRAM = """
import sys, openai
client = openai.OpenAI(max_retries=0)
question = sys.stdin.read()
for _ in range(2):
    reply = client.chat.completions.create(
        model="m", max_tokens=4, messages=[{"role": "user", "content": question}]
    )
print(reply.choices[0].finish_reason)
"""


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> Renderer:
    return get_renderer(
        "qwen2_5", get_tokenizer(str(tiny_model_folder)), model_name=str(tiny_model_folder)
    )


@pytest.fixture(scope="module")
def policy(local_service, shared_client) -> TokenCompleter:
    client = wait_for_client(shared_client.create_sampling_client(base_model=local_service.model))
    return TinkerTokenCompleter(client, 8, seed=3)


async def ask(address: Address, times: int = 1) -> str:
    """A small agent: repeat a question."""
    text = ""
    client = openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key, max_retries=0)
    async with client:
        for _ in range(times):
            reply = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "What is snow?"}]
            )
            text = reply.choices[0].message.content or ""
    return text


async def ask_three_times(problem: Problem, address: Address) -> str:
    return await ask(address, 3)


async def ask_nothing(problem: Problem, address: Address) -> str:
    return "water"


async def ask_and_hang(problem: Problem, address: Address) -> str:
    await ask(address)
    await asyncio.sleep(60)
    return ""


async def ask_at_once(problem: Problem, address: Address) -> list[str]:
    return await asyncio.gather(*(ask(address) for _ in range(5)))


async def run_as_program(problem: Problem, address: Address) -> str:
    command = [sys.executable, "-c", PROGRAM]
    outcome = await run_program(command, address, stdin=str(problem.question))
    return outcome.raise_for_status().stdout


def is_text(outcome: str, problem: Problem) -> Grade:
    return Grade(0.5, {"characters": len(outcome)}, "because")


def is_anything(outcome: object, problem: Problem) -> float:
    return 1.0


@pytest.mark.anyio
async def test_the_calls_of_an_agent_are_its_trajectory(policy, renderer, tmp_path: Path):
    task = AgentTask(ask_three_times, is_text, record_to=str(tmp_path))
    done = await run_rollout(policy, AgentEnv(task, PROBLEM, renderer))
    [path] = tmp_path.glob("calls-*.jsonl")
    recorded = list(read_calls(path))
    assert [turn.ac.tokens for turn in done.transitions] == [call.tokens for call in recorded]
    assert [turn.ac.logprobs for turn in done.transitions] == [call.logprobs for call in recorded]
    assert [turn.reward for turn in done.transitions] == [0.0, 0.0, 0.5]
    last = done.transitions[-1]
    assert last.metrics["agent_calls"] == last.metrics["agent_sequences"] == 3
    assert last.metrics["stop/completed"] == 1
    assert last.logs == {"reason": "because"}
    assert done.stop_reason == "completed"
    assert len(trajectory_to_data(done, 1.0)) == 3


@pytest.mark.anyio
async def test_a_program_finds_its_model_in_the_environment(policy, renderer):
    env = AgentEnv(AgentTask(run_as_program, is_anything), PROBLEM, renderer)
    done = await run_rollout(policy, env)
    assert len(done.transitions) == 2
    assert all(len(turn.ac.tokens) <= 4 for turn in done.transitions)


@pytest.mark.anyio
async def test_calls_at_the_same_time_are_all_recorded(policy, renderer):
    env = AgentEnv(AgentTask(ask_at_once, is_anything), PROBLEM, renderer)
    assert len((await run_rollout(policy, env)).transitions) == 5


@pytest.mark.anyio
async def test_an_agent_without_calls_has_a_reward_and_no_data(renderer):
    env = AgentEnv(AgentTask(ask_nothing, is_text), PROBLEM, renderer)
    done = await run_rollout(ScriptedPolicy(), env)
    assert [turn.reward for turn in done.transitions] == [0.5]
    assert done.transitions[0].metrics["agent_calls"] == 0
    assert trajectory_to_data(done, 1.0) == []


@pytest.mark.anyio
async def test_a_limit_on_turns_ends_an_agent_that_goes_further(policy, renderer):
    env = AgentEnv(AgentTask(ask_three_times, is_text, limit_reward=-1.0), PROBLEM, renderer)
    done = await run_rollout(policy, env, limits=RolloutLimits(max_turns=2))
    assert (len(done.transitions), done.stop_reason) == (2, "max_turns")
    assert [turn.reward for turn in done.transitions] == [0.0, -1.0]


@pytest.mark.anyio
async def test_a_hanging_agent_is_ended_and_keeps_its_calls(policy, renderer):
    env = AgentEnv(AgentTask(ask_and_hang, is_text, timeout_seconds=3.0), PROBLEM, renderer)
    done = await run_rollout(policy, env)
    assert (len(done.transitions), done.stop_reason) == (1, "rollout_timeout")


@pytest.mark.anyio
async def test_the_error_of_the_policy_is_raised_and_not_that_of_the_client(renderer):
    class Broken(TokenCompleter):
        async def __call__(self, model_input, stop, *, max_tokens=None):
            raise TrainingError("the service is gone")

    env = AgentEnv(AgentTask(ask_three_times, is_text), PROBLEM, renderer)
    with pytest.raises(TrainingError, match="the service is gone"):
        await run_rollout(Broken(), env)


@pytest.mark.anyio
async def test_the_agents_own_error_is_raised(renderer):
    async def broken(problem: Problem, address: Address) -> str:
        raise ZeroDivisionError("in the agent")

    env = AgentEnv(AgentTask(broken, is_text), PROBLEM, renderer)
    with pytest.raises(ZeroDivisionError, match="in the agent"):
        await run_rollout(ScriptedPolicy(), env)


@pytest.mark.anyio
async def test_rewards_must_be_finite_and_hooks_are_refused(renderer):
    env = AgentEnv(AgentTask(ask_nothing, lambda *_: float("nan")), PROBLEM, renderer)
    with pytest.raises(DataValidationError, match="reward=nan"):
        await run_rollout(ScriptedPolicy(), env)

    class Hooks(RolloutHooks):
        async def on_turn_begin(self, state: RolloutState) -> None: ...
        async def on_stop_reason(self, reason: str, state: RolloutState) -> None: ...
        async def on_grade(self, state: RolloutState) -> None: ...
        async def on_artifacts(self, state: RolloutState) -> None: ...

    with pytest.raises(ConfigurationError, match="hooks cannot be called by AgentEnv"):
        await run_rollout(ScriptedPolicy(), env, hooks=Hooks())
    with pytest.raises(ConfigurationError, match="turn by turn"):
        await env.initial_observation()


@pytest.mark.anyio
async def test_a_group_runs_in_an_executor(policy, renderer, tiny_model_folder: Path):
    """Each group has a separate event loop and endpoint there. Threads stand for processes."""
    data_class = agent_data(lambda split: [PROBLEM] * 2, ask_three_times, is_anything)
    data = data_class(  # pyright: ignore[reportCallIssue]
        model_name=str(tiny_model_folder),
        renderer_name="qwen2_5",
        groups_per_batch=2,
        group_size=2,
    )
    groups = (await data())[0].get_batch(0)
    settings = RolloutSettings(config=RolloutConfig())
    with ThreadPoolExecutor(2) as executor:
        set_rollout_executor(executor)
        try:
            done = await asyncio.gather(*(rollout_group(g, policy, settings) for g in groups))
        finally:
            set_rollout_executor(None)
    assert [len(t.transitions) for group in done for t in group.trajectories_G] == [3] * 4


@pytest.mark.anyio
async def test_a_program_and_its_children_are_killed_at_the_limit(tmp_path: Path):
    child = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    code = (
        "import subprocess, sys, time; print('started', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child + '; time.sleep(60)'!r}]); time.sleep(60)"
    )
    address = Address("http://127.0.0.1:9/v1", "key", "m")
    started = time.monotonic()
    outcome = await run_program([sys.executable, "-c", code], address, timeout_seconds=5.0)
    assert time.monotonic() - started < 30
    assert (outcome.timed_out, outcome.stdout) == (True, "started\n")
    with pytest.raises(TrainingError, match="ran out of time"):
        outcome.raise_for_status()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in _state(pid):
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the child is still running")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][:1]
    except OSError:
        return "Z"


@pytest.mark.anyio
async def test_a_program_sees_its_own_keys_and_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "other")
    code = "import os, json; print(json.dumps(dict(os.environ))); print('x' * 100)"
    address = Address("http://127.0.0.1:9/v1", "key", "m")
    outcome = await run_program(
        [sys.executable, "-c", code], address, environment={"MORE": "1"}, max_output_bytes=2**16
    )
    assert '"OPENAI_API_KEY": "key"' in outcome.stdout
    assert '"MORE": "1"' in outcome.stdout
    assert "secret" not in outcome.stdout
    assert "OPENAI_ORG_ID" not in outcome.stdout
    assert os.environ["TINKER_API_KEY"] == "secret"
    short = await run_program([sys.executable, "-c", code], address, max_output_bytes=10)
    assert len(short.stdout) == 10
