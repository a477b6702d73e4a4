"""Read and render all rows of a file of pairs or rated replies, and report what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tinker_cookbook.exceptions import DataError
from tinker_cookbook.preference.comparison_rows import parse_comparison
from tinker_cookbook.preference.rated_replies import LABELS, parse_rated_reply
from tinker_cookbook.preference.rendering import render_pair, render_reply
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.renderers import Renderer
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.row_file import DataSource

__all__ = ["PreferenceKind", "PreferenceReport", "check_preference_file", "preference_kind"]

PreferenceKind = Literal["pairs", "rated replies"]
ROWS_LOOKED_AT = 20
MAX_LINES_KEPT = 10
ROWS_PER_PART = 256


def preference_kind(file: DataSource) -> PreferenceKind | None:
    """Return which kind of preference data the first rows of a file are; None if they are none."""
    for index in range(min(ROWS_LOOKED_AT, len(file))):
        if file.oversize(index) is not None:
            continue
        [row] = file.rows([index])
        value = row.value
        if isinstance(value, bytes):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if not isinstance(value, dict):
            continue
        if any(value.get(key) is not None for key in ("chosen", "rejected", "comparison")):
            return "pairs"
        has_label = str(value.get("label")).lower() in LABELS
        if has_label and (value.get("completion") is not None or value.get("messages")):
            return "rated replies"
    return None


@dataclass
class PreferenceReport:
    """Figures of a whole file."""

    kind: PreferenceKind
    num_rows: int
    max_length: int | None
    problems: list[str] = field(default_factory=list)
    ties: list[int | str] = field(default_factory=list)
    """Places of the rows that are ties."""
    cut: list[int | str] = field(default_factory=list)
    """Places of the rows that `max_length` cuts."""
    num_duplicates: int = 0
    first_lengths: list[tuple[int, int]] = field(default_factory=list)
    """Tokens, and trained tokens, of each chosen completion or good reply, with its prompt."""
    second_lengths: list[tuple[int, int]] = field(default_factory=list)
    """The same of each rejected completion or bad reply."""

    @property
    def num_usable(self) -> int:
        """Rows that are trained on."""
        first, second = len(self.first_lengths), len(self.second_lengths)
        return first if self.kind == "pairs" else first + second

    def to_dict(self) -> JsonObject:
        """Return all figures as JSON values."""
        names = ("chosen", "rejected") if self.kind == "pairs" else ("good", "bad")
        lengths = zip(names, (self.first_lengths, self.second_lengths), strict=True)
        return {
            "kind": self.kind,
            "rows": self.num_rows,
            "usable_rows": self.num_usable,
            "unusable_rows": len(self.problems),
            "ties": {"rows": len(self.ties), "first_lines": self.ties[:MAX_LINES_KEPT]},
            "truncated": {
                "max_length": self.max_length,
                "rows": len(self.cut),
                "first_lines": self.cut[:MAX_LINES_KEPT],
            },
            "duplicates": self.num_duplicates,
            **{name: _count(found) for name, found in lengths},
            "longer_chosen": self._longer_share(),
            "problems": self.problems,
        }

    def _longer_share(self) -> float | None:
        """Return the share of pairs whose chosen completion is the longer one."""
        if self.kind != "pairs" or not self.first_lengths:
            return None
        pairs = zip(self.first_lengths, self.second_lengths, strict=True)
        return float(np.mean([chosen[1] > rejected[1] for chosen, rejected in pairs]))


def check_preference_file(
    file: DataSource,
    kind: PreferenceKind,
    renderer: Renderer,
    max_length: int | None,
    *,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> PreferenceReport:
    """Render every row of a file and collect figures and problems.

    Args:
        file: The rows.
        kind: What the rows are.
        renderer: Chat format.
        max_length: Tokens at which a completion is cut; None: never.
        on_progress: Called with the number of rows of every finished part.
    """
    report = PreferenceReport(kind, len(file), max_length)
    seen: set[str] = set()
    add = _add_pair if kind == "pairs" else _add_reply
    for start in range(0, len(file), ROWS_PER_PART):
        indices = range(start, min(start + ROWS_PER_PART, len(file)))
        for index in indices:
            problem = file.oversize(index)
            if problem is not None:
                report.problems.append(problem)
                continue
            [row] = file.rows([index])
            try:
                content = add(report, row, file.place(index), renderer)
            except DataError as error:
                report.problems.append(str(error))
                continue
            report.num_duplicates += content in seen
            seen.add(content)
        on_progress(len(indices))
    return report


def _add_pair(
    report: PreferenceReport, row: SourceRow, place: int | str, renderer: Renderer
) -> str:
    """Add a pair to the report; return its content, which is equal for equal rows."""
    comparison = parse_comparison(row)
    if comparison.label == "Tie":
        report.ties.append(place)
        return repr(comparison)
    pair = render_pair(comparison, renderer, report.max_length)
    if pair.is_cut:
        report.cut.append(place)
    for datum, lengths in (
        (pair.chosen, report.first_lengths),
        (pair.rejected, report.second_lengths),
    ):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        lengths.append((datum.model_input.length, int(np.count_nonzero(weights))))
    return _content(comparison)


def _add_reply(
    report: PreferenceReport, row: SourceRow, place: int | str, renderer: Renderer
) -> str:
    """Add a rated reply to the report; return its content."""
    reply = parse_rated_reply(row)
    rendered = render_reply(
        reply.prompt_conversation,
        reply.completion,
        renderer,
        report.max_length,
        where=row.where,
    )
    if rendered.is_cut:
        report.cut.append(place)
    lengths = report.first_lengths if reply.is_good else report.second_lengths
    weights = rendered.datum.loss_fn_inputs["weights"].to_numpy()
    lengths.append((rendered.datum.model_input.length, int(np.count_nonzero(weights))))
    return repr((reply.prompt_conversation, reply.completion, reply.is_good))


def _content(comparison: LabeledComparison) -> str:
    return repr((comparison.comparison, comparison.label))


def _count(lengths: Sequence[tuple[int, int]]) -> JsonObject:
    """Return numbers of tokens and of trained tokens: the sum, the median and the largest."""
    tokens, trained = (
        (np.array(column) for column in zip(*lengths, strict=True))
        if lengths
        else (
            np.zeros(0),
            np.zeros(0),
        )
    )
    return {
        "completions": len(lengths),
        **{
            name: {
                "total": int(values.sum()),
                "median": int(np.median(values)) if len(values) else 0,
                "max": int(values.max(initial=0)),
            }
            for name, values in (("tokens", tokens), ("trained_tokens", trained))
        },
    }
