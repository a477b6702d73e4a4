"""Batches of given sequences with the targets of their teachers, prepared one step ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.distillation.mixture import Example, Mixture
from tinker_cookbook.distillation.teacher import (
    PlacedSequence,
    TargetKind,
    Teacher,
    place,
    trained_positions,
)
from tinker_cookbook.distillation.top_k import TaughtDatum
from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TaughtBatches", "teach"]


class TaughtBatches:
    """Batches of a mixture; the teacher scores the next one while the current one is trained."""

    def __init__(
        self,
        mixture: Mixture,
        teachers: Sequence[Teacher],
        names: Sequence[str],
        *,
        count: int,
        kind: TargetKind,
    ) -> None:
        """Keep what is needed to score a batch.

        Args:
            mixture: The sequences.
            teachers: The teacher of each data set.
            names: Name of each data set in the metrics.
            count: Tokens per position.
            kind: Which tokens these are.
        """
        self.mixture = mixture
        self._teachers = teachers
        self._names = names
        self._count = count
        self._kind: TargetKind = kind
        self._prepared: tuple[int, asyncio.Task[list[TaughtDatum]]] | None = None

    def prepare(self, step: int) -> None:
        """Start to score a batch."""
        self._prepared = step, asyncio.create_task(self._score(step))

    async def get(self, step: int, *, last: bool) -> list[TaughtDatum]:
        """Return the batch of a step, and start to score the next one unless this is the last."""
        if self._prepared is None or self._prepared[0] != step:
            self.prepare(step)
        assert self._prepared is not None, "prepare sets it"
        taught = await self._prepared[1]
        if not last:
            self.prepare(step + 1)
        return taught

    def cancel(self) -> None:
        """Stop scoring."""
        if self._prepared is not None:
            self._prepared[1].cancel()

    async def _score(self, step: int) -> list[TaughtDatum]:
        examples = await asyncio.to_thread(self.mixture.get_batch, step)
        return await teach(
            examples,
            self._teachers,
            self._names,
            f"step {step}",
            count=self._count,
            kind=self._kind,
        )


async def teach(
    examples: Sequence[Example],
    teachers: Sequence[Teacher],
    names: Sequence[str],
    where: str,
    *,
    count: int,
    kind: TargetKind,
) -> list[TaughtDatum]:
    """Ask the teachers about sequences, all at once.

    Args:
        examples: The sequences.
        teachers: The teacher of each data set.
        names: Name of each data set in the metrics.
        where: Names the batch in errors.
        count: Tokens per position.
        kind: Which tokens these are.

    Raises:
        DataValidationError: if a sequence has no trained token, or is too long for its teacher.
    """

    async def ask(number: int, example: Example) -> TaughtDatum:
        teacher = teachers[example.dataset_index]
        weights, positions, placed = _place(example, teacher, f"{where}, datum {number}")
        targets = await teacher.targets(placed, count, kind)
        name = names[example.dataset_index]
        return TaughtDatum(example.datum, positions, weights[positions], targets, name)

    return await gather_or_cancel(ask(number, example) for number, example in enumerate(examples))


def _place(
    example: Example, teacher: Teacher, where: str
) -> tuple[np.ndarray, np.ndarray, PlacedSequence]:
    """Return the weights, the trained positions, and what the teacher sees."""
    weights = example.datum.loss_fn_inputs["weights"].to_numpy()
    positions = trained_positions(weights, where=where)
    placed = place(example.datum, positions, example.teacher_prompt)
    if not teacher.fits(placed):
        raise DataValidationError(
            f"{where}: the teacher {teacher.identity} would see {placed.sequence.length} tokens, "
            f"but it reads fewer than {teacher.context_window}; use a smaller max_length or a "
            "shorter prompt."
        )
    return weights, positions, placed
