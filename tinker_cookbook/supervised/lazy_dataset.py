"""A dataset that renders its rows batch by batch, ahead of the loop where that pays off."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.supervised.background import BackgroundRenderer, Task, available_cpus
from tinker_cookbook.supervised.conversation_renderer import RenderedRow
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.several import Mix
from tinker_cookbook.supervised.types import SupervisedDataset

if TYPE_CHECKING:
    import tinker

__all__ = [
    "MIN_ROWS_FOR_WORKERS",
    "LazyDataset",
    "RowSource",
    "default_num_workers",
    "last_batch_lines",
    "shuffled",
]

logger = logging.getLogger(__name__)

MIN_ROWS_FOR_WORKERS = 5000
"""With fewer rows, starting a process costs more than it saves."""
MAX_ROWS_AHEAD = 1024
"""Bounds the memory of rendered rows that wait for the loop."""


class RowSource(Protocol):
    """Rows by index."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> list[SourceRow]: ...

    @property
    def fingerprint(self) -> str | None: ...


def default_num_workers(num_rows: int) -> int:
    """No process for a small dataset; else one per CPU but the first, at most 4."""
    if num_rows < MIN_ROWS_FOR_WORKERS:
        return 0
    return max(1, min(4, available_cpus() - 1))


def shuffled(num_rows: int, seed: int) -> np.ndarray:
    """uint32 [num_rows]: the order in which Hugging Face `Dataset.shuffle(seed)` puts the rows."""
    return np.random.default_rng(seed).permutation(num_rows).astype(np.uint32)


def last_batch_lines(num_rows: int, batch_size: int, drop_last: bool) -> list[str]:
    """A line on the rows of an epoch that do not fill its last batch; none if there are none.

    They differ between epochs, because every epoch has a different order.
    """
    rest = num_rows % batch_size
    if not rest:
        return []
    if drop_last:
        return [f"{rest} of {num_rows:,} rows left out in an epoch: no full batch of {batch_size}"]
    return [f"last batch of an epoch: {rest} of {batch_size} rows"]


class LazyDataset(SupervisedDataset):
    """Batches of a row source; a batch depends on (seed of the epoch, index) and nothing else.

    Rows are read and rendered when their batch is asked for, or a few batches before by background
    processes. Memory per row: 4 bytes for the order given and 4 for the epoch's; and the batches
    ahead.
    A conversation that needs several datums puts all of them into its batch, so a batch may hold
    more datums than `batch_size`.

    Args:
        order: indices of the rows of this dataset, in the order before `set_epoch`; None is all. Or
            a mix, which gives the rows of each epoch by its seed.
        drop_last: leave out the rows of an epoch that do not fill its last batch, instead of making
            a smaller batch of them.
        summary: lines for `summary`, before those about the last batch.
        num_workers: number of background processes; None decides by the number of rows.
    """

    def __init__(
        self,
        source: RowSource,
        render: Callable[[Sequence[SourceRow]], list[RenderedRow]],
        *,
        batch_size: int,
        order: np.ndarray | Mix | None = None,
        num_workers: int | None = None,
        drop_last: bool = True,
        summary: Sequence[str] = (),
    ) -> None:
        if batch_size < 1:
            raise DataValidationError(f"batch_size={batch_size} is too small; use 1 or more.")
        self._source = source
        self._render = render
        self._batch_size = batch_size
        self._mix = order if isinstance(order, Mix) else None
        self._order = order(None) if isinstance(order, Mix) else order
        self._epoch_order: np.ndarray | None = None
        self._drop_last = drop_last
        self._summary = list(summary)
        self._num_workers = (
            default_num_workers(self.num_rows) if num_workers is None else num_workers
        )
        self._background: BackgroundRenderer | None = None
        self._tasks: dict[int, Task] = {}
        self.counts: Counter[str] = Counter()
        """rows, truncated_rows, rows_without_trained_tokens, datums: of the batches handed out."""

    @property
    def num_rows(self) -> int:
        return len(self._source) if self._order is None else len(self._order)

    @property
    def fingerprint(self) -> str | None:
        return self._source.fingerprint

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the background processes; empty before the first batch."""
        return [] if self._background is None else self._background.worker_pids

    @property
    def summary(self) -> list[str]:
        return [*self._summary, *last_batch_lines(self.num_rows, self._batch_size, self._drop_last)]

    def __len__(self) -> int:
        whole, rest = divmod(self.num_rows, self._batch_size)
        return whole + int(rest > 0 and not self._drop_last)

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle the original order; the same seed always gives the same order."""
        self._cancel()
        if self._mix is not None:
            self._order = self._mix(seed)
        else:
            self._epoch_order = shuffled(self.num_rows, seed)

    def row_indices(self, index: int) -> np.ndarray:
        """Return the source's row indices of batch `index` of this epoch.

        Raises:
            DataValidationError: the epoch does not have this batch.
        """
        if not 0 <= index < len(self):
            raise DataValidationError(
                f"index={index} is not a batch of this epoch; it has {len(self)} batches of "
                f"{self._batch_size} rows."
            )
        start = index * self._batch_size
        rows = np.arange(start, min(start + self._batch_size, self.num_rows))
        if self._epoch_order is not None:
            rows = self._epoch_order[rows]
        return rows if self._order is None else self._order[rows]

    def get_batch(self, index: int) -> list[tinker.Datum]:
        task = self._tasks.pop(index, None) or self._submit(index)
        self._render_ahead(index)
        try:
            rows = self._renderer().results(task)
        except BaseException:
            self._cancel()
            raise
        self._count(rows, index)
        return [datum for row in rows for datum in row.datums]

    def _renderer(self) -> BackgroundRenderer:
        if self._background is None:
            self._background = BackgroundRenderer(
                self._render,
                num_workers=self._num_workers,
                probe=self._source.rows(self.row_indices(0)[:1])[0],
            )
        return self._background

    def _submit(self, index: int) -> Task:
        rows = self._source.rows(self.row_indices(index))
        return self._renderer().submit(rows)

    def _render_ahead(self, index: int) -> None:
        num_ahead = 2 * self._renderer().num_workers
        num_ahead = min(num_ahead, max(1, MAX_ROWS_AHEAD // self._batch_size))
        if self._num_workers == 0:
            return
        wanted = range(index + 1, min(index + 1 + num_ahead, len(self)))
        for passed in [i for i in self._tasks if i not in wanted]:
            self._tasks.pop(passed).cancel()
        for ahead in wanted:
            if ahead not in self._tasks:
                self._tasks[ahead] = self._submit(ahead)

    def _cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    def _count(self, rows: Sequence[RenderedRow], index: int) -> None:
        before = self.counts.copy()
        self.counts.update(
            rows=len(rows),
            datums=sum(len(row.datums) for row in rows),
            truncated_rows=sum(row.is_truncated for row in rows),
            rows_without_trained_tokens=sum(row.num_kept_trained_tokens == 0 for row in rows),
        )
        for name, meaning in (
            ("truncated_rows", "longer than max_length and cut on the right"),
            (
                "rows_without_trained_tokens",
                "cut before their first trained token: they train nothing",
            ),
        ):
            if self.counts[name] and not before[name]:
                logger.warning(
                    "%d of the %d rows of batch %d are %s; `tinker-cookbook check` counts them all",
                    self.counts[name],
                    len(rows),
                    index,
                    meaning,
                )

    def close(self) -> None:
        """Stop the background processes."""
        self._cancel()
        if self._background is not None:
            self._background.close()
