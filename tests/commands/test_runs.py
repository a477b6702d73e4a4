"""`tinker-cookbook runs`: what recipes have left is listed, shown and compared."""

import json
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import recipe_environment, run_recipe, start_recipe
from tinker_cookbook import cli
from tinker_cookbook.stores import LocalStorage, TrainingRunStore

SETTINGS = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=2")
SETTINGS += ("infrequent_eval_every=0", "save_every=1", "eval_every=1")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "cookbook"))
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write_run(root: Path, name: str, values: list[float], **settings: object) -> None:
    store = TrainingRunStore(LocalStorage(root), name)
    store.write_config({"recipe_name": "mine", "model_name": "org/m", "log_path": name, **settings})
    for step, value in enumerate(values):
        store.write_metrics({"test/nll": value, "grad_norm": 2.0, "time/total": 1.0}, step)
    record = {"name": "final", "final": True, "sampler_path": "tinker://r/sampler_weights/final"}
    store.write_checkpoint(record)


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["runs", *words]) == 0
    return capsys.readouterr().out


def test_the_list_has_a_line_per_run(root: Path, capsys: pytest.CaptureFixture[str]):
    write_run(root, "mine/one", [3.0, 1.0, 2.0])
    write_run(root, "mine/two", [4.0])
    lines = output(capsys).splitlines()
    assert lines[0].split()[:4] == ["RECIPE", "STATE", "STEP", "METRIC"]
    (one,) = (line.split() for line in lines if line.endswith("one"))
    assert one[:6] == ["mine", "completed", "2", "test/nll", "2", "1"]
    (found,) = json.loads(output(capsys, "list", "--json", "--limit", "1"))
    assert found["run"] == "mine/two"
    assert found["best"] == {"metric": "test/nll", "value": 4.0, "step": 0}
    assert output(capsys, "--limit", "1").splitlines()[-1].startswith("... and 1 older runs")
    assert json.loads(output(capsys, "--json", "--state", "failed")) == []
    assert "No run in" in output(capsys, "list", "--recipe", "other")


def test_options_count_before_and_after_the_action(root: Path, capsys: pytest.CaptureFixture[str]):
    write_run(root, "mine/one", [3.0])
    folder = ("--folder", str(root))
    assert output(capsys, "--json", *folder, "list") == output(capsys, "list", *folder, "--json")
    assert json.loads(output(capsys, "--json", "show", "one"))["run"] == "mine/one"


def test_a_run_is_found_by_its_path_a_part_of_it_or_its_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(root, "mine/one", [3.0])
    write_run(root, "mine/one-more", [3.0])
    for name in ("mine/one", "one-more", str(root / "mine" / "one")):
        assert output(capsys, "show", name).startswith("run ")
    for name, message in (("mine", "fits 2 runs"), ("nothing", "is not in")):
        assert cli.main(["runs", "show", name]) == 2
        assert message in capsys.readouterr().err


def test_show_tells_settings_metrics_and_checkpoints(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    write_run(root, "mine/one", [3.0, 1.0, 2.0], learning_rate=1e-4)
    out = output(capsys, "show", "one")
    assert "learning_rate=0.0001" in out
    (nll,) = (line.split() for line in out.splitlines() if line.startswith("test/nll"))
    assert nll == ["test/nll", "3", "2", "1", "1", "█▁▅"]
    assert "time/total" not in out
    assert "sample      tinker-cookbook sample tinker://r/sampler_weights/final" in out
    assert list(json.loads(output(capsys, "show", "one", "--metric", "time/", "--json"))["metrics"])


def test_diff_lists_what_differs(root: Path, capsys: pytest.CaptureFixture[str]):
    write_run(root, "mine/one", [3.0, 1.0], learning_rate=1e-4, seed=0)
    write_run(root, "mine/two", [3.0, 2.5, 0.5], learning_rate=2e-4, seed=0)
    out = output(capsys, "diff", "one", "two")
    (rate,) = (line.split() for line in out.splitlines() if line.startswith("learning_rate"))
    assert rate == ["learning_rate", "0.0001", "0.0002"]
    (nll,) = (line.split() for line in out.splitlines() if line.startswith("test/nll"))
    assert nll == ["test/nll", "1", "0.5", "-0.5", "1", "2.5"]
    assert "seed" not in out
    assert "grad_norm" not in out
    report = json.loads(output(capsys, "diff", "one", "two", "--json"))
    assert report["metrics"]["test/nll"]["at_common_step"] == [1.0, 2.5]
    same = output(capsys, "diff", "one", "one")
    assert "The settings agree." in same
    assert "The metrics agree." in same


def test_names_cannot_write_control_characters(root: Path, capsys: pytest.CaptureFixture[str]):
    write_run(root, "mine/one\x1b[2J", [3.0], recipe_name="x\x1b[31m")
    assert "\x1b" not in output(capsys) + output(capsys, "show", "one")


def test_a_killed_recipe_is_failed_and_the_shown_command_resumes_it(
    local_service: ServiceProcess, root: Path, capsys: pytest.CaptureFixture[str]
):
    env = recipe_environment(local_service, root.parent)
    words = (*SETTINGS, f"model_name={local_service.model}", "max_steps=12")
    process = start_recipe("recipes.sl_basic", *words, env=env)
    try:
        deadline = time.monotonic() + 60
        while not list(root.glob("sl_basic/*/checkpoints.jsonl")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (running,) = json.loads(output(capsys, "--json"))
        assert (running["state"], running["recipe"]) == ("running", "sl_basic")
        assert running["step"] >= 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    shown = json.loads(output(capsys, "show", "sl_basic", "--json"))
    assert shown["state"] == "failed"
    assert shown["data"].endswith("conversations.jsonl")
    _, _, module, *settings = shlex.split(shown["resume"])
    done = run_recipe(module, *settings, env=env)
    assert done.returncode == 0, done.stderr
    assert "resumed  after step" in done.stdout
    (completed,) = json.loads(output(capsys, "--json"))
    assert (completed["state"], completed["step"]) == ("completed", 12)
    assert completed["last"]["test/nll"] == shown_last(root)


def shown_last(root: Path) -> float:
    (path,) = root.glob("sl_basic/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["test/nll"] for row in rows if "test/nll" in row][-1]
