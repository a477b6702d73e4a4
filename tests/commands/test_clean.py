"""Old checkpoints: thinned while a run goes on, and removed by `clean`, never what is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import ROOT, read_jsonl, recipe_environment, run_recipe
from tinker_cookbook.runs import lock
from tinker_cookbook.utils.jsonl_log import append_row

SETTINGS = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=2")
SETTINGS += ("learning_rate=1e-3", "infrequent_eval_every=0", "save_every=1", "max_steps=5")


def run_command(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinker_cookbook.cli", *words],
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def train(env: dict[str, str], model: str, log_path: Path, *more: str) -> str:
    words = (*SETTINGS, f"model_name={model}", f"log_path={log_path}", *more)
    done = run_recipe("recipes.sl_basic", *words, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def paths_in(log_path: Path, key: str) -> list[str]:
    return [row[key] for row in read_jsonl(log_path / "checkpoints.jsonl") if key in row]


def names(paths: list[str]) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in paths)


def saved_on(service: ServiceProcess, log_path: Path) -> dict[str, list[str]]:
    """Names of what the service has of a run, by kind."""
    import tinker

    run_id = paths_in(log_path, "sampler_path")[0].removeprefix("tinker://").partition("/")[0]
    rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
    found = [item.tinker_path for item in rest.list_checkpoints(run_id).result().checkpoints]
    kinds = ("weights", "sampler_weights")
    return {kind: names([path for path in found if f"/{kind}/" in path]) for kind in kinds}


def test_a_run_keeps_its_newest_training_states(local_service: ServiceProcess, tmp_path: Path):
    log_path = tmp_path / "run"
    out = train(recipe_environment(local_service, tmp_path), local_service.model, log_path)
    weights = ["000001", "000002", "000003", "000004", "final"]
    saved = saved_on(local_service, log_path)
    assert saved == {"weights": ["000004", "final"], "sampler_weights": weights}
    assert names(paths_in(log_path, "state_path")) == ["000004", "final"]
    assert names(paths_in(log_path, "sampler_path")) == weights
    assert "\nsaved    7 checkpoints, " in out


def test_clean_lists_first_and_deletes_what_is_old(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path)
    log_path = tmp_path / "home-made"
    train(env, local_service.model, log_path, "keep_checkpoints=0")
    rows = read_jsonl(log_path / "checkpoints.jsonl")
    named = rows[1] | {"name": "mine"}
    append_row(log_path / "checkpoints.jsonl", named)  # someone's own record of the second
    everything = saved_on(local_service, log_path)

    listed = run_command("clean", str(log_path), env=env)
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("tinker://") == 3
    assert "Nothing was deleted. Add --yes to delete these checkpoints." in listed.stdout
    assert saved_on(local_service, log_path) == everything

    with lock.hold(log_path):
        busy = run_command("clean", str(log_path), "--yes", env=env)
    assert "skipped: " in busy.stderr
    assert "is in use by process" in busy.stderr
    assert saved_on(local_service, log_path) == everything

    done = run_command("clean", str(tmp_path), "--yes", env=env)
    assert done.returncode == 0, done.stderr
    assert "KiB freed" in done.stdout
    saved = saved_on(local_service, log_path)
    # the newest training state is that of the record `mine`
    assert saved == everything | {"weights": ["000002", "final"]}
    assert names(paths_in(log_path, "state_path")) == ["000002", "000002", "final"]

    run_command("clean", str(log_path), "--yes", "--weights", env=env)
    left = {"weights": ["000002", "final"], "sampler_weights": ["000002", "final"]}
    assert saved_on(local_service, log_path) == left
    again = run_command("clean", str(log_path), "--yes", env=env)
    assert "Nothing to delete" in again.stdout


def test_clean_keeps_the_newest_of_the_best_weights(local_service: ServiceProcess, tmp_path: Path):
    """It is the best one, also where a lower value is better."""
    env = recipe_environment(local_service, tmp_path)
    log_path = tmp_path / "run"
    train(env, local_service.model, log_path, "eval_every=1", "best_metric=test/nll")
    best = [row for row in read_jsonl(log_path / "checkpoints.jsonl") if "best_value" in row]
    values = [row["best_value"] for row in best]
    assert len(values) > 1, "the loss falls"
    assert values == sorted(values, reverse=True)
    run_command("clean", str(log_path), "--yes", "--weights", env=env)
    assert saved_on(local_service, log_path)["sampler_weights"] == [best[-1]["name"], "final"]


def test_a_run_resumes_after_clean(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path)
    log_path = tmp_path / "runs" / "one"  # in the folder of all runs
    train(env, local_service.model, log_path, "keep_checkpoints=0")
    records = log_path / "checkpoints.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]))  # as if it had been killed after the third step
    done = run_command("clean", "--yes", env=env)
    assert done.stdout.count("tinker://") == 2, done.stderr
    assert "resumed  after step 3 of 5" in train(env, local_service.model, log_path)


def test_clean_needs_no_service_for_runs_of_this_machine(tiny_model_folder: Path, tmp_path: Path):
    env = recipe_environment(None, tmp_path)
    log_path = tmp_path / "run"
    train(env, str(tiny_model_folder), log_path, "keep_checkpoints=3")
    assert names(paths_in(log_path, "state_path")) == ["000003", "000004", "final"]
    folders = tmp_path / "cookbook" / "service" / "checkpoints"
    before = len(list(folders.iterdir()))
    done = run_command("clean", str(log_path), "--yes", env=env)
    assert done.returncode == 0, done.stderr
    assert len(list(folders.iterdir())) == before - 2
    assert names(paths_in(log_path, "state_path")) == ["final"]
    # the final checkpoint is still there to go on from
    state = paths_in(log_path, "state_path")[0]
    train(env, str(tiny_model_folder), tmp_path / "next", f"load_checkpoint_path={state}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "keep=0 is too small"),
        (["/nowhere"], "LOG_PATH=/nowhere contains no run with checkpoints"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path):
    done = run_command("clean", *words, env=recipe_environment(None, tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
