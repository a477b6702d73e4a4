"""Several files under one numbering of rows, and how weights mix them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinker_cookbook.supervised.conversations import MarkupMode, SourceRow
from tinker_cookbook.supervised.sources.containers import open_rows
from tinker_cookbook.supervised.sources.data_spec import DataPart, parse_data
from tinker_cookbook.supervised.sources.row_file import (
    FULL_CHECK_BYTES,
    SPREAD_CHECK_ROWS,
    DataSource,
    ReadCounts,
    RowCheck,
    RowFile,
    accept_row,
)

__all__ = ["Mix", "MixUntil", "OpenedPart", "SeveralFiles", "mix_lines", "open_data", "open_parts"]

MixUntil = Literal["first_exhausted", "all_exhausted"]
"""When an epoch of a weighted mix ends: when the first or the last file is used up."""


@dataclass(frozen=True)
class OpenedPart:
    """The rows of one place of `data=`."""

    path: str
    weight: float | None
    start: int
    """Number of its first row in the common numbering."""
    stop: int


class SeveralFiles:
    """Rows of files in sequence: all of the first file, then all of the second ..."""

    def __init__(self, name: str, files: Sequence[RowFile]) -> None:
        self.name = name
        self._files = list(files)
        self._starts = np.cumsum([0, *map(len, files)])
        self.num_bytes = sum(file.num_bytes for file in files)
        self.num_blank_lines = sum(file.num_blank_lines for file in files)
        joined = "\n".join(str(file.fingerprint) for file in files)
        self.fingerprint: str | None = f"{self.num_bytes}-{zlib.crc32(joined.encode()):08x}"
        kinds = Counter(file.container for file in files)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        self.container = f"{len(files)} files ({listed})"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])

    def place(self, index: int) -> str:
        which, row = self._find(index)
        return self._files[which].where(row)

    def oversize(self, index: int) -> str | None:
        which, row = self._find(index)
        return self._files[which].oversize(row)

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[SourceRow]:
        """Read rows without parsing them."""
        found = (self._find(int(index)) for index in indices)
        return [self._files[which].rows([row])[0] for which, row in found]

    def check_rows(
        self,
        markup: MarkupMode = "convert",
        *,
        full_check_bytes: int = FULL_CHECK_BYTES,
        spread_rows: int = SPREAD_CHECK_ROWS,
        refuse: RowCheck = accept_row,
    ) -> ReadCounts:
        """Check rows as of one file: all rows if all files together are small, else evenly spread
        rows of each."""
        everything = self.num_bytes <= full_check_bytes
        counts = ReadCounts()
        for file in self._files:
            counts += file.check_rows(
                markup,
                full_check_bytes=full_check_bytes if everything else 0,
                spread_rows=max(20, spread_rows // len(self._files)),
                refuse=refuse,
            )
        return counts

    def close(self) -> None:
        """Free the files."""
        for file in self._files:
            file.close()


def open_data(data: str) -> DataSource:
    """Open all files that `data=` names, ignoring weights.

    Raises:
        DataError: a file that cannot be read.
        ConfigurationError: weights that cannot be used.
    """
    return open_parts(data)[0]


def open_parts(data: str) -> tuple[DataSource, list[OpenedPart]]:
    """Open all files that `data=` names, and return the rows of each place."""
    parts = parse_data(data)
    files = [[open_rows(path) for path in part.files] for part in parts]
    opened = _numbered(parts, files)
    flat = [file for group in files for file in group]
    return (flat[0] if len(flat) == 1 else SeveralFiles(data, flat)), opened


def _numbered(parts: list[DataPart], files: list[list[RowFile]]) -> list[OpenedPart]:
    opened: list[OpenedPart] = []
    start = 0
    for part, group in zip(parts, files, strict=True):
        stop = start + sum(map(len, group))
        opened.append(OpenedPart(part.path, part.weight, start, stop))
        start = stop
    return opened


@dataclass(frozen=True)
class Mix:
    """The rows of an epoch of a weighted mix; callable with the epoch's seed.

    A part gives the same number of rows in every epoch, drawn again for each epoch: it is permuted
    with a separate seed, and its first rows are used. If more rows are needed than it has, all its
    rows come before any row is repeated.
    """

    rows: tuple[np.ndarray, ...]
    """Row numbers of each part."""
    counts: tuple[int, ...]
    """Number of rows of each part per epoch."""
    seed: int

    @classmethod
    def by_weights(
        cls,
        rows: Sequence[np.ndarray],
        weights: Sequence[float],
        *,
        until: MixUntil,
        seed: int,
    ) -> Mix:
        """Compute every part's share of an epoch that ends as `until` says."""
        shares = np.asarray(weights, np.float64) / sum(weights)
        sizes = np.asarray([len(part) for part in rows], np.float64)
        end = (sizes / shares).min() if until == "first_exhausted" else (sizes / shares).max()
        counts = np.maximum(1, np.rint(shares * end)).astype(np.int64)
        return cls(tuple(rows), tuple(counts.tolist()), seed)

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, epoch_seed: int | None) -> np.ndarray:
        """Return uint32 [len]: the rows of an epoch in order; None gives the initial order."""
        # Seeds of an epoch are 0 or more, so the initial order has a different number.
        epoch = 0 if epoch_seed is None else epoch_seed + 1
        taken = []
        for number, (part, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            random = np.random.default_rng([self.seed, epoch, number])
            order = random.permutation(len(part))
            taken.append(part[np.resize(order, count)])
        joined = np.concatenate(taken).astype(np.uint32)
        return np.random.default_rng([self.seed, epoch, len(self.rows)]).permutation(joined)

    def describe(self, names: Sequence[str]) -> list[str]:
        """Return a line for every part: its number of rows per epoch, and in total."""
        return [
            f"{name}: {count:,} rows an epoch of its {len(part):,}"
            + (f", so each comes about {count / len(part):.1f} times" if count > len(part) else "")
            for name, part, count in zip(names, self.rows, self.counts, strict=True)
        ]


def mix_lines(parts: Sequence[OpenedPart]) -> list[str]:
    """Return the effect of the weights on an epoch that ends with the first part; empty without
    weights."""
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return []
    rows = [np.arange(part.start, part.stop) for part in parts]
    mix = Mix.by_weights(rows, weights, until="first_exhausted", seed=0)
    return mix.describe([part.path for part in parts])
