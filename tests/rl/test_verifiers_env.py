"""Environments of verifiers: with the package where it is installed, else in a slow test."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tinker

from tests.assets import load_tokenizer
from tinker_cookbook import renderers
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.verifiers_env import VerifiersDatasetBuilder, VerifiersEnv

ROOT = Path(__file__).parents[2]
sys.path += [path for path in [os.environ.get("VERIFIERS_PATH")] if path]
try:
    import verifiers  # pyright: ignore[reportMissingImports]
except ImportError:
    verifiers = None
needs_verifiers = pytest.mark.skipif(verifiers is None, reason="verifiers is not installed")
# The package and those it needs warn of much that is not ours.
# No mark without the package: a filter of the module would be asked before those of the project.
pytestmark = [pytest.mark.filterwarnings("default")] if verifiers else []

TOY = '''
import verifiers as vf
from datasets import Dataset

ROWS = [{"question": f"Say {word}.", "answer": word} for word in ("red", "blue", "green")]

def last_text(completion):
    message = completion[-1]
    content = message["content"] if isinstance(message, dict) else message.content
    return content or ""

async def says_it(completion, answer, **kwargs):
    return float(last_text(completion) == answer)

class Again(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "Once more."}]

async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

def load_environment(kind="single"):
    settings = {"dataset": Dataset.from_list(ROWS), "eval_dataset": Dataset.from_list(ROWS[2:]),
                "rubric": vf.Rubric(funcs=[says_it])}
    if kind == "multi":
        return Again(max_turns=2, **settings)
    if kind == "tools":
        return vf.ToolEnv(tools=[add], max_turns=3, **settings)
    return vf.SingleTurnEnv(**settings)
'''


@pytest.mark.skipif(verifiers is not None, reason="verifiers is installed")
def test_without_the_package_its_extra_is_named():
    data = builder("single")
    with pytest.raises(ConfigurationError, match=r"pip install 'tinker-cookbook\[verifiers\]'"):
        data.load()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(verifiers is not None, reason="verifiers is installed")
def test_with_the_package_in_a_folder_of_its_own(tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, "verifiers>=0.1.14,<0.2"], check=True)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"VERIFIERS_PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "6 passed" in found.stdout


def builder(kind: str) -> VerifiersDatasetBuilder:
    return VerifiersDatasetBuilder(
        model_name="m",
        renderer_name="qwen3_instruct",
        groups_per_batch=2,
        group_size=2,
        env_id="toy-words",
        env_args=f'{{"kind": "{kind}"}}',
        num_batches=2,
        test_problems=1,
    )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_words.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture(scope="module")
def renderer() -> renderers.Renderer:
    return renderers.get_renderer("qwen3_instruct", load_tokenizer("qwen3_instruct_2507"))


class Saying(TokenCompleter):
    def __init__(self, renderer: renderers.Renderer, *texts: str) -> None:
        self._renderer = renderer
        self._texts = list(texts)
        self.prompts: list[str] = []

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        self.prompts.append(str(self._renderer.tokenizer.decode(model_input.to_ints())))
        tokens = self._renderer.tokenizer.encode(self._texts.pop(0), add_special_tokens=False)
        tokens = [*tokens, int(self._renderer.get_stop_sequences()[0])]
        return TokensWithLogprobs(tokens, [-1.0] * len(tokens))


def play(renderer, kind: str, *texts: str):
    environment = builder(kind).load()
    row = environment.get_dataset()[0]
    policy = Saying(renderer, *texts)
    env = EnvFromMessageEnv(renderer, VerifiersEnv(environment, row, renderer.declare_tools))
    return asyncio.run(run_rollout(policy, env)), policy


@needs_verifiers
@pytest.mark.parametrize(("text", "reward"), [("red", 1.0), ("blue", 0.0)])
def test_one_turn_is_scored_by_the_rubric(toy, renderer, text: str, reward: float):
    done, policy = play(renderer, "single", text)
    assert [turn.reward for turn in done.transitions] == [reward]
    assert done.transitions[0].metrics["says_it"] == reward
    assert "Say red." in policy.prompts[0]


@needs_verifiers
def test_turns_share_one_datum(toy, renderer):
    done, policy = play(renderer, "multi", "blue", "red")
    assert [turn.reward for turn in done.transitions] == [0.0, 1.0]
    assert "Once more." in policy.prompts[1]
    assert len(trajectory_to_data(done, 1.0)) == 1


@needs_verifiers
def test_tools_are_declared_and_called(toy, renderer):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 40}}\n</tool_call>'
    done, policy = play(renderer, "tools", call, "red")
    assert '"name": "add"' in policy.prompts[0]
    assert "42" in policy.prompts[1]
    assert [turn.reward for turn in done.transitions] == [0.0, 1.0]
    assert len(trajectory_to_data(done, 1.0)) == 1


@needs_verifiers
def test_groups_pickle_and_end_what_was_cut_off(toy, renderer):
    data = builder("multi")
    trained, held_out = asyncio.run(data())
    assert held_out is not None
    assert (len(trained), len(held_out.get_batch(0))) == (2, 1)
    group = pickle.loads(pickle.dumps(trained.get_batch(0)[1]))
    environment = data.load()

    async def begin() -> bool:
        env = VerifiersEnv(environment, environment.get_dataset()[1], renderer.declare_tools)
        group.made.append(env)
        await env.initial_observation()
        await group.cleanup()
        await asyncio.sleep(0.05)
        assert env._episode is not None
        return env._episode.done()

    assert asyncio.run(begin())


@needs_verifiers
def test_an_environment_that_is_not_installed_is_named(toy):
    data = VerifiersDatasetBuilder(
        model_name="m",
        renderer_name="chatml",
        groups_per_batch=1,
        group_size=2,
        env_id="no-such-env",
        num_batches=1,
    )
    with pytest.raises(ConfigurationError, match=r"env_id=no-such-env .* cannot be loaded"):
        data.load()
