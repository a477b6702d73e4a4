"""Learning-rate schedules as multipliers of the peak rate."""

from __future__ import annotations

import math
from typing import Literal, get_args

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["LRSchedule", "compute_schedule_lr_multiplier"]

LRSchedule = Literal["linear", "cosine", "constant"]


def compute_schedule_lr_multiplier(
    lr_schedule: LRSchedule, step: int, total_steps: int, *, warmup_steps: int = 0
) -> float:
    """Compute the factor on the peak learning rate for one optimizer step.

    Args:
        lr_schedule: `linear` and `cosine` decay from 1 towards 0 over the steps after the warmup,
            `constant` stays at 1.
        step: Index of the optimizer step, from 0.
        total_steps: Number of steps of the whole run, including the warmup.
        warmup_steps: Number of steps with a linear rise: step i gets (i + 1) / (warmup_steps + 1).

    Returns:
        A factor in (0, 1]; it never reaches 0 within the run, so no step is wasted.

    Raises:
        ConfigurationError: if the schedule is unknown.
    """
    if lr_schedule not in get_args(LRSchedule):
        raise ConfigurationError(
            f"lr_schedule={lr_schedule!r} is unknown; use one of {', '.join(get_args(LRSchedule))}."
        )
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if lr_schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    if lr_schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
