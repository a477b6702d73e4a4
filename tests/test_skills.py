"""The skills for coding assistants: their front matter, their commands, and their code, run."""

# pyright: reportArgumentType=false

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest

from tests.assets import load_tokenizer
from tests.recipes.recipe_process import recipe_environment, run_recipe
from tinker_cookbook import cli
from tinker_cookbook.renderers import get_renderer, unregister_renderer

ROOT = Path(__file__).parent.parent
SKILLS = sorted((ROOT / "skills").glob("*/SKILL.md"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)


def code(skill: str, name: str) -> str:
    path = ROOT / "skills" / skill / "SKILL.md"
    [found] = [block for block in blocks(path, "python") if block.startswith(f"# {name}\n")]
    return found


def run_file(folder: Path, skill: str, name: str) -> dict:
    (folder / name).write_text(code(skill, name), encoding="utf-8")
    return runpy.run_path(str(folder / name), run_name="skill")


def test_there_is_a_skill_for_each_kind_of_work():
    assert [path.parent.name for path in SKILLS] == [
        "write-environment",
        "write-recipe",
        "write-renderer",
    ]


@pytest.mark.parametrize("path", SKILLS, ids=lambda path: path.parent.name)
def test_front_matter_names_the_folder_and_says_when(path: Path):
    found = re.match(r"---\nname: (.+)\ndescription: (.+)\n---\n", path.read_text("utf-8"))
    assert found is not None
    assert found[1] == path.parent.name
    assert "Use " in found[2]
    assert len(found[2]) <= 1024


@pytest.mark.parametrize("path", SKILLS, ids=lambda path: path.parent.name)
def test_every_command_exists(path: Path):
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    assert lines
    for words in map(shlex.split, lines):
        if words[0] == "tinker-cookbook":
            assert words[1] in cli.find_commands(), words
        else:
            assert words[:2] == ["python", "-m"], words
            assert importlib.util.find_spec(words[2]) is not None, words


def test_the_recipe_trains(local_service, tmp_path: Path):
    (tmp_path / "my_recipe.py").write_text(code("write-recipe", "my_recipe.py"), encoding="utf-8")
    environment = recipe_environment(local_service, tmp_path)
    environment["PYTHONPATH"] += f":{tmp_path}"
    settings = (f"model_name={local_service.model}", "renderer_name=role_colon", "max_steps=2")
    done = run_recipe(
        "my_recipe", *settings, f"log_path={tmp_path}/run", env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "iteration_000001" / "train.html").is_file()
    told = run_recipe("my_recipe", "--help", env=environment, cwd=tmp_path)
    assert "group_size=4" in told.stdout


@pytest.mark.parametrize("name", ["my_problems.py", "my_env.py", "my_tools.py"])
def test_the_environments_run(name: str, tmp_path: Path):
    assert run_file(tmp_path, "write-environment", name)


def test_the_renderer_writes_what_chatml_writes(tmp_path: Path):
    tokenizer = load_tokenizer("qwen3")
    show = run_file(tmp_path, "write-renderer", "use_renderer.py")["show"]
    run_file(tmp_path, "write-renderer", "my_renderer.py")
    try:
        renderer = get_renderer("mine", tokenizer)
    finally:
        assert unregister_renderer("mine")
    assert show(renderer) == show(get_renderer("chatml", tokenizer)) == "Hello<|im_end|>"
    talk = [{"role": "user", "content": "Hi"}]
    prompt = get_renderer("chatml", tokenizer).build_generation_prompt(talk)
    assert renderer.build_generation_prompt(talk) == prompt
