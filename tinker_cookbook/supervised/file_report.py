"""Read and render all rows of data files, and report the problems that training would have."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.background import BackgroundRenderer, Task
from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer, RenderedRow
from tinker_cookbook.supervised.conversations import (
    Conversation,
    ConversationError,
    SourceRow,
    parse_row,
)
from tinker_cookbook.supervised.lazy_dataset import default_num_workers
from tinker_cookbook.supervised.sources.row_file import DataSource, ReadCounts

__all__ = ["FileReport", "RowReport", "check_file"]

ROWS_PER_TASK = 512
MAX_PROBLEMS_KEPT = 1000
MAX_PAIRS_KEPT = 100
MAX_LINES_KEPT = 10
PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True)
class RowReport:
    """Result of checking one row."""

    problem: str | None = None
    """Reason why the row is unusable, with its place; None if it is usable."""
    kind: str | None = None
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Tokens and trained tokens before truncation, then after."""
    num_datums: int = 0
    digest: int = 0
    """64-bit digest of the messages."""
    shape: str | None = None
    """None if the row could not be read."""
    notes: Counter[str] = field(default_factory=Counter)
    """Conversions made while reading the row, with their number."""
    unused: tuple[str, ...] = ()
    """Keys of the row that its shape does not use."""


@dataclass(frozen=True)
class _RowCheck:
    """Turns rows into reports; picklable. It never raises for a bad row."""

    render: ConversationRenderer

    def __call__(self, rows: Sequence[SourceRow]) -> list[RowReport]:
        reports: list[RowReport | None] = [None] * len(rows)
        parsed: list[tuple[int, Conversation]] = []
        for i, row in enumerate(rows):
            try:
                parsed.append((i, parse_row(row, self.render.markup)))
            except ConversationError as error:
                reports[i] = RowReport(problem=str(error), kind=error.kind)
        results = self.render.render([(rows[i].where, conversation) for i, conversation in parsed])
        for (i, conversation), result in zip(parsed, results, strict=True):
            reports[i] = _row_report(conversation, result)
        return reports  # pyright: ignore[reportReturnType]


def _row_report(conversation: Conversation, result: RenderedRow | ConversationError) -> RowReport:
    read: JsonObject = {
        "shape": conversation.shape,
        "notes": conversation.notes,
        "unused": conversation.unused,
    }
    if isinstance(result, ConversationError):
        return RowReport(problem=str(result), kind=result.kind, **read)
    return RowReport(
        counts=(
            result.num_tokens,
            result.num_trained_tokens,
            result.num_kept_tokens,
            result.num_kept_trained_tokens,
        ),
        num_datums=len(result.datums),
        digest=_digest(conversation),
        **read,
    )


def _digest(conversation: Conversation) -> int:
    content: list[Any] = [conversation.messages, conversation.tools, conversation.text]
    text = json.dumps(content, sort_keys=True, default=lambda value: value.model_dump())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class FileReport:
    """Figures of a whole file: 24 bytes per row, whatever the length of the rows."""

    def __init__(self, file: DataSource, max_length: int | None) -> None:
        self._file = file
        self.max_length = max_length
        self.num_rows = len(file)
        self.problems: list[str] = []
        """The first `MAX_PROBLEMS_KEPT` problems, in the order of the lines."""
        self.problem_kinds: Counter[str] = Counter()
        self.num_datums = 0
        self.read = ReadCounts()
        self._note_rows: dict[str, list[int]] = {}
        """By conversion, the first `MAX_LINES_KEPT` rows."""
        self._counts = np.zeros((self.num_rows, 4), np.uint32)
        self._digests = np.zeros(self.num_rows, np.uint64)
        self._usable = np.zeros(self.num_rows, bool)

    def add(self, index: int, row: RowReport) -> None:
        """Record row `index`; call this in the order of the rows."""
        if row.shape is not None:
            self.read.add(row)
            for note in row.notes:
                rows = self._note_rows.setdefault(note, [])
                if len(rows) < MAX_LINES_KEPT:
                    rows.append(index)
        if row.problem is not None:
            self.problem_kinds[row.kind or "unusable"] += 1
            if len(self.problems) < MAX_PROBLEMS_KEPT:
                self.problems.append(row.problem)
            return
        self._usable[index] = True
        self._counts[index] = row.counts
        self._digests[index] = row.digest
        self.num_datums += row.num_datums

    @property
    def first_usable(self) -> int | None:
        """Index of the first row that can be trained."""
        return int(np.argmax(self._usable)) if self._usable.any() else None

    @property
    def num_unusable(self) -> int:
        return sum(self.problem_kinds.values())

    def to_dict(self) -> JsonObject:
        """Return all figures as JSON values."""
        counts = self._counts[self._usable].astype(np.int64)
        tokens, trained, kept, kept_trained = counts.T
        lost = np.flatnonzero(self._usable & (self._counts[:, 3] == 0))
        cut = np.flatnonzero(self._usable & (self._counts[:, 2] < self._counts[:, 0]))
        return {
            "file": self._file.name,
            "container": self._file.container,
            "shapes": dict(self.read.shapes.most_common()),
            "converted": {
                note: {
                    "rows": rows,
                    "times": self.read.notes[note],
                    "first_lines": self._lines(self._note_rows[note]),
                }
                for note, rows in self.read.note_rows.most_common()
            },
            "unused_keys": dict(self.read.unused.most_common()),
            "rows": self.num_rows,
            "blank_lines": self._file.num_blank_lines,
            "usable_rows": len(counts),
            "unusable_rows": self.num_unusable,
            "unusable_by_reason": dict(self.problem_kinds.most_common()),
            "datums": self.num_datums,
            "tokens": {"total": int(tokens.sum()), **_percentiles(tokens)},
            "trained_tokens": {"total": int(trained.sum()), **_percentiles(trained)},
            "truncated": {
                "max_length": self.max_length,
                "rows": len(cut),
                "first_lines": self._lines(cut[:MAX_LINES_KEPT]),
                "tokens_cut": int((tokens - kept).sum()),
                "trained_tokens_cut": int((trained - kept_trained).sum()),
                "rows_without_trained_tokens": len(lost),
                "first_lines_without_trained_tokens": self._lines(lost[:MAX_LINES_KEPT]),
            },
            "duplicates": self._duplicates(),
            "problems": self.problems,
        }

    def _lines(self, indices: Sequence[int] | np.ndarray) -> list[int | str]:
        return [self._file.place(int(index)) for index in indices]

    def _duplicates(self) -> JsonObject:
        """Return the number of rows whose messages equal those of an earlier row, by a 64-bit
        digest."""
        usable = np.flatnonzero(self._usable)
        _, first, inverse = np.unique(self._digests[usable], return_index=True, return_inverse=True)
        originals = first[inverse]
        repeats = np.flatnonzero(originals != np.arange(len(usable)))
        pairs = [
            self._lines(usable[[repeat, originals[repeat]]]) for repeat in repeats[:MAX_PAIRS_KEPT]
        ]
        return {"rows": len(repeats), "first_lines": pairs}


def _percentiles(values: np.ndarray) -> dict[str, int]:
    names = ["min", *(f"p{p}" for p in PERCENTILES[1:-1]), "max"]
    if not len(values):
        return dict.fromkeys(names, 0)
    figures = np.percentile(values, PERCENTILES, method="nearest")
    return {name: int(figure) for name, figure in zip(names, figures, strict=True)}


def check_file(
    file: DataSource,
    render: ConversationRenderer,
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> FileReport:
    """Render every row of a file and collect figures and problems.

    Args:
        num_workers: number of background processes; None decides by the number of rows.
        on_progress: called with the number of rows of every finished part.
    """
    report = FileReport(file, render.max_length)
    check = _RowCheck(render)
    workers = default_num_workers(len(file)) if num_workers is None else num_workers
    probe = SourceRow("the probe", b'{"messages": [{"role": "user", "content": "a"}]}')
    background = BackgroundRenderer(check, num_workers=workers, probe=probe)
    waiting: deque[tuple[range, Task]] = deque()
    try:
        for start in range(0, len(file), ROWS_PER_TASK):
            indices = range(start, min(start + ROWS_PER_TASK, len(file)))
            waiting.append((indices, background.submit(file.rows(_readable(file, indices)))))
            if len(waiting) > 2 * workers:
                on_progress(_collect(report, file, background, *waiting.popleft()))
        while waiting:
            on_progress(_collect(report, file, background, *waiting.popleft()))
    finally:
        background.close()
    return report


def _readable(file: DataSource, indices: range) -> list[int]:
    return [index for index in indices if file.oversize(index) is None]


def _collect(
    report: FileReport,
    file: DataSource,
    background: BackgroundRenderer,
    indices: range,
    task: Task,
) -> int:
    results = iter(background.results(task))
    for index in indices:
        problem = file.oversize(index)
        if problem is None:
            report.add(index, next(results))
        else:
            report.add(index, RowReport(problem=problem, kind="too long"))
    return len(indices)
