"""The number format of the services that tests start, and tolerances that depend on it."""

from __future__ import annotations

import os
from typing import TypeVar

__all__ = ["STEPPED_NATS", "TRAINED_NATS", "TRAINED_SHARE", "by_format"]

T = TypeVar("T")

# In bfloat16, scores (`forward`, samplers, all losses but one) are float32 sums over rounded
# weights; `cross_entropy` that trains, and so the second pass of a client's own loss, also rounds
# what it multiplies.
TRAINED_NATS = 0.15
"""A logprob of a bfloat16 training step, compared with a score: at 8 significant bits, each of a
tiny random model's logits of up to 16 is off by up to 0.06."""
TRAINED_SHARE = 5e-3
"""The loss of such a step, relative: a sum over tokens, whose roundings average out."""
STEPPED_NATS = 1.5
"""Logprobs after one large step along gradients that differ so: Adam's first step is as long for
a gradient near 0, whose sign the rounding may turn."""


def by_format(*, float32: T, bfloat16: T) -> T:
    """What holds in the format of this run; see `TINKER_COOKBOOK_DTYPE` in `tests/conftest.py`."""
    return {"float32": float32, "bfloat16": bfloat16}[os.environ["TINKER_COOKBOOK_DTYPE"]]
