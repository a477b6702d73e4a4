"""The schedule of a supervised run: the epoch and the batches of each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_cookbook.runs.checkpoints import CheckpointRecord

__all__ = ["Schedule", "epoch_seed"]


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run."""

    batches_per_epoch: int
    num_epochs: int
    accumulation: int
    max_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last one may have fewer batches."""
        return -(-self.batches_per_epoch // self.accumulation)

    @property
    def total_steps(self) -> int:
        """Number of steps in the run."""
        steps = self.steps_per_epoch * self.num_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the index of its first batch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.accumulation

    def batches(self, step: int) -> range:
        """Return the indices of a step's batches."""
        _, first = self.position(step)
        return range(first, min(first + self.accumulation, self.batches_per_epoch))

    def step_of(self, record: CheckpointRecord) -> int:
        """Return the first step that a checkpoint does not contain."""
        if record.final:
            return self.total_steps
        return (record.epoch or 0) * self.steps_per_epoch + (record.batch or 0) // self.accumulation


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's data order: the epoch itself for seed 0.

    The factor keeps the sequences of different seeds apart.
    """
    return (seed * 1_000_003 + epoch) % 2**32
