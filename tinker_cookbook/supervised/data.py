"""Supervised datasets: from a conversations file, from Hugging Face datasets, or a mix of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import chz
import numpy as np

from tinker_cookbook.exceptions import (
    ConfigurationError,
    DataError,
    DataFormatError,
    DataValidationError,
)
from tinker_cookbook.hub_datasets import load_hub_table
from tinker_cookbook.renderers import TrainOnWhat
from tinker_cookbook.supervised.conversation_renderer import (
    ConversationRenderer,
    RenderedRow,
    conversation_to_datum,
    conversation_to_datums,
    refuse_without_reply,
)
from tinker_cookbook.supervised.conversations import MarkupMode, SourceRow, parse_row
from tinker_cookbook.supervised.lazy_dataset import (
    LazyDataset,
    RowSource,
    last_batch_lines,
    shuffled,
)
from tinker_cookbook.supervised.shapes import shape_of
from tinker_cookbook.supervised.shapes.sharegpt import LIST_KEYS as SHAREGPT_KEYS
from tinker_cookbook.supervised.sources.row_file import ReadCounts
from tinker_cookbook.supervised.sources.several import Mix, MixUntil, OpenedPart, open_parts
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

if TYPE_CHECKING:
    import datasets
    import tinker

__all__ = [
    "FromConversationFileBuilder",
    "HFDatasetSource",
    "InterleavedChatDatasetBuilder",
    "StreamingSupervisedDatasetFromHFDataset",
    "SupervisedDatasetFromHFDataset",
    "conversation_to_datum",
    "conversation_to_datums",
]

GLANCE_ROWS = 200
"""Number of rows of a dataset that are read before a run, to report their shape."""

MapFn = Callable[[dict], "tinker.Datum"]
FlatMapFn = Callable[[dict], "list[tinker.Datum]"]


@dataclass(frozen=True)
class _MappedRow:
    """Applies a user's function to a row; errors name the row."""

    map_fn: MapFn | None
    flatmap_fn: FlatMapFn | None

    def __post_init__(self) -> None:
        if (self.map_fn is None) == (self.flatmap_fn is None):
            raise ConfigurationError(
                "map_fn and flatmap_fn are both given or both missing; give exactly one of them."
            )

    def __call__(self, rows: Sequence[SourceRow]) -> list[RenderedRow]:
        return [RenderedRow(self._datums(row), num_kept_trained_tokens=1) for row in rows]

    def _datums(self, row: SourceRow) -> list[tinker.Datum]:
        assert isinstance(row.value, dict)
        try:
            if self.map_fn is not None:
                return [self.map_fn(row.value)]
            assert self.flatmap_fn is not None
            return list(self.flatmap_fn(row.value))
        except Exception as error:
            error.add_note(f"raised for {row.where}")
            raise


@dataclass(frozen=True)
class _HFRows:
    """Rows of a map-style Hugging Face dataset, read from its Arrow files on demand."""

    dataset: datasets.Dataset
    name: str = "dataset"
    fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: np.ndarray) -> list[SourceRow]:
        values = self.dataset.__getitems__([int(i) for i in indices])
        return [
            SourceRow(f"{self.name} row {index}", value)
            for index, value in zip(indices, values, strict=True)
        ]


class SupervisedDatasetFromHFDataset(LazyDataset):
    """Batches of a Hugging Face dataset; `len` is rows // batch_size.

    Args:
        map_fn: returns the datum of a row.
        flatmap_fn: returns any number of datums of a row; give exactly one of the two.
        num_workers: number of background processes; they need a picklable function. 0 maps in this
            process.
    """

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        batch_size: int,
        map_fn: MapFn | None = None,
        flatmap_fn: FlatMapFn | None = None,
        *,
        num_workers: int = 0,
    ) -> None:
        self.hf_dataset = hf_dataset
        super().__init__(
            _HFRows(hf_dataset),
            _MappedRow(map_fn, flatmap_fn),
            batch_size=batch_size,
            num_workers=num_workers,
        )


class StreamingSupervisedDatasetFromHFDataset(SupervisedDataset):
    """Batches of a Hugging Face IterableDataset, forward only.

    After a resume, it reads and skips the earlier rows; going back needs `set_epoch`.

    Args:
        length: number of rows in an epoch, which an IterableDataset does not know.
        buffer_size: number of rows from which the next one is drawn; rows further apart are not
            mixed.
    """

    def __init__(
        self,
        hf_dataset: datasets.IterableDataset,
        batch_size: int,
        length: int,
        map_fn: MapFn | None = None,
        flatmap_fn: FlatMapFn | None = None,
        buffer_size: int = 10000,
    ) -> None:
        if batch_size < 1:
            raise DataValidationError(f"batch_size={batch_size} is too small; use 1 or more.")
        self.hf_dataset = hf_dataset
        self.batch_size = batch_size
        self.length = length
        self.buffer_size = buffer_size
        self._map = _MappedRow(map_fn, flatmap_fn)
        self.set_epoch(0)

    def set_epoch(self, seed: int = 0) -> None:
        """Restart, shuffled with `seed`."""
        shuffled_dataset = self.hf_dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        self._rows: Iterator[Any] = iter(shuffled_dataset)
        self._next_index = 0

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the next batch, or a later one.

        Raises:
            DataValidationError: a batch that has passed already, or one beyond the stream's end.
        """
        if index < self._next_index:
            raise DataValidationError(
                f"index={index} has passed; the stream is at batch {self._next_index} and cannot "
                "go back. Call set_epoch to start over."
            )
        num_skipped = (index - self._next_index) * self.batch_size
        values = list(islice(self._rows, num_skipped, num_skipped + self.batch_size))
        self._next_index = index + 1
        if len(values) < self.batch_size:
            raise DataValidationError(
                f"index={index} is beyond the end of the stream; length={self.length} means "
                f"{len(self)} batches of {self.batch_size} rows. Give the true number of rows."
            )
        first = index * self.batch_size
        rows = [SourceRow(f"row {first + i} of the stream", row) for i, row in enumerate(values)]
        return [datum for mapped in self._map(rows) for datum in mapped.datums]

    @property
    def summary(self) -> list[str]:
        return last_batch_lines(self.length, self.batch_size, drop_last=True)

    def __len__(self) -> int:
        return self.length // self.batch_size


def _conversation_renderer(builder: ChatDatasetBuilder, markup: MarkupMode) -> ConversationRenderer:
    config = builder.common_config
    return ConversationRenderer(
        builder.renderer,
        config.max_length,
        train_on_what=TrainOnWhat(config.train_on_what or TrainOnWhat.ALL_ASSISTANT_MESSAGES),
        markup=markup,
    )


def _split(
    builder: FromConversationFileBuilder | InterleavedChatDatasetBuilder,
    source: RowSource,
    *,
    name: str,
    test_rows: np.ndarray,
    train_rows: np.ndarray | Mix,
    summary: Sequence[str] = (),
) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """The train dataset and, if it has rows, the held-out one, which is a single batch."""
    batch_size = builder.common_config.batch_size
    if len(train_rows) < batch_size:
        held_out = f" after {len(test_rows)} were held out" if len(test_rows) else ""
        raise ConfigurationError(
            f"batch_size={batch_size} is more than the {len(train_rows)} training rows of {name}"
            f"{held_out}; use at most {len(train_rows)}."
        )
    render = _conversation_renderer(builder, builder.markup)
    train = LazyDataset(
        source,
        render,
        batch_size=batch_size,
        order=train_rows,
        num_workers=builder.num_workers,
        drop_last=builder.drop_last,
        summary=summary,
    )
    if not len(test_rows):
        return train, None
    test = LazyDataset(source, render, batch_size=len(test_rows), order=test_rows, num_workers=0)
    return train, test


_MARKUP_DOC = (
    "What to do with <think> and <tool_call> in the text of replies: convert them to reasoning and "
    "calls, refuse the row, or keep them as text."
)
_HUB_ADVICE = "A local folder with these rows will do (path=FOLDER), or data=FILE of a recipe."
_DROP_LAST_DOC = (
    "Leave out the rows that do not fill the last batch of an epoch; else they make a smaller one."
)


@chz.chz
class FromConversationFileBuilder(ChatDatasetBuilder):
    """Rows from a data file, a folder, a glob, or several with weights (see docs/data.md).

    Rows are shuffled by `shuffle_seed`; the first `test_size` are held out, the rest is trained.
    Of a weighted mix, every part is split so, in proportion to the weights.
    """

    file_path: str = chz.field(
        doc="File, folder, glob, or several: a.jsonl,b.parquet, with weights a.jsonl:0.7,b.csv:0.3."
    )
    test_size: int = chz.field(default=0, doc="Conversations held out for evaluation.")
    shuffle_seed: int = chz.field(default=0, doc="Decides which rows are held out, and the order.")
    markup: MarkupMode = chz.field(default="convert", doc=_MARKUP_DOC)
    mix_until: MixUntil = chz.field(
        default="first_exhausted",
        doc="With weights: an epoch ends when the first file is through, or when all are, which "
        "repeats the rows of the others.",
    )
    drop_last: bool = chz.field(default=False, doc=_DROP_LAST_DOC)
    num_workers: int | None = chz.field(
        default=None,
        doc="Processes that render ahead of the loop; 0 renders in the loop, None decides by size.",
    )

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        source, parts = open_parts(self.file_path)
        mode = self.common_config.train_on_what or TrainOnWhat.ALL_ASSISTANT_MESSAGES
        counts = source.check_rows(
            self.markup, refuse=lambda where, row: refuse_without_reply(where, row, mode)
        )
        test_size = _checked_test_size(self.test_size, len(source), self.file_path)
        summary = counts.lines(
            f"{source.name}: {len(source):,} rows, {source.container}", len(source)
        )
        if parts[0].weight is None:
            order = shuffled(len(source), self.shuffle_seed)
            test_rows, train_rows = order[:test_size], order[test_size:]
        else:
            test_rows, train_rows = self._mixed(parts, test_size)
            summary += train_rows.describe([part.path for part in parts])
        return _split(
            self,
            source,
            name=self.file_path,
            test_rows=test_rows,
            train_rows=train_rows,
            summary=summary,
        )

    def _mixed(self, parts: list[OpenedPart], test_size: int) -> tuple[np.ndarray, Mix]:
        weights = [part.weight or 0.0 for part in parts]
        sizes = [part.stop - part.start for part in parts]
        shares = [weight / sum(weights) for weight in weights]
        held_out = _apportioned(test_size, shares, sizes)
        orders = [
            shuffled(size, self.shuffle_seed) + np.uint32(part.start)
            for size, part in zip(sizes, parts, strict=True)
        ]
        both = list(zip(orders, held_out, strict=True))
        mix = Mix.by_weights(
            [order[count:] for order, count in both],
            weights,
            until=self.mix_until,
            seed=self.shuffle_seed,
        )
        return np.concatenate([order[:count] for order, count in both]), mix


def _checked_test_size(test_size: int, num_rows: int, name: str) -> int:
    if not 0 <= test_size < num_rows:
        raise ConfigurationError(
            f"test_size={test_size} does not fit the {num_rows} rows of {name}; use 0 to "
            f"{num_rows - 1}."
        )
    return test_size


@chz.chz
class HFDatasetSource:
    """One Hugging Face dataset of a mix."""

    path: str = chz.field(doc="Dataset id on the hub, or a local folder.")
    name: str | None = chz.field(default=None, doc="Configuration of the dataset.")
    split: str = chz.field(default="train", doc="Split to read.")
    weight: float | None = chz.field(
        default=None, doc="Share of the mix; None for all sources takes rows in turn."
    )
    message_field: str = chz.field(
        default="messages",
        doc="Column that holds the messages; columns of another shape are found without it.",
    )


@dataclass(frozen=True)
class _MixedRows:
    """Rows of several datasets under one numbering: all of the first, then all of the second..."""

    tables: list[datasets.Dataset]
    sources: list[HFDatasetSource]
    fingerprint: str | None = None

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tables)])

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def rows(self, indices: np.ndarray) -> list[SourceRow]:
        starts = self.starts
        return [
            self._row(int(which), int(index - starts[which]))
            for index, which in zip(
                indices, np.searchsorted(starts, indices, side="right") - 1, strict=True
            )
        ]

    def _row(self, which: int, index: int) -> SourceRow:
        source = self.sources[which]
        value = dict(self.tables[which][index])
        field = source.message_field
        if field in value and field not in SHAREGPT_KEYS:
            value["messages"] = value.pop(field)
        return SourceRow(f"{source.path}[{source.split}] row {index}", value)


@chz.chz
class InterleavedChatDatasetBuilder(ChatDatasetBuilder):
    """A mix of Hugging Face datasets of conversations.

    Rows are held out of every source before the mix is made, in proportion to the weights (to the
    sizes, if there are none), so no held-out row is trained even where the mix repeats rows.
    """

    sources: list[HFDatasetSource]
    test_size: int = chz.field(default=0, doc="Conversations held out for evaluation, in total.")
    shuffle_seed: int = chz.field(
        default=0, doc="Decides the held-out rows, the mix and its order."
    )
    stopping_strategy: Literal[
        "first_exhausted", "all_exhausted", "all_exhausted_without_replacement"
    ] = chz.field(
        default="all_exhausted",
        doc="When the mix ends: with the shortest source, after repeating short ones until the "
        "longest ends, or when every row was taken once.",
    )
    markup: MarkupMode = chz.field(default="convert", doc=_MARKUP_DOC)
    drop_last: bool = chz.field(default=False, doc=_DROP_LAST_DOC)
    num_workers: int | None = chz.field(
        default=None,
        doc="Processes that render ahead of the loop; 0 renders in the loop, None decides by size.",
    )

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        if not self.sources:
            raise ConfigurationError("sources is empty; give at least one dataset.")
        probabilities = self._probabilities()
        rows = _MixedRows([_load_table(source) for source in self.sources], self.sources)
        sizes = [len(table) for table in rows.tables]
        name = " + ".join(source.path for source in self.sources)
        test_size = _checked_test_size(self.test_size, len(rows), name)
        shares = probabilities or [size / len(rows) for size in sizes]
        held_out = _apportioned(test_size, shares, sizes)
        orders = [
            shuffled(size, self.shuffle_seed) + np.int64(start)
            for size, start in zip(sizes, rows.starts, strict=False)
        ]
        parts = list(zip(orders, held_out, strict=True))
        return _split(
            self,
            rows,
            summary=_glance(rows, name, self.markup),
            name=name,
            test_rows=np.concatenate([order[:count] for order, count in parts]),
            train_rows=self._interleaved([order[count:] for order, count in parts], probabilities),
        )

    def _probabilities(self) -> list[float] | None:
        weights = [source.weight for source in self.sources]
        given = [weight for weight in weights if weight is not None]
        if not given:
            return None
        if len(given) < len(weights) or min(given) <= 0:
            raise ConfigurationError(
                f"weight={weights} of the sources cannot be used; give a positive weight to every "
                "source, or to none."
            )
        return [weight / sum(given) for weight in given]

    def _interleaved(
        self, orders: list[np.ndarray], probabilities: list[float] | None
    ) -> np.ndarray:
        # Only row numbers are interleaved: sources may have different columns.
        import datasets

        mixed = datasets.interleave_datasets(
            [datasets.Dataset.from_dict({"row": order}) for order in orders],
            probabilities=probabilities,
            seed=self.shuffle_seed,
            stopping_strategy=self.stopping_strategy,
        )
        return np.asarray(mixed.with_format("numpy")["row"][:], dtype=np.uint32)


def _glance(rows: _MixedRows, name: str, markup: MarkupMode) -> list[str]:
    """What a run says about rows of datasets, from some of them; batches meet the bad ones."""
    counts = ReadCounts()
    picked = np.linspace(0, len(rows) - 1, min(len(rows), GLANCE_ROWS)).astype(np.int64)
    for row in rows.rows(picked):
        with contextlib.suppress(DataError):
            counts.add(parse_row(row, markup))
    return counts.lines(f"{name}: {len(rows):,} rows", len(rows))


def _load_table(source: HFDatasetSource) -> datasets.Dataset:
    table = load_hub_table(source.path, source.name, source.split, advice=_HUB_ADVICE)
    field, columns = source.message_field, table.column_names
    another_shape = field == "messages" and shape_of(dict.fromkeys(columns, "")) is not None
    if field not in columns and not another_shape:
        raise DataFormatError(
            f"message_field={field!r} is not a column of {source.path}; use one of "
            f"{', '.join(columns)}."
        )
    return table


def _apportioned(total: int, shares: list[float], limits: list[int]) -> list[int]:
    """Split `total` by shares into whole numbers below their limits (largest remainder)."""
    ideal = np.asarray(shares) * total
    counts = np.minimum(ideal.astype(np.int64), np.asarray(limits) - 1).clip(min=0)
    by_remainder = np.argsort(counts - ideal, kind="stable")
    while counts.sum() < total:
        free = [i for i in by_remainder if counts[i] < limits[i] - 1]
        if not free:
            raise ConfigurationError(
                f"test_size={total} would leave a source without training rows; use at most "
                f"{int(counts.sum())}."
            )
        for i in free[: total - int(counts.sum())]:
            counts[i] += 1
    return counts.tolist()
