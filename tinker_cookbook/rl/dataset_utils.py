"""Data sets: epochs, groups made from their number, and builders with a chat format."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "EpochCycledRLDataset",
    "GroupsDataset",
    "NumberedDataset",
    "RenderedDatasetBuilder",
    "cycle_permutation",
    "epoch_batch_index",
]


def cycle_permutation(size: int, seed: int | str, cycle: int) -> Sequence[int]:
    """Return a permutation of `range(size)`; equal seeds and cycles give equal permutations."""
    order = list(range(size))
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return order


def epoch_batch_index(index: int, num_batches: int, shuffle_seed: int | None = None) -> int:
    """Return which batch of the data is used at step `index`, over any number of epochs.

    Args:
        index: The step, from 0.
        num_batches: Number of batches of the data.
        shuffle_seed: None: every epoch has the same order; otherwise each has a different one.
    """
    cycle, position = divmod(index, num_batches)
    if shuffle_seed is None:
        return position
    return cycle_permutation(num_batches, shuffle_seed, cycle)[position]


class EpochCycledRLDataset(RLDataset):
    """A data set repeated for several epochs."""

    def __init__(self, inner: RLDataset, num_epochs: int, shuffle_seed: int | None = None) -> None:
        if num_epochs < 1:
            raise ConfigurationError(f"num_epochs={num_epochs} is less than 1; use 1 or more.")
        self.inner = inner
        self.num_epochs = num_epochs
        self.shuffle_seed = shuffle_seed

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the batch at `index`, counted over all epochs."""
        return self.inner.get_batch(epoch_batch_index(index, len(self.inner), self.shuffle_seed))

    def __len__(self) -> int:
        """Return the number of batches of all epochs."""
        return len(self.inner) * self.num_epochs


class GroupsDataset(RLDataset):
    """A list of groups in batches; a last batch that is not full is left out."""

    def __init__(self, groups: Sequence[EnvGroupBuilder], groups_per_batch: int) -> None:
        self._groups = groups
        self._size = groups_per_batch

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        return self._groups[index * self._size : (index + 1) * self._size]

    def __len__(self) -> int:
        return len(self._groups) // self._size


class NumberedDataset(RLDataset):
    """Groups that are made from their number; equal numbers give equal tasks."""

    def __init__(
        self,
        make_group: Callable[[int], EnvGroupBuilder],
        *,
        num_batches: int,
        groups_per_batch: int,
        first: int = 0,
    ) -> None:
        """Set the range of numbers.

        Args:
            make_group: Makes the group with a given number.
            num_batches: Number of training steps.
            groups_per_batch: Groups per step.
            first: Number of the first group. Give held-out groups numbers that training does not
                reach.
        """
        if groups_per_batch < 1:
            raise ConfigurationError(
                f"groups_per_batch={groups_per_batch} is less than 1; use 1 or more."
            )
        self._make_group = make_group
        self._num_batches = num_batches
        self._size = groups_per_batch
        self._first = first

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = self._first + index * self._size
        return [self._make_group(start + i) for i in range(self._size)]

    def __len__(self) -> int:
        return self._num_batches


@chz.chz
class RenderedDatasetBuilder(RLDatasetBuilder):
    """The base of data set builders whose environments use a chat format."""

    model_name: str
    renderer_name: str
    groups_per_batch: int
    group_size: int
    seed: int = 0

    def build_renderer(self) -> Renderer:
        """Return the chat format. Its tokenizer is loaded on the first call and cached."""
        from tinker_cookbook.renderers import load_renderer

        return load_renderer(self.renderer_name, self.model_name)
