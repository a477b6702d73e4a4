"""Settings that every training recipe has, each defined once.

A recipe's config inherits the groups it needs and adds its own fields. All keys stay flat, so
`learning_rate=1e-4` works on every command line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.lr_scheduling import LRSchedule
from tinker_cookbook.utils.shared_limits import (
    MAX_LORA_RANK,
    MAX_TTL_SECONDS,
    MIN_TTL_SECONDS,
)

__all__ = [
    "CheckpointOptions",
    "LogdirBehavior",
    "ModelOptions",
    "OptimizerOptions",
    "SharedOptions",
    "TrackingOptions",
    "check_options",
    "check_reply_length",
    "check_row_length",
    "expand_path",
    "shared_options",
]

LogdirBehavior = Literal["delete", "resume", "ask", "raise"]


def expand_path(_: object, path: str | None) -> str | None:
    """A chz munger: `~` becomes the home folder."""
    return None if path is None else str(Path(path).expanduser())


@chz.chz
class ModelOptions:
    """Model, service and run directory."""

    model_name: str | None = chz.field(
        default=None,
        doc="Base model to train, as a name or a folder; default: the model of the local service.",
    )
    renderer_name: str | None = chz.field(
        default=None, doc="Chat format; default: the recommended format of the model."
    )
    base_url: str | None = chz.field(
        default=None,
        doc="URL of a Tinker service, or `local`; default: TINKER_BASE_URL if set, the Tinker "
        "service if there is an API key, else local.",
    )
    log_path: str | None = chz.field(
        default=None,
        munger=expand_path,
        doc="Run directory; default: a folder in ~/tinker-runs, named after the settings.",
    )
    load_checkpoint_path: str | None = chz.field(
        default=None,
        doc="Saved weights (tinker://...) to start from; the optimizer starts new.",
    )
    lora_rank: int = chz.field(default=32, doc="Rank of the LoRA adapter.")
    train_unembed: bool | None = chz.field(
        default=None,
        doc="Whether to train the output embedding too; default: yes, unless the model shares it "
        "with the input embedding.",
    )
    max_steps: int | None = chz.field(
        default=None,
        doc="Maximum number of optimizer steps; the learning-rate schedule ends there too.",
    )
    seed: int = chz.field(
        default=0, doc="Random seed for the adapter's first weights, the data and the samples."
    )
    dry_run: bool = chz.field(
        default=False, doc="Whether to print only what would be trained, and stop."
    )
    dry_run_probe: bool = chz.field(
        default=False,
        doc="Whether dry_run also does a few steps on the service, to measure the time.",
    )
    prices: str | None = chz.field(
        default=None,
        doc="File with prices per model, from which dry_run and each step compute the cost; or "
        "`fetch`.",
    )
    behavior_if_log_dir_exists: LogdirBehavior = chz.field(
        default="ask",
        doc="What to do if log_path holds a run: resume it, delete it, raise an error, or ask. "
        "`ask` resumes a run with the same settings; otherwise it asks on a terminal, and raises "
        "an error elsewhere.",
    )

    def log_words(self) -> Sequence[str]:
        """Return words for the default name of the run directory; a recipe may override this."""
        return ()


@chz.chz
class OptimizerOptions:
    """Optimizer and learning-rate schedule."""

    learning_rate: float = chz.field(default=1e-4, doc="Peak learning rate.")
    lr_schedule: LRSchedule = chz.field(
        default="linear", doc="Learning rate over time: linear or cosine decay to 0, or constant."
    )
    warmup_steps: int = chz.field(
        default=0, doc="Number of first steps in which the learning rate rises to its peak."
    )
    weight_decay: float = chz.field(default=0.0, doc="Decoupled weight decay of the adapter.")
    grad_clip_norm: float = chz.field(
        default=0.0,
        doc="Maximum norm of the gradient, which is summed over the batch; 0: no clipping.",
    )
    adam_beta1: float = chz.field(default=0.9, doc="AdamW decay rate of the mean gradient.")
    adam_beta2: float = chz.field(default=0.95, doc="AdamW decay rate of the squared gradient.")
    adam_eps: float = chz.field(default=1e-8, doc="AdamW epsilon, added to the denominator.")


@chz.chz
class CheckpointOptions:
    """Checkpoints and evaluations."""

    save_every: int = chz.field(default=20, doc="Steps between checkpoints; 0: only at the end.")
    save_every_tokens: int = chz.field(
        default=0, doc="Training tokens between checkpoints; 0: tokens do not matter."
    )
    save_every_seconds: float = chz.field(
        default=0.0, doc="Seconds between checkpoints; 0: time does not matter."
    )
    keep_checkpoints: int = chz.field(
        default=2,
        doc="Number of newest checkpoints that keep their training state; older ones keep only "
        "the weights for sampling. 0: all keep it.",
    )
    ttl_seconds: int | None = chz.field(
        default=604800,
        doc="Seconds for which the service keeps periodic checkpoints; None: without limit.",
    )
    rolling_save_every: int = chz.field(
        default=0,
        doc="Steps between rolling checkpoints, of which only the newest is kept; 0: none.",
    )
    rolling_ttl_seconds: int = chz.field(
        default=7200, doc="Seconds for which the service keeps a rolling checkpoint."
    )
    async_periodic_saves: bool = chz.field(
        default=False, doc="Whether training continues while a checkpoint is written."
    )
    eval_every: int = chz.field(
        default=10,
        doc="Steps between evaluations, which also run before the first and after the last step; "
        "0: no evaluations.",
    )
    infrequent_eval_every: int = chz.field(
        default=100, doc="Steps between slow evaluations, such as sampled answers; 0: none."
    )


@chz.chz
class TrackingOptions:
    """Experiment tracking and timing."""

    wandb_project: str | None = chz.field(
        default=None, doc="Weights & Biases project that also receives the metrics."
    )
    wandb_name: str | None = chz.field(
        default=None, doc="Name of the run in Weights & Biases; default: chosen there."
    )
    loggers: str | None = chz.field(
        default=None,
        doc="Other loggers of the metrics, separated by commas: wandb, trackio, tensorboard, "
        "mlflow. metrics.jsonl is always written.",
    )
    session_name: str | None = chz.field(
        default=None,
        doc="Name of the session on the service; default: recipe, run directory and learning rate.",
    )
    enable_trace: bool = chz.field(
        default=False, doc="Whether to write timed spans to trace_events.jsonl, for Perfetto."
    )
    span_chart_every: int = chz.field(
        default=0, doc="Steps between timing charts (iteration_*/timing_gantt.html); 0: none."
    )


@chz.chz
class SharedOptions(TrackingOptions, CheckpointOptions, OptimizerOptions, ModelOptions):
    """The settings that every train loop has."""


# Per field: what must be true of its value, the problem otherwise, and the advice.
_POSITIVE = (lambda value: value > 0, "is not above 0", "use a positive number")
_AT_LEAST_1 = (lambda value: value >= 1, "is less than 1", "use 1 or more")
_NOT_NEGATIVE = (lambda value: value >= 0, "is negative", "use 0 or more")
_BETA = (lambda value: 0 <= value < 1, "is out of range", "use 0 or more, below 1")
_TTL = (
    lambda value: MIN_TTL_SECONDS <= value <= MAX_TTL_SECONDS,
    "is not between 1 hour and 10 years",
    "use 3600 or more",
)
_RULES = {
    "learning_rate": (
        lambda value: 0 < value <= 1,
        "is not between 0 and 1",
        "use a value in between; 1e-5 to 2e-3 is usual for LoRA",
    ),
    "lora_rank": (
        lambda value: 1 <= value <= MAX_LORA_RANK,
        "is out of range",
        f"use 1 to {MAX_LORA_RANK}",
    ),
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "grad_clip_norm": _NOT_NEGATIVE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_eps": _POSITIVE,
    "max_steps": _AT_LEAST_1,
    "early_stopping_evals": _NOT_NEGATIVE,
    "num_epochs": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "groups_per_batch": _AT_LEAST_1,
    "group_size": _AT_LEAST_1,
    "num_batches": _AT_LEAST_1,
    "num_problems": _AT_LEAST_1,
    "num_substeps": _AT_LEAST_1,
    "num_steps": _AT_LEAST_1,
    "num_questions": _AT_LEAST_1,
    "num_shots": _NOT_NEGATIVE,
    "teacher_steps": _AT_LEAST_1,
    "teacher_concurrency": _AT_LEAST_1,
    "n_teacher_targets": _AT_LEAST_1,
    "n_held_out_targets": _AT_LEAST_1,
    "max_turns": _AT_LEAST_1,
    "max_tokens": _AT_LEAST_1,
    "largest": _AT_LEAST_1,
    "temperature": _POSITIVE,
    "dpo_beta": _POSITIVE,
    "timeout_seconds": _POSITIVE,
    "batch": _NOT_NEGATIVE,
    "test_problems": _NOT_NEGATIVE,
    "test_games": _NOT_NEGATIVE,
    "num_examples": _NOT_NEGATIVE,
    "warm_start_examples": _NOT_NEGATIVE,
    "gradient_accumulation": _AT_LEAST_1,
    "submit_ahead": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
    "save_every": _NOT_NEGATIVE,
    "keep_checkpoints": _NOT_NEGATIVE,
    "save_every_tokens": _NOT_NEGATIVE,
    "save_every_seconds": _NOT_NEGATIVE,
    "rolling_save_every": _NOT_NEGATIVE,
    "eval_every": _NOT_NEGATIVE,
    "infrequent_eval_every": _NOT_NEGATIVE,
    "span_chart_every": _NOT_NEGATIVE,
    "test_size": _NOT_NEGATIVE,
    "max_length": (lambda value: value >= 2, "is too short to train a token", "use 2 or more"),
    "ttl_seconds": _TTL,
    "rolling_ttl_seconds": _TTL,
}


def check_options(config: object) -> None:
    """Refuse values that cannot work, before anything is started.

    A config calls this from its `chz.validate` method; fields that it does not have are skipped.

    Raises:
        ConfigurationError: naming the field, its value and what is accepted.
    """
    for name, (holds, problem, advice) in _RULES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if not math.isfinite(value) or not holds(value):
            raise ConfigurationError(f"{name}={value} {problem}; {advice}.")


def check_reply_length(
    config: object, model_name: str, context_window: int | None, *, field: str = "max_tokens"
) -> None:
    """Refuse a `max_tokens` with which no prompt fits; the service would refuse every sample.

    Args:
        config: Settings; without the field, nothing is checked.
        model_name: The model that samples.
        context_window: Its maximum tokens of prompt and reply together; None: unknown.
        field: Name of the setting.

    Raises:
        ConfigurationError: if nothing is left of the context for a prompt.
    """
    max_tokens: int | None = getattr(config, field, None)
    if max_tokens is None or context_window is None or max_tokens < context_window:
        return
    raise ConfigurationError(
        f"{field}={max_tokens} leaves no room for a prompt: {model_name} reads at most "
        f"{context_window} tokens of prompt and reply together; use a {field} below "
        f"{context_window} minus the longest prompt."
    )


def check_row_length(config: object, model_name: str, context_window: int | None) -> None:
    """Refuse a `max_length` that lets rows be longer than the model reads.

    The service would refuse such a row, which may be met only after hours of training.

    Args:
        config: Settings of a recipe, which have the field themselves, or of a train loop, whose
            data have it. Without the field, nothing is checked.
        model_name: The model in training.
        context_window: Its maximum tokens of a sequence; None: unknown.

    Raises:
        ConfigurationError: if `max_length` cuts rows only beyond the context.
    """
    settings = (config, *(getattr(data, "common_config", None) for data in _data_builders(config)))
    limits = [getattr(one, "max_length", None) for one in settings]
    max_length = max((limit for limit in limits if limit is not None), default=None)
    # The last token of a row is only a target, so the model reads one token less.
    if max_length is None or context_window is None or max_length <= context_window + 1:
        return
    raise ConfigurationError(
        f"max_length={max_length} is more than the {context_window} tokens that {model_name} "
        f"reads, so a longer row would stop the run; use max_length={context_window} or less, at "
        "which longer rows are cut."
    )


def _data_builders(config: object) -> list[object]:
    """Return the builders of a train loop's data; some loops have several."""
    holders = (config, *getattr(config, "dataset_configs", ()))
    found = (getattr(holder, "dataset_builder", None) for holder in holders)
    return [builder for builder in found if builder is not None]


def shared_options(config: Any, target: type) -> dict[str, Any]:
    """Return the fields, by name, that a recipe's config and `target` (a chz class) share."""
    names = set(chz.chz_fields(config)) & set(chz.chz_fields(target))
    return {name: getattr(config, name) for name in names}
