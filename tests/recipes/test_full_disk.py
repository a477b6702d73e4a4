"""A disk that is full under the run directory: what ends a run, with which words, and what not."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import ROOT, metric_rows, recipe_environment, run_recipe

SL = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=2")
SL += ("learning_rate=1e-3",)
RL = ("renderer_name=chatml", "groups_per_batch=2", "group_size=2", "max_tokens=6", "lora_rank=2")


def run_limited(recipe: str, *settings: str, env: dict[str, str], file_bytes: int):
    """Run a recipe in whose process no file can grow beyond so many bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        [sys.executable, "-m", f"recipes.{recipe}", *settings],
        env=env | {"PATH": "/nowhere"},  # without git: its diff has any length
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )


@pytest.mark.parametrize("recipe", ["sl_basic", "sl_loop"])
def test_metrics_that_cannot_be_written_end_the_run_with_one_line(
    recipe: str, local_service: ServiceProcess, tmp_path: Path
):
    env = recipe_environment(local_service, tmp_path)
    log_path = tmp_path / "run"
    settings = [*SL, f"model_name={local_service.model}", f"log_path={log_path}", "max_steps=40"]
    settings += ["num_epochs=3", "save_every=0"]
    limit = 6500 if recipe == "sl_basic" else 3000
    done = run_limited(recipe, *settings, env=env, file_bytes=limit)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"OSError: {log_path / 'metrics.jsonl'} cannot be written: File too ")
    assert last.endswith("nothing is saved yet: the same command starts over.")
    assert "Traceback" not in done.stderr
    again = run_recipe(f"recipes.{recipe}", *settings, env=env)
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in metric_rows(log_path)] == list(range(41))


def test_spans_transcripts_and_logs_do_not_end_a_run(local_service: ServiceProcess, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path)
    log_path = tmp_path / "run"
    settings = [*RL, f"model_name={local_service.model}", f"log_path={log_path}", "max_steps=2"]
    for name in ("timing_spans.jsonl", "trace_events.jsonl", "iteration_000001", "logs.log"):
        path = log_path / name
        path.mkdir(parents=True) if "iteration" not in name else path.write_text("")
    done = run_recipe("recipes.rl_basic", *settings, "enable_trace=True", env=env)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metric_rows(log_path)] == [0, 1, 2]
    assert done.stderr.count("timing_spans.jsonl cannot be written") == 1
    assert "iteration_000001" in done.stderr
