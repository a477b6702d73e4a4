"""docs/adding_an_environment.md: every block of its code runs, with a real renderer and policy."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from recipes import play_env
from tests.assets import load_tokenizer
from tests.recipes.recipe_process import recipe_environment, run_recipe
from tests.rl.envs import ScriptedPolicy
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.rl.rollouts import do_group_rollout
from tinker_cookbook.rl.types import EnvGroupBuilder, TrajectoryGroup

PAGE = (Path(__file__).parents[2] / "docs/adding_an_environment.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(# (\w+\.py)\n.*?)^```$", PAGE, re.M | re.S)
FILES = {name: text for text, name in BLOCKS}
TOKENIZER = load_tokenizer("qwen3")
RENDERER = get_renderer("qwen3_disable_thinking", TOKENIZER)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of the page, importable."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def group_of(module: ModuleType, number: int = 0) -> EnvGroupBuilder:
    """A group of the page's first training problem, in its given order."""
    data = module.Data(model_name="none", renderer_name="none", groups_per_batch=1, group_size=2)
    problem = module.problems("train")[number]
    return data.make_group(problem, RENDERER, 2)


def roll_out(builder: EnvGroupBuilder, *replies: str) -> TrajectoryGroup:
    """Play the group with these replies in turn; both members say the same."""
    script = [TOKENIZER.encode(f"{reply}<|im_end|>", add_special_tokens=False) for reply in replies]

    class Script(ScriptedPolicy):
        def for_rollout(self, *names: int | str) -> ScriptedPolicy:
            return ScriptedPolicy(script)

    return asyncio.run(do_group_rollout(builder, Script()))


def test_every_block_of_code_is_one_of_the_files():
    assert len(BLOCKS) == PAGE.count("```python")
    assert list(FILES) == [
        "alliteration.py",
        "test_alliteration.py",
        "countdown.py",
        "dictionary.py",
    ]


def test_two_functions(folder: Path):
    runpy.run_path(str(folder / "test_alliteration.py"))
    group = roll_out(group_of(importlib.import_module("alliteration")), "ants apples")
    assert group.get_total_rewards() == [0.4, 0.4]
    [turn] = group.trajectories_G[0].transitions
    assert turn.logs == {"reference_answer": "a", "reason": "2 of 2 words"}


def test_several_turns(folder: Path):
    builder = group_of(importlib.import_module("countdown"))
    assert roll_out(builder, "9", "8", "7").get_total_rewards() == [1.0, 1.0]
    assert roll_out(builder, "9", "7").get_total_rewards() == [0.0, 0.0]


def test_tools(folder: Path):
    builder = group_of(importlib.import_module("dictionary"))
    call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "snow"}}\n</tool_call>'
    group = roll_out(builder, call, "Snow is frozen water.")
    assert group.get_total_rewards() == [1.0, 1.0]
    assert group.trajectories_G[0].transitions[0].metrics["num_tool_calls"] == 1
    assert roll_out(builder, "I do not know.").get_total_rewards() == [0.0, 0.0]


def test_the_recipe_trains(folder: Path, local_service):
    environment = recipe_environment(local_service, folder)
    environment["PYTHONPATH"] += f":{folder}"
    settings = (f"model_name={local_service.model}", "renderer_name=role_colon", "max_steps=2")
    done = run_recipe(
        "alliteration", *settings, f"log_path={folder}/run", env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    page = (folder / "run" / "iteration_000001" / "train.html").read_text(encoding="utf-8")
    assert "begin with the letter" in page
    assert (folder / "run" / "iteration_000000" / "eval_test.html").is_file()


@pytest.mark.parametrize("name", ["alliteration", "countdown", "dictionary"])
def test_the_commands_find_the_data(folder: Path, name: str):
    config = play_env.Config(env=f"{name}:Data")
    builder = play_env.build_dataset_builder(config, "Qwen/Qwen3-8B")
    assert isinstance(builder, importlib.import_module(name).Data)


def test_every_command_exists():
    [block] = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)
    for words in map(shlex.split, block.splitlines()):
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None
        else:
            assert words[1] in FILES
