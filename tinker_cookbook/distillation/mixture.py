"""Batches from several supervised data sets, each with its own teacher.

Each data set is a stream: its epochs in sequence, each with its own order. A step takes a fixed
number of datums from each stream and continues where the step before stopped, so nothing is left
out, and a step's datums depend only on its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.supervised.schedule import epoch_seed
from tinker_cookbook.supervised.types import SupervisedDataset

if TYPE_CHECKING:
    import tinker

__all__ = ["Example", "Mixture", "TeacherPrompts", "divide_batch", "load_examples"]


@runtime_checkable
class TeacherPrompts(Protocol):
    """What a data set has if the teacher sees another prompt than the student."""

    def get_teacher_prompts(self, index: int) -> list[tinker.ModelInput]:
        """Return the teacher's prompt for each datum of `get_batch(index)`.

        The teacher sees this prompt and then the datum's tokens from the first trained one on.
        """
        ...


@dataclass(frozen=True)
class Example:
    """A datum, the number of its data set, and the teacher's prompt if it has its own."""

    datum: tinker.Datum
    dataset_index: int
    teacher_prompt: tinker.ModelInput | None = None


def load_examples(dataset: SupervisedDataset, batch: int, dataset_index: int) -> list[Example]:
    """Return a batch of a data set, with the teacher's prompts if it has them."""
    data = dataset.get_batch(batch)
    prompts: Sequence[tinker.ModelInput | None] = [None] * len(data)
    if isinstance(dataset, TeacherPrompts):
        prompts = dataset.get_teacher_prompts(batch)
    return [
        Example(datum, dataset_index, prompt) for datum, prompt in zip(data, prompts, strict=True)
    ]


class Mixture:
    """Batches of a run, by step."""

    def __init__(
        self,
        datasets: Sequence[SupervisedDataset],
        counts: Sequence[int],
        *,
        num_epochs: int = 1,
        seed: int = 0,
    ) -> None:
        """Set the streams.

        Args:
            datasets: The data sets; all batches of one must have the same size.
            counts: Datums per step of each.
            num_epochs: Passes over the data set that is used up first.
            seed: Decides the order of the data.
        """
        self._streams = [_Stream(dataset, index, seed) for index, dataset in enumerate(datasets)]
        self._counts = list(counts)
        self._num_epochs = num_epochs

    @property
    def num_steps(self) -> int:
        """Number of steps until the first data set is used up."""
        return min(
            self._num_epochs * len(stream) // count
            for stream, count in zip(self._streams, self._counts, strict=True)
        )

    def get_batch(self, step: int) -> list[Example]:
        """Return the datums of a step."""
        return [
            example
            for stream, count in zip(self._streams, self._counts, strict=True)
            for example in stream.take(step * count, count)
        ]


def divide_batch(batch_size: int, weights: Sequence[float]) -> list[int]:
    """Return the datums per step of each data set, in proportion to the weights.

    Raises:
        ConfigurationError: if a weight is not positive, or a data set would get no datum.
    """
    for index, weight in enumerate(weights):
        if not weight > 0:
            raise ConfigurationError(
                f"dataset_configs[{index}].weight={weight} must be above 0; leave the data set out."
            )
    exact = [batch_size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    # The largest remainders get the datums that rounding down has left over.
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in order[: batch_size - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        raise ConfigurationError(
            f"batch_size={batch_size} gives 0 datums to dataset_configs[{counts.index(0)}]; use "
            "a larger batch_size or weight."
        )
    return counts


class _Stream:
    """The datums of a data set, epoch after epoch."""

    def __init__(self, dataset: SupervisedDataset, index: int, seed: int) -> None:
        self._dataset = dataset
        self._index = index
        self._seed = seed
        self._epoch = -1
        self._loaded: tuple[int, int] | None = None
        self._examples: list[Example] = []
        self._batch_size = len(self._load(0, 0)) if len(dataset) else 0

    def __len__(self) -> int:
        """Return the number of datums in an epoch."""
        return len(self._dataset) * self._batch_size

    def take(self, start: int, count: int) -> list[Example]:
        """Return `count` datums from position `start` on, counted over all epochs."""
        taken: list[Example] = []
        while len(taken) < count:
            epoch, position = divmod(start + len(taken), len(self))
            batch, offset = divmod(position, self._batch_size)
            taken += self._load(epoch, batch)[offset : offset + count - len(taken)]
        return taken

    def _load(self, epoch: int, batch: int) -> list[Example]:
        if self._loaded == (epoch, batch):
            return self._examples
        if epoch != self._epoch:
            self._dataset.set_epoch(seed=epoch_seed(self._seed, epoch))
            self._epoch = epoch
        examples = load_examples(self._dataset, batch, self._index)
        if self._loaded is not None and len(examples) != self._batch_size:
            raise ConfigurationError(
                f"batch {batch} of {type(self._dataset).__name__} has {len(examples)} datums and "
                f"the first has {self._batch_size}; distillation needs batches of one size."
            )
        self._examples, self._loaded = examples, (epoch, batch)
        return examples
