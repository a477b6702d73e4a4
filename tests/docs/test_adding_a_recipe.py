"""The recipes of docs/adding_a_recipe.md train for two steps on a real service."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recipes.recipe_process import ROOT, metric_rows, recipe_environment, run_recipe

PAGE = (ROOT / "docs" / "adding_a_recipe.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "measured"), [("my_sft", "test/nll"), ("my_rl", "test/env/all/reward/total")]
)
def test_the_example_trains(name: str, measured: str, local_service, tmp_path: Path):
    [code] = re.findall(rf"^```python\n(# {name}\.py\n.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    environment = recipe_environment(local_service, tmp_path)
    settings = (f"model_name={local_service.model}", "renderer_name=role_colon", "max_steps=2")
    done = run_recipe(name, *settings, "lora_rank=2", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs" / name).iterdir()
    rows = metric_rows(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert measured in rows[0]
    assert measured in rows[-1]
    assert re.search(r"\nheld-out (loss|reward)  \S+ -> \S+\n", done.stdout)
    if name == "my_sft":
        assert "\nSpell tree.\n  before: " in done.stdout


@pytest.mark.parametrize("name", ["my_sft", "my_rl"])
def test_its_help_is_short(name: str, tmp_path: Path):
    [code] = re.findall(rf"^```python\n(# {name}\.py\n.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    told = run_recipe(name, "--help", env=recipe_environment(None, tmp_path), cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "batch" in told.stdout
    assert len(told.stdout.splitlines()) < 50
