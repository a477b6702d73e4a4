"""`tinker-cookbook sweep`: what it runs, that it continues after a kill, and its table."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import ROOT, recipe_environment
from tinker_cookbook import cli
from tinker_cookbook.commands.parts.sweep_plan import plan_sweep
from tinker_cookbook.commands.parts.sweep_runs import describe_results
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.stores import LocalStorage, RunRegistry, TrainingRunStore

SETTINGS = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=2")
SETTINGS += ("infrequent_eval_every=0", "save_every=1", "eval_every=1")


def test_every_combination_is_planned_in_order():
    plan = plan_sweep("sl_basic", ["learning_rate=1e-4,1e-3", "x=[1,2]", "seed=0,1"])
    assert plan.fixed == {"x": "[1,2]"}, "commas in brackets do not separate values"
    assert [run.name for run in plan.runs] == [
        "learning_rate=1e-4,seed=0",
        "learning_rate=1e-4,seed=1",
        "learning_rate=1e-3,seed=0",
        "learning_rate=1e-3,seed=1",
    ]
    assert plan.words(plan.runs[0]) == ["x=[1,2]", "learning_rate=1e-4", "seed=0"]
    again = plan_sweep("sl_basic", ["learning_rate=1e-4,1e-3", "x=[1,2]", "seed=0,1"])
    assert again.default_name == plan.default_name


def test_values_that_are_no_file_names_get_folders_of_their_own():
    runs = plan_sweep("r", ["data=a/b.jsonl,a-b.jsonl"]).runs
    assert len({run.name for run in runs}) == 2
    assert all("/" not in run.name for run in runs)


def test_random_values_depend_on_the_seed_and_fit_their_range():
    words = ["learning_rate=1e-5..1e-2", "rank=4,8", "shift=-1..1"]
    runs = plan_sweep("r", words, num_random=30, seed=3).runs
    assert runs == plan_sweep("r", words, num_random=30, seed=3).runs
    assert runs != plan_sweep("r", words, num_random=30, seed=4).runs
    rates = [float(run.settings["learning_rate"]) for run in runs]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert min(rates) < 1e-4 < 1e-3 < max(rates), "even on a logarithmic scale"
    assert {run.settings["rank"] for run in runs} == {"4", "8"}
    assert len(plan_sweep("r", ["rank=4,8"], num_random=9).runs) == 2, "there are no others"


@pytest.mark.parametrize(
    ("words", "num_random", "message"),
    [
        (["learning_rate=1e-4"], None, "no setting has several values"),
        (["learning_rate"], None, "not a setting"),
        (["a=1,2", "a=3"], None, "given twice"),
        (["a=1,,2"], None, "empty value"),
        (["a=1,1"], None, "value twice"),
        (["a=1..2"], None, "needs --random"),
        (["a=2..1"], 3, "must be below"),
        (["log_path=a,b"], None, "--folder"),
        (["a=1,2"], 0, "random=0"),
        (
            [f"a={','.join(map(str, range(40)))}", f"b={','.join(map(str, range(40)))}"],
            None,
            "1600",
        ),
    ],
)
def test_a_wrong_sweep_is_refused(words: list[str], num_random: int | None, message: str):
    with pytest.raises(ConfigurationError, match=message):
        plan_sweep("r", words, num_random=num_random)


def test_the_table_has_the_best_first_and_means_over_seeds(tmp_path: Path):
    plan = plan_sweep("sl_basic", ["lr=1,2", "seed=0,1"])
    for run, values in zip(plan.runs[:3], ([3.0, 2.0], [3.0, 4.0], [1.0, 1.5]), strict=True):
        store = TrainingRunStore(LocalStorage(tmp_path), run.name)
        for step, value in enumerate(values):
            store.write_metrics({"test/nll": value, "reward": value}, step)
    registry = RunRegistry([LocalStorage(tmp_path)])
    lines = describe_results(registry, plan, metric=None, direction=None)
    assert lines[0].startswith("test/nll, lower is better")
    table = [line.split() for line in lines[2:7]]
    assert [row[:2] for row in table[1:]] == [["2", "0"], ["1", "0"], ["1", "1"], ["2", "1"]]
    assert table[1][-3:] == ["1.5", "1", "0"], "last, best, step of the best"
    assert table[4][2:4] == ["not", "begun"]
    means = {line.split()[0]: line.split()[1:] for line in lines[9:11]}
    assert means == {"2": ["1", "1.5", "-"], "1": ["2", "3", "1"]}
    assert lines[-1] == "best     python -m recipes.sl_basic lr=2 seed=0"
    highest = describe_results(registry, plan, metric="reward", direction=None)
    assert highest[3].split()[:2] == ["1", "1"]
    assert describe_results(registry, plan, metric="reward", direction="min")[3].split()[0] == "2"


def sweep(*words: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tinker_cookbook.cli", "sweep", *words],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_sweep_continues_where_it_stopped(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path)
    folder = tmp_path / "sweep"
    words = ["sl_basic", "learning_rate=1e-3,1e-2", *SETTINGS, f"model_name={local_service.model}"]
    words += ["max_steps=2", "--folder", str(folder)]
    killed = sweep(*words, env=env)
    assert killed.stdout is not None
    assert any("done" in line for line in killed.stdout), "the first run is complete"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first, second = (folder / f"learning_rate={rate}" for rate in ("1e-3", "1e-2"))
    before = (first / "checkpoints.jsonl").read_bytes()
    ended = sweep(*words, env=env)
    output = ended.communicate(timeout=120)[0]
    while ended.returncode and "is in use" in output:  # the run of the killed sweep is still ending
        time.sleep(0.5)
        ended = sweep(*words, env=env)
        output = ended.communicate(timeout=120)[0]
    assert ended.returncode == 0, output
    assert "skipped  1 runs that are complete" in output
    assert (first / "checkpoints.jsonl").read_bytes() == before
    for run in (first, second):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2]
    assert "test/nll, lower is better" in output
    assert (folder / "sweep.html").is_file()
    registry = RunRegistry([LocalStorage(folder)])
    assert {run.run_id: run.status for run in registry.refresh()} == {
        "learning_rate=1e-3": "completed",
        "learning_rate=1e-2": "completed",
    }


def test_a_wrong_setting_stops_the_sweep(
    local_service: ServiceProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    env = recipe_environment(local_service, tmp_path)
    ended = sweep("sl_basic", "lorra_rank=2,4", "--folder", str(tmp_path / "sweep"), env=env)
    output = ended.communicate(timeout=120)[0]
    assert ended.returncode == 2
    assert "error: run lorra_rank=2: " in output
    assert "lora_rank" in output
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", str(tmp_path / "runs"))
    assert cli.main(["sweep", "sl_bassic", "a=1,2", "--dry-run"]) == 2
    assert "sl_basic" in capsys.readouterr().err
