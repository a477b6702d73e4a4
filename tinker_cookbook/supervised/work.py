"""Count the work of a run before it starts: every batch is rendered, no service is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.supervised.schedule import Schedule, epoch_seed
from tinker_cookbook.supervised.types import SupervisedDataset

if TYPE_CHECKING:
    import tinker

__all__ = ["count_batches", "num_loss_tokens", "num_tokens"]


def count_batches(
    dataset: SupervisedDataset,
    schedule: Schedule,
    *,
    seed: int,
    model_name: str,
    has_example: bool = True,
) -> Workload:
    """Count the rows and tokens of all steps.

    Args:
        dataset: The training data; its epoch is changed.
        schedule: The steps.
        seed: Seed of the run, which decides the order of the rows.
        model_name: Model whose tokenizer shows the first example.
        has_example: Whether the first datum can be shown: it has one target per position.

    Raises:
        DataError: if the data cannot be used.
    """
    from tinker_cookbook import tokenizer_utils
    from tinker_cookbook.display import describe_example

    num_rows = tokens = loss_tokens = longest = 0
    example = None
    opened_epoch = -1
    for step in range(schedule.total_steps):
        epoch, _ = schedule.position(step)
        if epoch != opened_epoch:
            dataset.set_epoch(seed=epoch_seed(seed, epoch))
            opened_epoch = epoch
        data = [datum for index in schedule.batches(step) for datum in dataset.get_batch(index)]
        if example is None and has_example:
            example = describe_example(data[0], tokenizer_utils.get_tokenizer(model_name))
        num_rows += len(data)
        tokens += num_tokens(data)
        loss_tokens += num_loss_tokens(data)
        longest = max([longest, *(datum.model_input.length for datum in data)])
    return Workload(
        total_steps=schedule.total_steps,
        num_rows=num_rows,
        num_tokens=tokens,
        num_loss_tokens=loss_tokens,
        longest=longest,
        notes=tuple(dataset.summary),
        example=example,
    )


def num_tokens(data: Sequence[tinker.Datum]) -> int:
    """Return the number of input tokens."""
    return sum(datum.model_input.length for datum in data)


def num_loss_tokens(data: Sequence[tinker.Datum]) -> int:
    """Return the number of tokens that have a loss."""
    return sum(int((datum.loss_fn_inputs["weights"].to_numpy() != 0).sum()) for datum in data)
