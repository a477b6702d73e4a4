"""The `tinker-cookbook` command: listing, copying, help, and mistakes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinker_cookbook import __version__, cli
from tinker_cookbook.commands.copy import copy_recipe
from tinker_cookbook.commands.parts.recipe_files import find_recipe, find_recipes
from tinker_cookbook.exceptions import ConfigurationError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], words: list[str]):
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    for path in (ROOT / "tinker_cookbook" / "commands").glob("[!_]*.py"):
        line = next(line for line in out.splitlines() if line.strip().startswith(path.stem))
        assert len(line.split()) > 3, f"{path} has no help line in its docstring"


@pytest.mark.parametrize("name", list(cli.find_commands()))
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str):
    assert cli.main([name, "--help"]) == 0
    assert f"tinker-cookbook {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tinker-cookbook {__version__}"


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipe"]) == 2
    assert "Did you mean 'recipes'?" in capsys.readouterr().err


def test_an_unknown_option_exits_2(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes", "--frobnicate"]) == 2
    assert "--frobnicate" in capsys.readouterr().err


def test_recipes_are_listed_one_line_each(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, recipe in find_recipes().items():
        [line] = [line for line in lines if line.split(" ")[0] == name]
        assert line.endswith(recipe.summary)
        assert recipe.summary.endswith(".")


def test_an_unknown_recipe_gets_the_list(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["copy", "book_stile", "anywhere"]) == 2
    err = capsys.readouterr().err
    assert "NAME=book_stile" in err
    assert "Did you mean 'book_style'?" in err


def test_python_m_of_an_unknown_recipe_names_the_nearest():
    for package in ("recipes", "tinker_cookbook.recipes"):
        if importlib.util.find_spec(package) is None:
            continue  # that one is there in a wheel alone
        done = subprocess.run(
            [sys.executable, "-m", f"{package}.rl_basick"], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "NAME=rl_basick is not a recipe. Did you mean 'rl_basic'?" in done.stderr
        assert "Traceback" not in done.stderr
    assert importlib.util.find_spec("recipes.rl_basick") is None  # programs may ask


def test_a_copy_holds_the_recipe_its_data_and_a_readme(tmp_path: Path):
    written = copy_recipe(find_recipe("book_style"), tmp_path / "mine")
    names = {str(path.relative_to(tmp_path / "mine")) for path in written}
    assert {"README.md", "book_style/__main__.py", "book_style/passages.py"} <= names
    assert "python -m book_style" in (tmp_path / "mine" / "README.md").read_text()


def test_a_copy_changes_no_file_of_yours(tmp_path: Path):
    recipe = find_recipe("book_style")
    copy_recipe(recipe, tmp_path)
    assert copy_recipe(recipe, tmp_path) == []
    changed = tmp_path / "book_style" / "__main__.py"
    changed.write_text("mine")
    (tmp_path / "book_style" / "passages.py").unlink()
    with pytest.raises(ConfigurationError, match=r"other versions of __main__\.py"):
        copy_recipe(recipe, tmp_path)
    assert changed.read_text() == "mine"
    assert not (tmp_path / "book_style" / "passages.py").exists(), "nothing is written then"


def test_a_readme_of_yours_is_left_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text("my project")
    copy_recipe(find_recipe("book_style"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    assert (tmp_path / "README-book_style.md").is_file()


def test_copying_onto_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file; name a folder"):
        copy_recipe(find_recipe("book_style"), tmp_path / "file")


# `python -m NAME` where no package `recipes` can be found, as with an installed wheel.
START_ALONE = """
import runpy, sys
sys.modules["recipes"] = None
name = sys.argv.pop(1)
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", list(find_recipes()))
def test_a_copied_recipe_starts_outside_the_checkout(tmp_path: Path, name: str):
    recipe = find_recipe(name)
    copy_recipe(recipe, tmp_path)
    for data in recipe.data_files():
        assert (tmp_path / "data" / data.name).read_bytes() == data.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", START_ALONE, recipe.module, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "base_url" in done.stdout


def test_output_into_a_closed_pipe_is_no_crash():
    command = f"{sys.executable} -m tinker_cookbook.cli recipes | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
