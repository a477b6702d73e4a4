"""AdamW over the flat parameter tensor of an adapter.

Source: torch.optim.AdamW (decoupled weight decay, bias correction), arXiv:1711.05101.
"""

from __future__ import annotations

import math

import torch

from tinker_cookbook.local.engine.types import AdamSpec
from tinker_cookbook.local.errors import UserError

__all__ = ["AdamState", "check_adam_spec"]

_PIECE = 2**17
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
    """The first and second moment estimates and the number of steps taken."""

    def __init__(self, like: torch.Tensor) -> None:
        self.num_steps = 0
        self.exp_avg = torch.zeros_like(like)
        self.exp_avg_sq = torch.zeros_like(like)

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
        tensors = (parameters, gradient, self.exp_avg, self.exp_avg_sq)
        # Piece by piece, so that all operations on a piece find it in the processor's cache.
        for values, grad, mean, square in zip(*(t.split(_PIECE) for t in tensors), strict=True):
            mean.lerp_(grad, 1 - adam.beta1)
            square.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
            denominator = square.sqrt().mul_(correction2**-0.5).add_(max(adam.eps, _TINY))
            if adam.weight_decay:
                values.mul_(1 - adam.learning_rate * adam.weight_decay)
            values.addcdiv_(mean, denominator, value=-adam.learning_rate / correction1)
        return grad_norm
