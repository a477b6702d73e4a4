"""What a finished run tells its user: what changed, where things are, how to go on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.utils.jsonl_log import read_rows
from tinker_cookbook.utils.ml_log import METRICS_FILE
from tinker_cookbook.utils.recipe_code import code_differences

__all__ = ["describe_change", "report_complete", "report_run", "sample_command"]


def describe_change(log_path: str | Path, key: str) -> tuple[float, float] | None:
    """The first and the last value of a metric; None if it was not measured twice."""
    values = [row[key] for row in read_rows(Path(log_path) / METRICS_FILE) if key in row]
    return (values[0], values[-1]) if len(values) > 1 else None


def report_complete(log_path: str | Path) -> None:
    """Say that a run has nothing left to do."""
    changed = "".join(f"\n  {line}" for line in code_differences(Path(log_path)))
    told = f" Since then{changed}\nThe weights are those of the old code." if changed else ""
    print(
        f"Training was already complete; nothing to do.{told} To train anew: "
        "behavior_if_log_dir_exists=delete, or another log_path."
    )


def sample_command(
    sampler_path: str, *, model_name: str | None = None, base_url: str | None = None
) -> str:
    """The command that samples from a checkpoint.

    Args:
        sampler_path: `tinker://` path of the weights.
        model_name: Its base model, where the local service must be told.
        base_url: The service, where it was given explicitly.
    """
    words = ["tinker-cookbook", "sample", sampler_path]
    if model_name is not None and model_name != DEFAULT_MODEL:
        words += ["--model", model_name]
    if base_url is not None:
        words += ["--base-url", base_url]
    return shlex.join(words)


def report_run(
    log_path: str, sampler_path: str, samples: list[dict[str, Any]], command: str
) -> None:
    """Print the summary of a run.

    Args:
        log_path: The run directory.
        sampler_path: The trained weights on the service.
        samples: Rows `{"prompt", "answer"}`, oldest first; shown are the first and last of each.
        command: How to sample from the weights.
    """
    print()
    for name, key in (("held-out loss", "test/nll"), ("bits per byte", "test/bpb")):
        change = describe_change(log_path, key)
        if change is not None:
            print(f"{name}  {change[0]:.4f} -> {change[1]:.4f}")
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        answers = [row["answer"] for row in samples if row["prompt"] == prompt]
        print(f"\n{prompt}\n  before: {answers[0]}\n  after:  {answers[-1]}")
    print(f"\nweights  {sampler_path}\nfiles    {log_path}\nsample   {command}")
