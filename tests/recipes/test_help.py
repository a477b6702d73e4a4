"""`--help` of every recipe: its own settings explained, the shared ones on a few lines."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from types import ModuleType

import chz
import pytest

from tests.recipes.recipe_process import ROOT, run_in_this_process
from tinker_cookbook.commands.parts.recipe_files import find_recipes
from tinker_cookbook.settings_help import SHARED_TITLE, WIDTH

MAX_SHARED_LINES = 25


@pytest.fixture(params=list(find_recipes()))
def module(request: pytest.FixtureRequest) -> ModuleType:
    is_folder = find_recipes()[request.param].path.is_dir()
    suffix = ".__main__" if is_folder else ""
    return importlib.import_module(f"recipes.{request.param}{suffix}")


def help_of(module: ModuleType, word: str, capsys: pytest.CaptureFixture[str]) -> str:
    run_in_this_process(module, [word])
    return capsys.readouterr().out


def own_keys(module: ModuleType) -> list[str]:
    """The settings that the recipe's own classes declare."""
    # `recipes.NAME`; a recipe of a collection shares classes with the other modules of it.
    package = ".".join(module.__name__.split(".")[:2])
    classes = [c for c in module.Config.__mro__ if c.__module__.startswith(package)]
    return list(dict.fromkeys(name for c in classes for name in vars(c)["__annotations__"]))


def explained_keys(text: str) -> list[str]:
    return re.findall(r"^  (\w+)=.*  \(.*\)\n      \S", text, re.M)


def test_help_explains_the_recipes_settings_and_lists_the_shared_ones(module, capsys):
    text = help_of(module, "--help", capsys)
    assert text.startswith((module.__doc__ or "").strip().partition("\n")[0])
    assert explained_keys(text) == own_keys(module)
    shared = text.partition(SHARED_TITLE)[2].splitlines()
    assert len(shared) <= MAX_SHARED_LINES
    listed = [word.partition("=")[0] for line in shared for word in line.split()]
    rest = set(chz.chz_fields(module.Config)) - set(own_keys(module))
    assert rest <= set(listed)
    settings = text.partition("Settings of this recipe:")[2]
    assert max(map(len, settings.splitlines())) <= WIDTH + 10


def test_all_help_explains_every_setting_once_and_begins_with_the_recipes(module, capsys):
    keys = explained_keys(help_of(module, "--help-all", capsys))
    assert sorted(keys) == sorted(chz.chz_fields(module.Config))
    own = own_keys(module)
    assert keys[: len(own)] == own


def test_every_text_is_a_sentence_by_itself(module):
    for name, setting in read_settings(module).items():
        assert re.match(r"[A-Z`<]|tinker://", setting), f"{name}: {setting}"
        assert setting.endswith("."), f"{name}: {setting}"
        assert len(setting.split()) >= 2, f"{name}: {setting}"
        assert not re.match(r"(Of|Its|As|The same|That of|Not|It)\b", setting), f"{name}: {setting}"


def read_settings(module: ModuleType) -> dict[str, str]:
    from tinker_cookbook.settings_help import read_settings_of

    return {key: found.doc for key, found in read_settings_of(module.Config).items()}


@pytest.mark.parametrize("name", list(find_recipes()))
def test_help_imports_nothing_heavy(name: str):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"recipes.{name}", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "chz" in imported
    assert not {"torch", "tinker", "transformers", "datasets"} & imported
