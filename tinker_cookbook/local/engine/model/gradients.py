"""The tensor in which the gradients of an adapter are summed."""

from __future__ import annotations

import torch

from tinker_cookbook.local.engine.model.lora import AdapterLayout
from tinker_cookbook.local.engine.model.precision import add_product
from tinker_cookbook.local.engine.native.low_rank import LowRankGradients, LowRankJob

__all__ = ["GradientSink", "SpareGradients"]


class GradientSink:
    """Adds the gradients of LoRA matrices into one flat float32 tensor."""

    def __init__(self, layout: AdapterLayout, flat: torch.Tensor) -> None:
        self.layout = layout
        self.flat = flat

    def add(
        self,
        group: str,
        *,
        x: torch.Tensor,
        low: torch.Tensor,
        low_grad: torch.Tensor,
        out_grad: torch.Tensor,
        kernels: LowRankGradients | None = None,
    ) -> None:
        """Add the gradients of a group: A's is `low_grad' x`, B's is `out_grad' low`.

        Args:
            x: [T, in], the input of the group.
            low: [T, rank * modules] = scale x A'.
            low_grad: gradient of `x A'`, with the shape of `low`.
            out_grad: [T, out], gradient of the stacked product; each module has its own columns.
            kernels: rounds the operands to bfloat16; None: torch multiplies them without rounding.
        """
        jobs = [LowRankJob(self.layout.stacked_a(self.flat, group), low_grad, x, turned=False)]
        rank, top = self.layout.rank, 0
        for position, target in enumerate(self.layout.groups[group]):
            into = self.layout.matrix(self.flat, target.path + ".B")
            left = low[:, position * rank : (position + 1) * rank]
            right = out_grad[:, top : top + target.out_features]
            jobs.append(LowRankJob(into, left, right, turned=True))
            top += target.out_features
        if kernels is not None:
            kernels.add(jobs)
            return
        for job in jobs:
            pair = (job.right.t(), job.left) if job.turned else (job.left.t(), job.right)
            add_product(job.into, *pair)


class SpareGradients:
    """Keeps the last returned gradient tensor, since fresh memory costs more than zeroing it."""

    def __init__(self) -> None:
        self._spare: torch.Tensor | None = None

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of zeros."""
        spare, self._spare = self._spare, None
        if spare is None or spare.shape != like.shape or spare.device != like.device:
            return torch.zeros_like(like)
        return spare.zero_()

    def give(self, gradient: torch.Tensor) -> None:
        """Take back a tensor that is not read any more."""
        self._spare = gradient
