"""Environments of verifiers 0.4, whose harness calls the recording endpoint."""

# pyright: reportArgumentType=false

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tinker

from tinker_cookbook import renderers
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.verifiers_v1 import VerifiersTasksetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

pytest.importorskip("verifiers.v1")
# The package and those it needs warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("default")

TOY = '''
import httpx
import verifiers.v1 as vf

class WordData(vf.TaskData):
    answer: str = ""

class WordTask(vf.Task[WordData]):
    @vf.reward
    async def says_it(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)

class Words(vf.Taskset[WordTask, vf.TasksetConfig]):
    def load(self):
        for word in ("red", "blue", "green"):
            data = WordData(prompt=f"Say {word}.", answer=word)
            yield WordTask(data, self.config.task)

class TwoTurns(vf.Harness[vf.HarnessConfig]):
    """Asks, and asks once more."""
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        said = [{"role": "user", "content": data.prompt}]
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}) as client:
            for _ in range(2):
                url = f"{endpoint}/chat/completions"
                answer = await client.post(url, json={"model": ctx.model, "messages": said})
                if answer.status_code != 200:
                    return vf.ProgramResult(1, "", answer.text)
                said.append(answer.json()["choices"][0]["message"])
                said.append({"role": "user", "content": "Once more."})
        return vf.ProgramResult(0, "", "")

__all__ = ["Words", "TwoTurns"]
'''


class Saying(TokenCompleter):
    def __init__(self, renderer: renderers.Renderer, *texts: str) -> None:
        self._renderer = renderer
        self._texts = list(texts)
        self.prompts: list[str] = []

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        self.prompts.append(str(self._renderer.tokenizer.decode(model_input.to_ints())))
        if not self._texts:
            raise TrainingError("the service is gone")
        tokens = self._renderer.tokenizer.encode(self._texts.pop(0), add_special_tokens=False)
        tokens = [*tokens, int(self._renderer.get_stop_sequences()[0])]
        return TokensWithLogprobs(tokens, [-1.0] * len(tokens))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_taskset.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))


def builder(**settings: Any) -> VerifiersTasksetBuilder:
    env = {"taskset": {"id": "toy-taskset"}, "agent": {"runtime": {"type": "subprocess"}}}
    given: dict[str, Any] = {
        "env_config": json.dumps(env),
        "num_batches": 2,
        "test_problems": 1,
    } | settings
    return VerifiersTasksetBuilder(
        renderer_name="qwen2_5", groups_per_batch=2, group_size=2, **({"model_name": "m"} | given)
    )


def play(model: Path, *texts: str):
    renderer = renderers.get_renderer("qwen2_5", get_tokenizer(str(model)))

    async def run():
        trained, held_out = await builder(model_name=str(model))()
        assert held_out is not None
        assert (len(trained), len(held_out.get_batch(0))) == (2, 1)
        group = pickle.loads(pickle.dumps(trained.get_batch(0)[0]))
        assert group.logging_tags() == ["toy-taskset"]
        policy = Saying(renderer, *texts)
        envs = await group.make_envs()
        assert len(envs) == 2
        return await run_rollout(policy, envs[0]), policy

    return asyncio.run(run())


@pytest.mark.parametrize(("last", "reward"), [("blue", 1.0), ("red", 0.0)])
def test_the_task_grades_the_episode_and_its_calls_are_one_datum(
    toy, tiny_model_folder: Path, last: str, reward: float
):
    done, policy = play(tiny_model_folder, "green", last)
    assert "Say blue." in policy.prompts[0]  # the first task is held out
    assert "Once more." in policy.prompts[1]
    assert [turn.reward for turn in done.transitions] == [0.0, reward]
    assert done.transitions[-1].metrics["agent_calls"] == 2
    assert len(trajectory_to_data(done, 1.0)) == 1


def test_an_error_of_the_service_is_told(toy, tiny_model_folder: Path):
    with pytest.raises(TrainingError, match="the service is gone"):
        play(tiny_model_folder, "green")


def test_what_cannot_be_loaded_is_named(toy):
    missing = builder(env_config='{"taskset": {"id": "no-such-taskset"}}')
    with pytest.raises(ConfigurationError, match=r"env_config=.*no-such-taskset.*cannot be loaded"):
        asyncio.run(missing())
    with pytest.raises(ConfigurationError, match="test_problems=3 leaves none of 3 tasks"):
        asyncio.run(builder(test_problems=3)())
