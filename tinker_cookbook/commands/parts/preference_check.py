"""The report of `check` on files of pairs and of rated replies."""

from __future__ import annotations

from collections.abc import Iterator

from tinker_cookbook.preference.file_check import PreferenceReport
from tinker_cookbook.replies.json_source import JsonObject

__all__ = ["preference_lines"]


def preference_lines(report: PreferenceReport, figures: JsonObject) -> Iterator[str]:
    """Return the lines of the report, from what `PreferenceReport.to_dict` has returned."""
    is_pairs = report.kind == "pairs"
    unit = "pairs" if is_pairs else "replies"
    yield _row("shape", _shape(report))
    yield _row("usable", f"{report.num_usable:,} {unit}")
    if is_pairs:
        yield _row("ties", f"{len(report.ties):,} rows, left out{_lines(report.ties)}")
    yield _row("unusable", f"{len(report.problems):,} rows")
    for name in ("chosen", "rejected") if is_pairs else ("good", "bad"):
        yield _row(name, _completions(figures[name]))
    if report.max_length is None:
        yield _row("cut", "nothing (no --max-length)")
    else:
        limit = report.max_length
        yield _row("cut", f"{len(report.cut):,} {unit} at max_length={limit}{_lines(report.cut)}")
    yield _row("duplicates", f"{report.num_duplicates:,} rows repeat an earlier one")
    if figures["longer_chosen"] is not None:
        share = f"{figures['longer_chosen']:.0%}"
        yield _row("length", f"the chosen completion is the longer one in {share} of the pairs")


def _shape(report: PreferenceReport) -> str:
    if report.kind == "pairs":
        return "pairs of completions, for preference.train_dpo"
    return "replies with a label true or false, for preference.train_kto"


def _completions(figures: JsonObject) -> str:
    parts = [
        f"{what} {found['total']:,} (median {found['median']:,}, max {found['max']:,})"
        for what, found in (("tokens", figures["tokens"]), ("trained", figures["trained_tokens"]))
    ]
    return f"{figures['completions']:,}; {', '.join(parts)}"


def _lines(places: list[int | str]) -> str:
    """Return the first line numbers in brackets; an empty text if there are none."""
    if not places:
        return ""
    shown = ", ".join(map(str, places[:10]))
    return f" (line{'s' * (len(places) != 1)} {shown}{', ...' if len(places) > 10 else ''})"


def _row(name: str, text: str) -> str:
    return f"{name:<12}{text}"
