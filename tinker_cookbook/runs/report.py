"""The report at the end of a run: what changed, where the weights are, and how to use them."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook import service
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.runs.checkpoints import get_best_checkpoint, load_checkpoints_file
from tinker_cookbook.runs.directory import CHECKPOINTS_FILE
from tinker_cookbook.utils.byte_sizes import format_bytes
from tinker_cookbook.utils.jsonl_log import Row, read_rows
from tinker_cookbook.utils.ml_log import CONFIG_FILE, METRICS_FILE
from tinker_cookbook.utils.recipe_code import code_differences
from tinker_cookbook.utils.sdk_compat import rest_client_of

if TYPE_CHECKING:
    import tinker

__all__ = [
    "describe_change",
    "read_held_out_samples",
    "report_complete",
    "report_run",
    "report_saved",
    "sample_command",
]

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 300
HELD_OUT = (
    ("held-out loss", "test/nll"),
    ("bits per byte", "test/bpb"),
    ("held-out reward", "test/env/all/reward/total"),
    ("held-out reward", "test/reward/total"),
    ("held-out accuracy", "test/accuracy"),
    ("held-out margin", "test/margin"),
    ("held-out reward", "test/reward"),
)
"""Names and keys of the metrics that are measured before the first step and after the last."""


def describe_change(log_path: str | Path, key: str) -> tuple[float, float] | None:
    """Return the first and the last value of a metric; None if it was not measured twice."""
    values = [row[key] for row in read_rows(Path(log_path) / METRICS_FILE) if key in row]
    return (values[0], values[-1]) if len(values) > 1 else None


def report_complete(log_path: str | Path) -> None:
    """Print that a run was already complete."""
    changed = "".join(f"\n  {line}" for line in code_differences(Path(log_path)))
    told = f" Since then:{changed}\nThe weights are those of the old code." if changed else ""
    print(
        f"Training was already complete; nothing to do.{told} To train again: "
        "behavior_if_log_dir_exists=delete, or another log_path."
    )


async def report_saved(service_client: tinker.ServiceClient, log_path: str) -> None:
    """Print how many checkpoints of a run the service keeps, and their total size."""
    import tinker

    records = load_checkpoints_file(log_path)
    paths = [path for record in records for path in (record.state_path, record.sampler_path)]
    run_ids = {path.removeprefix("tinker://").partition("/")[0] for path in paths if path}
    rest = rest_client_of(service_client)
    try:
        answers = [await rest.list_checkpoints(run_id) for run_id in sorted(run_ids)]
    except (tinker.TinkerError, ValueError) as error:
        logger.info("the checkpoints could not be listed: %s", error)
        return
    sizes = [found.size_bytes or 0 for answer in answers for found in answer.checkpoints]
    command = shlex.join(["tinker-cookbook", "clean", log_path])
    print(
        f"saved    {len(sizes)} checkpoints, {format_bytes(sum(sizes))} on the service "
        f"({command} lists those that can go)",
        flush=True,
    )


def sample_command(
    sampler_path: str, *, model_name: str | None = None, base_url: str | None = None
) -> str:
    """Return the command that samples from a checkpoint.

    Args:
        sampler_path: `tinker://` path of the weights.
        model_name: The base model; None for the default model of the local service.
        base_url: The service; None if the environment chooses it.
    """
    words = ["tinker-cookbook", "sample", sampler_path]
    if model_name is not None and model_name != DEFAULT_MODEL:
        words += ["--model", model_name]
    if base_url is not None:
        words += ["--base-url", base_url]
    return shlex.join(words)


def report_run(log_path: str, sampler_path: str, samples: list[Row], command: str) -> None:
    """Print the summary of a run.

    Args:
        log_path: The run directory.
        sampler_path: The trained weights on the service.
        samples: Rows `{"prompt", "answer"}`, oldest first; the first and last answer of each
            prompt are shown.
        command: The command that samples from the weights.
    """
    changes = [(n, describe_change(log_path, k)) for n, k in _held_out_metrics(Path(log_path))]
    measured = [f"{name}  {c[0]:.4f} -> {c[1]:.4f}" for name, c in changes if c is not None]
    print("", *measured, sep="\n", end="\n" if measured else "")
    for prompt in dict.fromkeys(row["prompt"] for row in samples):
        answers = [row["answer"] for row in samples if row["prompt"] == prompt]
        print(f"\n{prompt}\n  before: {answers[0]}\n  after:  {answers[-1]}")
    print(f"\nweights  {sampler_path}  (to sample from)")
    _report_saved(Path(log_path), sampler_path)
    print(f"files    {log_path}\nsample   {command}")


def _held_out_metrics(log_path: Path) -> tuple[tuple[str, str], ...]:
    best = _read_config(log_path).get("best_metric")
    if isinstance(best, str) and best not in {key for _, key in HELD_OUT}:
        return (*HELD_OUT, (best, best))
    return HELD_OUT


def _report_saved(log_path: Path, sampler_path: str) -> None:
    """Print the other checkpoints, each with its use."""
    records = read_rows(log_path / CHECKPOINTS_FILE)
    state_path = next((r["state_path"] for r in reversed(records) if r.get("state_path")), None)
    best = get_best_checkpoint(str(log_path))
    if best is not None and best.sampler_path not in (None, sampler_path):
        value = f"{best.get('best_metric')}={best.get('best_value'):.4f}"
        print(f"best     {best.sampler_path}  (to sample from; {value})")
    if state_path is not None:
        print(f"state    {state_path}  (to continue training: load_checkpoint_path=...)")
        local = service.choose_service(_read_config(log_path).get("base_url")).kind == "local"
        note = "  (while `tinker-cookbook serve` runs)" if local else ""
        print(f"download {shlex.join(['tinker', 'checkpoint', 'download', state_path])}{note}")


def read_held_out_samples(log_path: str | Path) -> list[Row]:
    """Return a held-out task of an RL run with its replies before and after training.

    Returns:
        Rows `{"prompt", "answer"}` for `report_run`, oldest first: the first turn of the first
        task, before the first step and after the last. Empty if no transcripts were written.
    """
    paths = sorted(Path(log_path).glob("iteration_*/eval_*_rollout_summaries.jsonl"))
    same = [path for path in paths if path.name == paths[0].name]
    before, after = map(_first_turn, same[:1] + same[-1:]) if len(same) > 1 else ({}, {})
    if not before or before["prompt"] != after.get("prompt"):
        return []
    return [
        {"prompt": _clip(turn["prompt"]), "answer": _clip(turn["reply"])}
        for turn in (before, after)
    ]


def _first_turn(path: Path) -> Row:
    for row in read_rows(path):
        for turn in row.get("steps", [])[:1]:
            if "prompt" in turn and "reply" in turn:
                return turn
    return {}


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."


def _read_config(log_path: Path) -> Row:
    try:
        config = json.loads((log_path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
