"""`tinker-cookbook doctor`: what is missing is named with the command that adds it."""

import json
import sys
from pathlib import Path

import pytest

from tinker_cookbook import cli

SECRET = "tml-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no keys, no models and no runs."""
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "cookbook"))
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict]]:
    status = cli.main(["doctor", "--json", *words])
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] == (status == 0)
    return status, {check["name"]: check for check in report["checks"]}


def quick(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict]]:
    return doctor(capsys, "--no-self-test")


def test_a_complete_machine_can_run_recipes(capsys: pytest.CaptureFixture[str], empty_home: Path):
    status, checks = doctor(capsys)
    assert status == 0, checks
    assert checks["self-test"]["state"] == "ok"
    assert "a tiny model was trained and sampled" in checks["self-test"]["text"]
    assert checks["numbers"]["text"].startswith(("float32: ", "bfloat16: "))
    assert checks["model"]["state"] == "note"  # it is downloaded by the first recipe
    assert not (empty_home / "runs").exists()
    assert not (empty_home / "cookbook").exists()


def test_every_check_is_one_line_and_one_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--no-self-test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Recipes can run."
    assert any(line.strip().startswith("-> ") for line in lines)
    for name in ("python", "packages", "torch", "processor", "compiler", "runs", "caches", "keys"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1


def test_keys_are_never_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    assert cli.main(["doctor", "--no-self-test"]) == 1
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert "TINKER_API_KEY is set" in captured.out
    assert "WANDB_API_KEY is not set" in captured.out


@pytest.mark.parametrize(
    ("variable", "value", "check", "fix"),
    [
        ("TINKER_BASE_URL", "http://127.0.0.1:9", "service", "unset TINKER_BASE_URL"),
        ("TINKER_API_KEY", "not-a-key", "service", "unset TINKER_BASE_URL TINKER_API_KEY"),
        ("TINKER_COOKBOOK_DTYPE", "int3", "numbers", "unset TINKER_COOKBOOK_DTYPE"),
        ("TINKER_COOKBOOK_RUNS_DIR", "/dev/null/runs", "runs", "export TINKER_COOKBOOK_RUNS_DIR="),
    ],
)
def test_what_forbids_a_recipe_ends_with_status_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    check: str,
    fix: str,
):
    monkeypatch.setenv(variable, value)
    status, checks = quick(capsys)
    assert status == 1
    assert [name for name, found in checks.items() if found["state"] == "missing"] == [check]
    assert checks[check]["fix"].startswith(fix)


def test_a_missing_compiler_is_a_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, empty_home: Path
):
    monkeypatch.setenv("PATH", str(empty_home))
    status, checks = quick(capsys)
    assert status == 0
    expected = "note" if sys.platform == "linux" else "ok"
    assert checks["compiler"]["state"] == expected


def test_the_local_extra_is_needed_only_for_a_local_service(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    status, checks = doctor(capsys)
    assert status == 1
    assert checks["torch"]["fix"] == "pip install 'tinker-cookbook[local]'"
    assert "self-test" not in checks
