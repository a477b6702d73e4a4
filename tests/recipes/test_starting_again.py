"""The same command again: during a run, after its end, and with an edited recipe."""

import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import (
    ROOT,
    count_lines,
    metric_rows,
    read_jsonl,
    recipe_environment,
    run_recipe,
    start_recipe,
)

SL = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=4")
RL = ("renderer_name=chatml", "groups_per_batch=2", "group_size=2", "max_tokens=6", "lora_rank=2")
RECIPES = {"sl_basic": SL, "sl_loop": SL, "rl_basic": RL, "rl_loop": RL}


def wait_for_rows(process, metrics: Path) -> None:
    deadline = time.monotonic() + 120
    while count_lines(metrics) < 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_second_start_during_a_run_does_nothing(
    recipe: str, local_service: ServiceProcess, tmp_path: Path
):
    env = recipe_environment(local_service, tmp_path / "home")
    settings = (*RECIPES[recipe], f"model_name={local_service.model}", "max_steps=2000")
    settings += ("save_every=0", f"log_path={tmp_path / 'run'}")
    first = start_recipe(f"recipes.{recipe}", *settings, env=env)
    try:
        wait_for_rows(first, tmp_path / "run" / "metrics.jsonl")
        behavior = "behavior_if_log_dir_exists=delete"
        second = run_recipe(f"recipes.{recipe}", *settings, behavior, env=env)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} since 20" in second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    steps = [row["step"] for row in metric_rows(tmp_path / "run")]
    assert steps == list(range(len(steps)))


def test_a_killed_run_leaves_a_folder_that_the_next_start_takes_over(
    local_service: ServiceProcess, tmp_path: Path
):
    env = recipe_environment(local_service, tmp_path / "home")
    log_path = tmp_path / "run"
    settings = (*SL, f"model_name={local_service.model}", "save_every=2", "max_steps=12")
    settings += (f"log_path={log_path}", "infrequent_eval_every=0")
    first = start_recipe("recipes.sl_basic", *settings, env=env)
    while count_lines(log_path / "checkpoints.jsonl") < 1 and first.poll() is None:
        time.sleep(0.001)
    first.kill()
    first.communicate()
    again = run_recipe("recipes.sl_basic", *settings, env=env)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in metric_rows(log_path)] == list(range(13))
    assert [row.get("final") for row in read_jsonl(log_path / "checkpoints.jsonl")].count(True) == 1


@pytest.mark.parametrize(
    ("recipe", "function", "old", "new"),
    [
        ("rl_basic", "count_reward", "return max(0.0,", "return -max(0.0,"),
        ("sl_loop", "train", "peak_rate * (1 - step", "peak_rate * (2 - step"),
    ],
)
def test_a_run_does_not_go_on_silently_with_other_code(
    recipe: str, function: str, old: str, new: str, local_service: ServiceProcess, tmp_path: Path
):
    folder = tmp_path / "mine"
    folder.mkdir()
    copy = shutil.copy(ROOT / "recipes" / f"{recipe}.py", folder)
    env = recipe_environment(local_service, tmp_path / "home")
    settings = (*RECIPES[recipe], f"model_name={local_service.model}", "max_steps=1")

    def run(*more: str):
        return run_recipe(recipe, *settings, *more, env=env, cwd=folder)

    assert run().returncode == 0
    text = Path(copy).read_text()
    Path(copy).write_text(text + "# a remark\n")
    same = run()
    assert same.returncode == 0
    assert "Training was already complete; nothing to do. To train again" in same.stdout

    assert text.count(old) == 1
    Path(copy).write_text(text.replace(old, new))
    edited = run()
    assert edited.returncode == 2
    assert f"the code of {recipe}.py has changed: {function}" in edited.stderr
    assert "behavior_if_log_dir_exists=resume" in edited.stderr
    told = run("behavior_if_log_dir_exists=resume")
    assert told.returncode == 0
    assert f"Since then:\n  the code of {recipe}.py has changed: {function}" in told.stdout


def test_failed_starts_leave_nothing(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path / "home")
    model = f"model_name={local_service.model}"
    for wrong in (
        ("file_path=none.jsonl", model),
        ("load_checkpoint_path=tinker://x/weights/y", model),
        ("model_name=no-such/model", "renderer_name=chatml"),
    ):
        done = run_recipe("recipes.sl_basic", *SL, "learning_rate=1e-3", *wrong, env=env)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "home" / "runs").exists(), list((tmp_path / "home").rglob("*"))


def test_the_config_of_a_run_starts_one_like_it(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path / "home")
    model = f"model_name={local_service.model}"
    first = tmp_path / "first"
    settings = (*SL, model, "max_steps=2", "prompt=Is it day, or night?", f"log_path={first}")
    done = run_recipe("recipes.sl_basic", *settings, env=env)
    assert done.returncode == 0, done.stderr
    again = (f"config={first / 'config.json'}", f"log_path={tmp_path / 'second'}", "max_steps=1")
    done = run_recipe("recipes.sl_basic", *again, env=env)
    assert done.returncode == 0, done.stderr
    assert "Is it day, or night?\n  before: " in done.stdout
    ours, theirs = metric_rows(tmp_path / "second"), metric_rows(first)
    assert ours[0]["train_mean_nll"] == theirs[0]["train_mean_nll"]
    assert [row["step"] for row in ours] == [0, 1]
