"""Settings that every training recipe has, each defined once.

A recipe's config inherits the groups it needs and adds its own fields. All keys stay flat, so
`learning_rate=1e-4` works on every command line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.lora_rank import MAX_LORA_RANK
from tinker_cookbook.utils.lr_scheduling import LRSchedule

__all__ = [
    "CheckpointOptions",
    "LogdirBehavior",
    "ModelOptions",
    "OptimizerOptions",
    "SharedOptions",
    "TrackingOptions",
    "check_options",
    "expand_path",
    "shared_options",
]

LogdirBehavior = Literal["delete", "resume", "ask", "raise"]


def expand_path(_: Any, path: str | None) -> str | None:
    """A chz munger: `~` becomes the home folder."""
    return None if path is None else str(Path(path).expanduser())


@chz.chz
class ModelOptions:
    """Which model is trained, where, from what, and how far."""

    model_name: str | None = chz.field(
        default=None, doc="Base model; a name or a folder. Default: that of the local service."
    )
    renderer_name: str | None = chz.field(
        default=None, doc="Chat format; default: the one recommended for the model."
    )
    base_url: str | None = chz.field(
        default=None,
        doc="Tinker service, or `local`; default: TINKER_BASE_URL, an API key, else local.",
    )
    log_path: str | None = chz.field(
        default=None,
        munger=expand_path,
        doc="Run directory; default: a name made from the settings, in ~/tinker-runs.",
    )
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="tinker:// path of saved weights to start from, with a new optimizer."
    )
    lora_rank: int = chz.field(default=32, doc="Rank of the adapter.")
    train_unembed: bool | None = chz.field(
        default=None,
        doc="Adapt the output embedding too; default: unless it is the input embedding as well.",
    )
    max_steps: int | None = chz.field(
        default=None, doc="Stop after this many optimizer steps; shortens the schedule too."
    )
    seed: int = chz.field(default=0, doc="Seed of the adapter's start and of the data order.")
    behavior_if_log_dir_exists: LogdirBehavior = chz.field(
        default="ask",
        doc="If log_path holds a run: resume; delete; raise; or ask, which resumes a run of the "
        "same settings and asks (on a terminal) or refuses otherwise.",
    )


@chz.chz
class OptimizerOptions:
    """The learning rate over time and AdamW."""

    learning_rate: float = chz.field(default=1e-4, doc="Peak learning rate.")
    lr_schedule: LRSchedule = chz.field(default="linear", doc="linear, cosine or constant.")
    warmup_steps: int = chz.field(default=0, doc="Steps over which the learning rate rises.")
    weight_decay: float = chz.field(default=0.0, doc="Decoupled weight decay of the adapter.")
    grad_clip_norm: float = chz.field(
        default=0.0, doc="Limit on the norm of the gradient, which is a sum over the batch; 0: off."
    )
    adam_beta1: float = chz.field(default=0.9, doc="AdamW's decay of the mean gradient.")
    adam_beta2: float = chz.field(default=0.95, doc="AdamW's decay of the mean square.")
    adam_eps: float = chz.field(default=1e-8, doc="AdamW's epsilon.")


@chz.chz
class CheckpointOptions:
    """When to save and to evaluate, and how long the service keeps what is saved."""

    save_every: int = chz.field(default=20, doc="Steps between checkpoints; 0: only at the end.")
    save_every_tokens: int = chz.field(default=0, doc="Tokens between checkpoints; 0: off.")
    save_every_seconds: float = chz.field(default=0.0, doc="Seconds between checkpoints; 0: off.")
    keep_checkpoints: int = chz.field(
        default=2,
        doc="Training states kept of a run, the newest; of older checkpoints only the weights to "
        "sample from stay. 0: all.",
    )
    ttl_seconds: int | None = chz.field(
        default=604800, doc="How long the service keeps periodic checkpoints; None: for ever."
    )
    rolling_save_every: int = chz.field(
        default=0, doc="Steps between rolling checkpoints (only the newest is kept); 0: off."
    )
    rolling_ttl_seconds: int = chz.field(default=7200, doc="How long rolling ones are kept.")
    async_periodic_saves: bool = chz.field(
        default=False, doc="Go on with the next steps while a checkpoint is being written."
    )
    eval_every: int = chz.field(
        default=10,
        doc="Steps between evaluations, also before the first step and at the end; 0: off.",
    )
    infrequent_eval_every: int = chz.field(
        default=100, doc="The same for evaluators that take long; 0: off."
    )


@chz.chz
class TrackingOptions:
    """Names of the run elsewhere, and where its time goes."""

    wandb_project: str | None = chz.field(
        default=None, doc="Send metrics to this Weights & Biases project too."
    )
    wandb_name: str | None = chz.field(default=None, doc="Name of the run there.")
    session_name: str | None = chz.field(default=None, doc="Name of the session on the service.")
    enable_trace: bool = chz.field(
        default=False, doc="Write every timed span to trace_events.jsonl, for Perfetto."
    )
    span_chart_every: int = chz.field(
        default=0, doc="Steps between charts of a step's spans (iteration_*/timing_gantt.html)."
    )


@chz.chz
class SharedOptions(TrackingOptions, CheckpointOptions, OptimizerOptions, ModelOptions):
    """The settings that every train loop has."""


# What must hold of a field, and what to do otherwise.
_POSITIVE = (lambda value: value > 0, "is not above 0", "use a positive number")
_AT_LEAST_1 = (lambda value: value >= 1, "is less than 1", "use 1 or more")
_NOT_NEGATIVE = (lambda value: value >= 0, "is negative", "use 0 or more")
_BETA = (lambda value: 0 <= value < 1, "is out of range", "use 0 or more, below 1")
_TTL = (
    lambda value: 3600 <= value <= 315_360_000,
    "is not between 1 hour and 10 years",
    "use 3600 or more",
)
_RULES = {
    "learning_rate": (
        lambda value: 0 < value <= 1,
        "is not between 0 and 1",
        "LoRA usually wants 1e-5 to 2e-3",
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
    "num_epochs": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "groups_per_batch": _AT_LEAST_1,
    "num_batches": _AT_LEAST_1,
    "num_problems": _AT_LEAST_1,
    "num_substeps": _AT_LEAST_1,
    "max_turns": _AT_LEAST_1,
    "max_tokens": _AT_LEAST_1,
    "largest": _AT_LEAST_1,
    "temperature": _POSITIVE,
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
    "max_length": (lambda value: value >= 2, "leaves no token to train", "use 2 or more"),
    "ttl_seconds": _TTL,
    "rolling_ttl_seconds": _TTL,
}


def check_options(config: Any) -> None:
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


def shared_options(config: Any, target: type) -> dict[str, Any]:
    """The fields that a recipe's config and `target` (a chz class) have in common, by name."""
    names = set(chz.chz_fields(config)) & set(chz.chz_fields(target))
    return {name: getattr(config, name) for name in names}
