"""A mix of several RL data sets."""

from __future__ import annotations

import random
from collections.abc import Sequence

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.dataset_utils import GroupsDataset, epoch_batch_index
from tinker_cookbook.rl.metric_util import dataset_to_env_group_builders
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

__all__ = ["InterleavedRLDatasetBuilder"]


@chz.chz
class InterleavedRLDatasetBuilder(RLDatasetBuilder):
    """Draws each group of a batch from one of several sources, in the given proportions.

    Each source is repeated as often as needed. The held-out data of all sources is used.
    """

    sources: list[RLDatasetBuilder] = chz.field(doc="Data sets to mix.")
    weights: list[float] = chz.field(doc="Relative share of each source.")
    groups_per_batch: int = chz.field(doc="Groups per training step.")
    total_batches: int | None = chz.field(
        default=None, doc="Number of batches; None: as many as all sources have together."
    )
    seed: int = chz.field(default=0, doc="Seed of the random mix.")

    @chz.validate
    def _check(self) -> None:
        if len(self.weights) != len(self.sources) or not self.sources:
            raise ConfigurationError(
                f"weights has {len(self.weights)} values for {len(self.sources)} sources; give one "
                "weight per source, and at least one source."
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigurationError(
                f"weights={self.weights} cannot be used; give numbers of 0 or more, with at least "
                "one above 0."
            )
        if self.groups_per_batch < 1:
            raise ConfigurationError(
                f"groups_per_batch={self.groups_per_batch} is less than 1; use 1 or more."
            )

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the mix, and the held-out data of all sources as one batch."""
        built = [await source() for source in self.sources]
        groups = [dataset_to_env_group_builders(train) for train, _ in built]
        held_out = [
            builder
            for _, test in built
            if test is not None
            for builder in dataset_to_env_group_builders(test)
        ]
        total = self.total_batches
        if total is None:
            total = sum(map(len, groups)) // self.groups_per_batch
        mix = _Interleaved(groups, self.weights, self.groups_per_batch, total, self.seed)
        return mix, GroupsDataset(held_out, len(held_out)) if held_out else None


class _Interleaved(RLDataset):
    def __init__(
        self,
        groups: Sequence[Sequence[EnvGroupBuilder]],
        weights: Sequence[float],
        groups_per_batch: int,
        total_batches: int,
        seed: int,
    ) -> None:
        self._groups = groups
        self._groups_per_batch = groups_per_batch
        # All draws are made here, so that a resumed run gets any batch without those before it.
        rng = random.Random(seed)
        draws = rng.choices(range(len(groups)), weights, k=groups_per_batch * total_batches)
        used = [0] * len(groups)
        self._picks: list[tuple[int, int]] = []
        for source in draws:
            self._picks.append((source, used[source]))
            used[source] += 1
        self._seed = seed

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        start = index * self._groups_per_batch
        return [
            self._groups[source][epoch_batch_index(count, len(self._groups[source]), self._seed)]
            for source, count in self._picks[start : start + self._groups_per_batch]
        ]

    def __len__(self) -> int:
        return len(self._picks) // self._groups_per_batch
