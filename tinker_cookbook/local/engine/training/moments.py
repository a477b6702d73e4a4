"""Adam's two moments, in float32 or in 24 bits, and the update of parameters by them.

The 24 bits are the upper ones of a float32, rounded to nearest with ties to even: sign, exponent
and 15 bits of the mantissa. A step with beta2=0.999 changes a moment by about 2^-10 of its value,
and rounding by at most 2^-16. Arithmetic is in float32 in both formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.adam import AdamFactors, adam_kernel

__all__ = [
    "FullMoments",
    "Moments",
    "ShortMoments",
    "lengthen",
    "moments_of",
    "shorten_into",
]

_PIECE = 2**17
"""Numbers that a CPU updates together, so that all operations on them find them in its cache."""


@dataclass
class FullMoments:
    """Both moments in float32, each [N]."""

    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def zeros_like(cls, parameters: Tensor) -> FullMoments:
        """Return the moments before the first step."""
        return cls(torch.zeros_like(parameters), torch.zeros_like(parameters))

    def float32(self) -> dict[str, Tensor]:
        """Return the moments by their names in a checkpoint."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def assign(self, name: str, values: Tensor) -> None:
        """Set the moment of this name in a checkpoint, from float32 [N]."""
        self.float32()[name].copy_(values)

    def update(self, parameters: Tensor, gradient: Tensor, factors: AdamFactors) -> None:
        """Update the moments and then the parameters, in place."""
        tensors = (parameters, gradient, self.exp_avg, self.exp_avg_sq)
        for values, grad, mean, square in _pieces(*tensors):
            mean.lerp_(grad, factors.mean_share)
            square.mul_(factors.square_keep).addcmul_(grad, grad, value=factors.square_share)
            denominator = square.sqrt().mul_(factors.root_factor).add_(factors.eps)
            if factors.decay != 1:
                values.mul_(factors.decay)
            values.addcdiv_(mean, denominator, value=factors.rate)


@dataclass
class ShortMoments:
    """Both moments in 24 bits: bits 31 to 16 in int16 [N], bits 15 to 8 in uint8 [N]."""

    exp_avg_upper: Tensor
    exp_avg_lower: Tensor
    exp_avg_sq_upper: Tensor
    exp_avg_sq_lower: Tensor

    @classmethod
    def zeros_like(cls, parameters: Tensor) -> ShortMoments:
        """Return the moments before the first step."""
        upper, lower = torch.int16, torch.uint8
        formats = (upper, lower, upper, lower)
        return cls(*(torch.zeros_like(parameters, dtype=dtype) for dtype in formats))

    def float32(self) -> dict[str, Tensor]:
        """Return copies of the moments by their names in a checkpoint."""
        return {name: lengthen(*parts) for name, parts in self._parts().items()}

    def assign(self, name: str, values: Tensor) -> None:
        """Set the moment of this name in a checkpoint, from float32 [N], which is rounded."""
        tensors = (*self._parts()[name], values)
        for upper, lower, piece in _pieces(*tensors):
            shorten_into(upper, lower, piece)

    def update(self, parameters: Tensor, gradient: Tensor, factors: AdamFactors) -> None:
        """Update the moments and then the parameters, in place."""
        kernel = adam_kernel() if parameters.device.type == "cpu" else None
        if kernel is None:
            self.update_by_torch(parameters, gradient, factors)
            return
        mean, square = self._parts().values()
        kernel.step(parameters, gradient, mean, square, factors)

    def update_by_torch(self, parameters: Tensor, gradient: Tensor, factors: AdamFactors) -> None:
        """Compute `update` without the kernel, with the same bits of the moments.

        Parameters can differ in the last bit, since torch's square roots can.
        """
        tensors = (parameters, gradient, *vars(self).values())
        for values, grad, *parts in _pieces(*tensors):
            mean_upper, mean_lower, square_upper, square_lower = parts
            mean, square = lengthen(mean_upper, mean_lower), lengthen(square_upper, square_lower)
            mean.add_((grad - mean).mul_(factors.mean_share))
            square.mul_(factors.square_keep).add_((grad * factors.square_share).mul_(grad))
            denominator = square.sqrt().mul_(factors.root_factor).add_(factors.eps)
            values.mul_(factors.decay).add_((mean * factors.rate).div_(denominator))
            shorten_into(mean_upper, mean_lower, mean)
            shorten_into(square_upper, square_lower, square)

    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "exp_avg": (self.exp_avg_upper, self.exp_avg_lower),
            "exp_avg_sq": (self.exp_avg_sq_upper, self.exp_avg_sq_lower),
        }


Moments = FullMoments | ShortMoments


def moments_of(tensors: Mapping[str, Tensor]) -> Moments | None:
    """Return the moments that are made of tensors of these names; None if there are none."""
    for kind in (FullMoments, ShortMoments):
        names = [field.name for field in fields(kind)]
        if all(name in tensors for name in names):
            return kind(*(tensors[name] for name in names))
    return None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the same pieces of all tensors; on a GPU, each of them as a whole."""
    size = _PIECE if tensors[0].device.type == "cpu" else max(len(tensors[0]), 1)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def lengthen(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the float32 numbers of these 24 bits."""
    bits = upper.to(torch.int32).bitwise_left_shift_(16)
    return bits.bitwise_or_(lower.to(torch.int32).bitwise_left_shift_(8)).view(torch.float32)


def shorten_into(upper: Tensor, lower: Tensor, values: Tensor) -> None:
    """Round float32 numbers to 24 bits, ties to even."""
    bits = values.view(torch.int32)
    bits = bits.bitwise_right_shift(8).bitwise_and_(1).add_(0x7F).add_(bits)
    upper.copy_(bits.bitwise_right_shift(16))
    lower.copy_(bits.bitwise_right_shift_(8).bitwise_and_(0xFF))
