"""What pip installs: a wheel with the recipes and their data, and a client that needs no torch."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tinker_cookbook import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_version_is_stated_once_and_the_same():
    assert PROJECT["version"] == __version__


def test_torch_comes_only_with_the_extra():
    base = [requirement.split(">")[0] for requirement in PROJECT["dependencies"]]
    assert "torch" not in base
    assert any(name.startswith("torch>") for name in PROJECT["optional-dependencies"]["local"])


def test_every_requirement_has_both_bounds():
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]
    for requirement in requirements:
        if not requirement.startswith("tinker-cookbook["):
            assert "==" in requirement or (">=" in requirement and "<" in requirement), requirement


OUTSIDE_THE_LOCK = {
    "verifiers",
    "verifiers-v1",
    "litellm",
    "trackio",
    "inspect",
    "tensorboard",
    "mlflow",
}
"""Extras whose packages would hold others back, or are many; .ci/lock leaves them out."""


def test_the_lock_holds_an_accepted_release_of_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    locked: dict[str, list[str]] = {}
    for line in filter(lambda line: "==" in line, lines):
        requirement = Requirement(line)
        [release] = requirement.specifier
        locked.setdefault(canonicalize_name(requirement.name), []).append(release.version)
    extras = PROJECT["optional-dependencies"].items()
    wanted = PROJECT["dependencies"] + [
        text for extra, texts in extras if extra not in OUTSIDE_THE_LOCK for text in texts
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:
            continue
        releases = locked[canonicalize_name(requirement.name)]
        assert all(map(requirement.specifier.contains, releases)), (requirement, releases)


# The imports that a client without torch makes; run where `import torch` fails.
WITHOUT_TORCH = """
import importlib, pkgutil, sys
sys.modules["torch"] = None
import tinker_cookbook
optional = ["eval.inspect_", "eval.run_inspect", "eval.custom_inspect", "third_party.litellm"]
left_out = tuple(f"tinker_cookbook.{name}" for name in ["local", "recipes", *optional])
for module in pkgutil.walk_packages(tinker_cookbook.__path__, "tinker_cookbook."):
    if not module.name.startswith(left_out):
        importlib.import_module(module.name)
import tinker
"""
WITHOUT_THE_COMPILER = """
import sys
import torch

before = set(sys.modules)
import tinker_cookbook.local.engine.host
import tinker_cookbook.local.process.launch

slow = ("sympy", "torch._dynamo", "torch._inductor", "transformers")
assert not (found := [name for name in slow if name in sys.modules.keys() - before]), found
"""


def test_client_modules_import_without_torch():
    run(sys.executable, "-W", "error", "-c", WITHOUT_TORCH, cwd=ROOT)


def test_the_local_service_starts_without_the_slow_parts_of_torch():
    """torch's compiler and sympy take as long to import as torch itself."""
    run(sys.executable, "-c", WITHOUT_THE_COMPILER, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), ".", cwd=ROOT)
    [path] = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_data_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source in (ROOT / "recipes").rglob("*"):
        if source.is_file() and "__pycache__" not in source.parts:
            assert f"tinker_cookbook/recipes/{source.relative_to(ROOT / 'recipes')}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    roots = {name.split("/")[0] for name in names}
    assert roots == {"tinker_cookbook", f"tinker_cookbook-{__version__}.dist-info"}


@pytest.mark.slow
def test_an_installed_wheel_lists_runs_and_copies_recipes(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--disable-pip-version-check", "--target", str(site), str(wheel)),
        cwd=tmp_path,
    )
    # Goes before the editable install of the checkout.
    environment = os.environ | {"PYTHONPATH": str(site)}
    cli = (sys.executable, "-m", "tinker_cookbook.cli")
    listing = run(*cli, "recipes", cwd=tmp_path, env=environment)
    assert "python -m tinker_cookbook.recipes.NAME" in listing
    lines = listing.splitlines()
    for name in (line.split()[0] for line in lines[: lines.index("")]):
        module = f"tinker_cookbook.recipes.{name}"
        help_text = run(sys.executable, "-m", module, "--help", cwd=tmp_path, env=environment)
        assert "base_url" in help_text
    run(*cli, "copy", "sl_basic", "mine", cwd=tmp_path, env=environment)
    assert (tmp_path / "mine" / "data" / "conversations.jsonl").is_file()
