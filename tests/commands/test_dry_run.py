"""`dry_run=true`: the tokens are exactly those that the run trains on, and nothing is started."""

import json
import re
from pathlib import Path

from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import read_jsonl, recipe_environment, run_recipe
from tinker_cookbook.commands.parts.time_estimate import estimate_seconds, read_times
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.runs.workload import Workload

SETTINGS = ("renderer_name=chatml", "lora_rank=2", "max_steps=5")
SUPERVISED = (*SETTINGS, "batch_size=2", "max_length=128", "test_size=100", "num_epochs=2")


def run(module: str, *words: str, env: dict[str, str], model: str) -> str:
    done = run_recipe(module, f"model_name={model}", *words, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1].replace(",", ""))


def write_pairs(folder: Path) -> Path:
    rows = [
        {"prompt": f"Question {n}?", "chosen": "yes " * n, "rejected": f"no {n}"}
        for n in range(1, 10)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_tokens_are_those_of_the_run(local_service: ServiceProcess, tmp_path: Path):
    env, model = recipe_environment(local_service, tmp_path), local_service.model
    log_path = tmp_path / "run"
    words = (*SUPERVISED, f"log_path={log_path}", "infrequent_eval_every=0", "eval_every=0")
    out = run("recipes.sl_basic", *words, "dry_run=true", env=env, model=model)
    assert "Nothing was started" in out
    assert not log_path.exists()
    run("recipes.sl_basic", *words, env=env, model=model)
    rows = [row for row in read_jsonl(log_path / "metrics.jsonl") if "num_tokens" in row]
    assert number(r"in ([\d,]+) steps", out) == len(rows)
    assert number(r"rows +([\d,]+)", out) == sum(row["num_sequences"] for row in rows)
    assert number(r"tokens +([\d,]+)", out) == sum(row["num_tokens"] for row in rows)
    assert number(r"([\d,]+) of them trained", out) == sum(row["num_loss_tokens"] for row in rows)
    assert f"{rows[0]['learning_rate']:.3g} in the first step" in out
    assert f"{rows[-1]['learning_rate']:.3g} in the last" in out
    assert "holds a run" in run("recipes.sl_basic", *words, "dry_run=true", env=env, model=model)


def test_the_tokens_of_pairs_are_those_of_the_run(local_service: ServiceProcess, tmp_path: Path):
    env, model = recipe_environment(local_service, tmp_path), local_service.model
    log_path, data = tmp_path / "run", write_pairs(tmp_path)
    words = (
        *("renderer_name=chatml", "lora_rank=2", "num_epochs=2", "batch_size=2", "max_length=40"),
        *(f"data={data}", "test_size=2", f"log_path={log_path}", "eval_every=0"),
    )
    out = run("recipes.preference.dpo", *words, "dry_run=true", env=env, model=model)
    assert "Nothing was started" in out
    assert not log_path.exists()
    run("recipes.preference.dpo", *words, env=env, model=model)
    rows = [row for row in read_jsonl(log_path / "metrics.jsonl") if "num_tokens" in row]
    assert number(r"in ([\d,]+) steps", out) == len(rows) == 6
    assert number(r"rows +([\d,]+)", out) == sum(row["num_pairs"] for row in rows)
    assert number(r"tokens +([\d,]+)", out) == sum(row["num_tokens"] for row in rows)
    trained = sum(
        row["num_pairs"] * (row["chosen_length"] + row["rejected_length"]) for row in rows
    )
    assert number(r"([\d,]+) of them in completions", out) == round(trained)
    assert re.search(r"data +7 pairs, \d cut at max_length=40", out)
    refused = run_recipe("recipes.preference.dpo", "dry_run=true", f"model_name={model}", env=env)
    assert refused.returncode != 0
    assert "dry_run=true cannot count pairs that the model has not sampled yet" in refused.stderr


def test_the_tokens_of_a_pointwise_judge_are_those_of_the_run(
    local_service: ServiceProcess, tmp_path: Path
):
    env, model = recipe_environment(local_service, tmp_path), local_service.model
    log_path = tmp_path / "run"
    words = (
        *("kind=pointwise", "renderer_name=chatml", "lora_rank=2", "batch_size=2", "max_steps=3"),
        *("num_comparisons=8", "test_size=2", f"log_path={log_path}", "eval_every=0"),
    )
    out = run("recipes.preference.reward_model", *words, "dry_run=true", env=env, model=model)
    assert "Nothing was started" in out
    assert not log_path.exists()
    run("recipes.preference.reward_model", *words, env=env, model=model)
    rows = [row for row in read_jsonl(log_path / "metrics.jsonl") if "num_tokens" in row]
    assert number(r"in ([\d,]+) steps", out) == len(rows) == 3
    assert number(r"rows +([\d,]+)", out) == sum(row["num_pairs"] for row in rows)
    assert number(r"tokens +([\d,]+)", out) == sum(row["num_tokens"] for row in rows)


def test_the_memory_is_planned_for_a_local_service(local_service: ServiceProcess, tmp_path: Path):
    env, model = recipe_environment(None, tmp_path), local_service.model
    words = (*SETTINGS, "groups_per_batch=3", "group_size=4", "max_tokens=8", "dry_run=true")
    out = run("recipes.rl_basic", *words, env=env, model=model)
    assert "rows     15 groups in 5 steps, 60 episodes" in out
    assert "at most 480 per turn" in out
    assert re.search(r"memory +[\d.]+ [KMG]iB on this machine", out)
    assert "60 episodes; 128 held-out episodes per evaluation" in out
    assert "forward passes" not in out
    out = run("recipes.rl_basic", *words, "eval_every=0", env=env, model=model)
    assert "held-out" not in out
    pairs = (f"data={write_pairs(tmp_path)}", "test_size=2", "batch_size=2", "dry_run=true")
    out = run("recipes.preference.dpo", "renderer_name=chatml", *pairs, env=env, model=model)
    assert "and up to 2.0 GiB more while much is free, for forward passes" in out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cookbook" / "service").exists()


def test_the_time_comes_from_a_recorded_run_that_does_the_same_per_step(
    local_service: ServiceProcess, tmp_path: Path
):
    env, model = recipe_environment(local_service, tmp_path), local_service.model
    words = [each for each in SUPERVISED if not each.startswith("max_steps")]
    words += ["infrequent_eval_every=0", "eval_every=0"]
    before = run("recipes.sl_basic", *words, "dry_run=true", env=env, model=model)
    assert "no complete run like this one is recorded" in before
    run("recipes.sl_basic", *words, "max_steps=4", env=env, model=model)
    longer = run("recipes.sl_basic", *words, "max_steps=8", "dry_run=true", env=env, model=model)
    assert re.search(r"time +[\d.]+ s, [\d.]+ s per step \(recorded in sl_basic/", longer)
    other = run("recipes.sl_basic", *words, "lora_rank=4", "dry_run=true", env=env, model=model)
    assert "no complete run" in other, "another rank takes another time"


def test_a_probe_measures_the_time_and_leaves_nothing(
    local_service: ServiceProcess, tmp_path: Path
):
    env, model = recipe_environment(local_service, tmp_path), local_service.model
    prices = tmp_path / "prices.json"
    names = ("prefill", "sample", "train")
    rates = {f"{name}_usd_per_million": 1000.0 for name in names}
    prices.write_text(json.dumps([{"model_name": model, **rates}]))
    words = [*SUPERVISED, "dry_run=true", "dry_run_probe=true", f"prices={prices}"]
    out = run("recipes.sl_basic", *words, env=env, model=model)
    assert "measured in 3 steps now" in out
    assert "Only the probe was run" in out
    tokens = number(r"tokens +([\d,]+)", out)
    assert f"cost     ${tokens / 1000:.2f} for {tokens:,} tokens trained" in out
    assert not list((tmp_path / "runs").glob("*/*")), "no run is left"


def test_times_are_taken_apart_and_put_together():
    rows = [{"time/step": 2.0, "num_tokens": 100} for _ in range(4)]
    rows[0] |= {"time/step": 7.0, "time/evals": 5.0}
    times = read_times(rows, 20.0, "a test")
    assert times is not None
    assert (times.step, times.tokens, times.evaluation, times.around) == (2.0, 100.0, 5.0, 7.0)
    loop = SharedOptions(eval_every=10)
    assert estimate_seconds(times, loop, Workload(20, 40, num_tokens=4000)) == 20 * 4.0 + 10 + 7
    assert estimate_seconds(times, loop, Workload(20, 40)) == 20 * 2.0 + 10 + 7
    assert read_times(rows[:1], 20.0, "a test") is None
