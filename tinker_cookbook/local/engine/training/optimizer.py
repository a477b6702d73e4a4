"""AdamW over the flat parameter tensor of an adapter.

Source: torch.optim.AdamW (decoupled weight decay, bias correction), arXiv:1711.05101.
"""

from __future__ import annotations

import math

import torch

from tinker_cookbook.local.engine.native.adam import AdamFactors
from tinker_cookbook.local.engine.training.moments import FullMoments, Moments, ShortMoments
from tinker_cookbook.local.engine.types import AdamSpec
from tinker_cookbook.local.errors import UserError

__all__ = ["AdamState", "check_adam_spec"]

_TINY = 1e-30
"""Smallest eps: avoids 0 / 0 for a parameter that never had a gradient."""


def check_adam_spec(adam: AdamSpec) -> None:
    """Refuse settings that would make parameters NaN or keep them from changing."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(adam, name)
        if not (_is_number(value) and 0 <= value < math.inf):
            raise UserError(f"{name}={value} is not usable; it must be a finite number >= 0")
    for name in ("beta1", "beta2"):
        value = getattr(adam, name)
        if not (_is_number(value) and 0 <= value < 1):
            raise UserError(f"{name}={value} is not usable; it must be >= 0 and below 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class AdamState:
    """The two moment estimates and the number of steps taken."""

    def __init__(self, parameters: torch.Tensor, *, short: bool = False) -> None:
        """Begin with zeros; `short` holds the moments in 24 bits instead of float32."""
        kind = ShortMoments if short else FullMoments
        self.moments: Moments = kind.zeros_like(parameters)
        self.num_steps = 0

    @classmethod
    def restore(cls, moments: Moments, num_steps: int) -> AdamState:
        """Return the state after some steps."""
        state = cls.__new__(cls)
        state.moments, state.num_steps = moments, num_steps
        return state

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor, adam: AdamSpec) -> float:
        """Update `parameters` in place; return the norm of the gradient before clipping.

        Clipping scales `gradient` in place.
        """
        grad_norm = float(torch.linalg.vector_norm(gradient))
        if 0 < adam.grad_clip_norm < grad_norm:
            gradient.mul_(adam.grad_clip_norm / grad_norm)
        self.num_steps += 1
        correction1 = 1 - adam.beta1**self.num_steps
        correction2 = 1 - adam.beta2**self.num_steps
        factors = AdamFactors(
            mean_share=1 - adam.beta1,
            square_keep=adam.beta2,
            square_share=1 - adam.beta2,
            root_factor=correction2**-0.5,
            eps=max(adam.eps, _TINY),
            decay=1 - adam.learning_rate * adam.weight_decay,
            rate=-adam.learning_rate / correction1,
        )
        self.moments.update(parameters, gradient, factors)
        return grad_norm
