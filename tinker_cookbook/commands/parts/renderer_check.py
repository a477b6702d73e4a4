"""`tinker-cookbook render --verify`: check every renderer against a model's chat template."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers.battery.verify import Report

__all__ = ["run_verify"]

_COLUMNS = ("renderer", "tokens", "text", "differ", "refused", "trained", "parsed", "injection")
_CHECKS = ("trained = sampled", "parses back", "injection")


def run_verify(args: argparse.Namespace) -> int:
    """Print the results of every renderer; return 0 if one fits, else 1."""
    from tinker_cookbook.renderers import get_renderer
    from tinker_cookbook.renderers.battery.verify import verify
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    if args.file is not None or args.against_template or args.html:
        raise ConfigurationError(
            f"--verify={args.verify} is given together with FILE, --against-template or --html; "
            "the only option that it can be combined with is --renderer. Leave out the others."
        )
    tokenizer = get_tokenizer(args.verify)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"--verify={args.verify} has no chat template to compare with; for a base model use "
            "--renderer role_colon."
        )
    names = None if args.renderer is None else [args.renderer]
    if args.renderer is not None:
        get_renderer(args.renderer, tokenizer)  # refuses an unknown name or a wrong tokenizer
    print(f"{args.verify}: renderers against the model's own chat template", flush=True)
    reports = []
    for report in verify(tokenizer, names):
        reports.append(report)
        _show_progress(f"{len(reports)} renderers checked, last {report.renderer_name}")
    _show_progress("")
    status = _print_verdict(reports)
    _print_table([report for report in reports if "cannot be made" not in report.problems])
    _print_problems(reports)
    return status


def _show_progress(text: str) -> None:
    """Replace the progress line on a terminal; results are printed at the end, verdict first."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _print_table(reports: Sequence[Report]) -> None:
    """Print a table with one row per renderer."""
    rows = [_COLUMNS, *(tuple(_cells(report)) for report in reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for name, *cells in rows:
        numbers = "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths[1:], strict=True))
        print(f"{name:<{widths[0]}}{numbers}")


def _cells(report: Report) -> list[str]:
    counts = report.counts
    first = [counts[key] for key in ("same tokens", "same text", "differs", "refused")]
    held = []
    for check in _CHECKS:
        good, bad = counts[f"{check}: good"], counts[f"{check}: bad"]
        held.append(f"{good}/{good + bad}" if good + bad else "-")
    return [report.renderer_name, *map(str, first), *held]


def _print_problems(reports: Sequence[Report]) -> None:
    """Print the first problem of each renderer that nearly fits."""
    print()
    best = max((report.share for report in reports), default=0)
    for report in reports:
        if report.template_options and (report.fits or report.is_near):
            print(
                f"{report.renderer_name}: compared with the template under "
                f"{report.template_options}"
            )
        if report.share < min(0.5, best) and not report.is_near:
            continue
        for kind, problem in report.problems.items():
            if kind != "cannot be made" or report.renderer_name == "hf_template":
                print(f"{report.renderer_name}: {kind}: {problem}")
        refusals = [key for key in report.counts if key.startswith("refused: ")]
        if report.fits and refusals:
            print(f"{report.renderer_name}: refuses, for example: {refusals[0][9:]}...")
    unmade = [r.renderer_name for r in reports if "cannot be made" in r.problems]
    if unmade:
        print(f"\nnot made for this tokenizer: {', '.join(unmade)}")


def _print_verdict(reports: Sequence[Report]) -> int:
    fitting = sorted(
        (report for report in reports if report.fits),
        key=lambda report: (
            -round(report.share, 2),
            bool(report.template_options),
            report.renderer_name == "hf_template",
            report.counts["refused"],
        ),
    )
    print()
    if not fitting and any(report.is_near for report in reports):
        return _print_nearest([report for report in reports if report.is_near])
    if not fitting:
        print(
            "no renderer fits: none of them writes what this template writes. docs/renderers.md "
            "explains how to add a format."
        )
        return 1
    best = fitting[0].renderer_name
    others = [report.renderer_name for report in fitting[1:]]
    print(f"use {best}" + (f"  (also fits: {', '.join(others)})" if others else ""))
    if best == "hf_template":
        print(
            "hf_template uses the model's own template; it parses tool calls in replies only if "
            "they are JSON between two control tokens."
        )
    return 0


def _print_nearest(near: list[Report]) -> int:
    """Name the format that differs least; formats of the template's default mode come first."""
    near.sort(key=lambda report: (bool(report.template_options), -report.share))
    counts = near[0].counts
    total = counts["same prompts"] + counts["other prompts"]
    name = near[0].renderer_name
    others = ", ".join(report.renderer_name for report in near[1:])
    print(
        f"no renderer fits exactly; nearest: {name}"
        + (f"  (then {others})" if others else "")
        + "\n"
        f"{counts['same prompts']} of {total} prompts equal the template's, and every reply is "
        "trained as it is sampled; conversations differ as shown below. If docs/renderers.md lists "
        f"that difference as intended, use {name}."
    )
    return 1
