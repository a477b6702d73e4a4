"""Which batches of which epoch make up each optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_cookbook.checkpoint_utils import CheckpointRecord

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    batches_per_epoch: int
    num_epochs: int
    accumulation: int
    max_steps: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; the last takes what is left of its batches."""
        return -(-self.batches_per_epoch // self.accumulation)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        steps = self.steps_per_epoch * self.num_epochs
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and first batch of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.accumulation

    def batches(self, step: int) -> range:
        """The batches of a step."""
        _, first = self.position(step)
        return range(first, min(first + self.accumulation, self.batches_per_epoch))

    def step_of(self, record: CheckpointRecord) -> int:
        """The first step that a checkpoint does not contain."""
        if record.final:
            return self.total_steps
        return (record.epoch or 0) * self.steps_per_epoch + (record.batch or 0) // self.accumulation
