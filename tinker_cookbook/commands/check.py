"""Check data files: shapes, rows, tokens, conversions, truncation, duplicates and bad lines."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, get_args

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tqdm import tqdm

    from tinker_cookbook.preference.file_check import PreferenceKind
    from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer
    from tinker_cookbook.supervised.file_report import FileReport
    from tinker_cookbook.supervised.sources.row_file import DataSource, ReadCounts
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

__all__ = ["add_arguments", "run"]

Figures = dict[str, Any]
"""A report, or a part of it, as JSON."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from tinker_cookbook.model_files import DEFAULT_MODEL
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised.conversations import MarkupMode

    parser.add_argument(
        "file",
        metavar="DATA",
        help="file (JSONL, JSON, CSV, Parquet, text; also compressed), folder, glob, or several: "
        "a.jsonl,b.parquet",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="model whose tokenizer counts the tokens: a name or a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--renderer", help="chat format (default: the recommended one of the model)"
    )
    parser.add_argument(
        "--max-length", type=int, help="maximum tokens per row in training; longer rows are cut"
    )
    parser.add_argument(
        "--train-on-what",
        choices=[mode.value for mode in TrainOnWhat],
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES.value,
        metavar="WHAT",
        help="which tokens are trained: %(choices)s (default: %(default)s)",
    )
    parser.add_argument(
        "--markup",
        choices=get_args(MarkupMode),
        default="convert",
        help="what to do with <think> and <tool_call> in replies: %(choices)s (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, help="rows per step, to report the size of the last batch"
    )
    parser.add_argument(
        "--max-problems", type=int, default=20, help="maximum problems shown (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, help="number of processes (default: chosen by the size of the file)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check and print a report; return 1 if a row is unusable, else 0."""
    from tinker_cookbook.preference.file_check import preference_kind
    from tinker_cookbook.supervised.file_report import check_file
    from tinker_cookbook.supervised.sources.several import mix_lines, open_parts

    for option, value, least in (
        ("--max-length", args.max_length, 2),
        ("--batch-size", args.batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigurationError(f"{option}={value} is too small; use {least} or more.")
    file, parts = open_parts(args.file)
    kind = preference_kind(file)
    if kind is not None:
        return _run_preference(args, file, kind)
    renderer_name, render = _conversation_renderer(args)
    with _progress_bar(len(file)) as bar:

        def advance(num_rows: int) -> None:
            bar.update(num_rows)

        report = check_file(file, render, num_workers=args.workers, on_progress=advance)
    figures = report.to_dict() | {
        "model": args.model,
        "renderer": renderer_name,
        "train_on_what": args.train_on_what,
    }
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print(_format(figures, report.read, args.batch_size))
        print("".join(f"{_row('mix', line)}\n" for line in mix_lines(parts)), end="")
        print(_first_row(file, report, render), end="")
        print(_problems(figures, args.max_problems), end="")
    return 1 if report.num_unusable else 0


def _run_preference(args: argparse.Namespace, file: DataSource, kind: PreferenceKind) -> int:
    """Check a file of pairs or rated replies."""
    from tinker_cookbook.commands.parts.preference_check import preference_lines
    from tinker_cookbook.preference.file_check import check_preference_file
    from tinker_cookbook.supervised.types import ChatDatasetBuilder

    config = _common_config(args)
    renderer = ChatDatasetBuilder(common_config=config).renderer
    with _progress_bar(len(file)) as bar:

        def advance(num_rows: int) -> None:
            bar.update(num_rows)

        report = check_preference_file(file, kind, renderer, args.max_length, on_progress=advance)
    figures = report.to_dict() | {
        "file": file.name,
        "container": file.container,
        "blank_lines": file.num_blank_lines,
        "model": args.model,
        "renderer": config.renderer_name,
    }
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"{file.name}: {len(file):,} rows, {file.num_blank_lines:,} blank lines")
        print(f"{args.model}, renderer {config.renderer_name}\n")
        print(_row("container", file.container))
        print(*preference_lines(report, figures), sep="\n")
        print(_problems(figures, args.max_problems), end="")
    return 1 if report.problems else 0


def _first_row(file: DataSource, report: FileReport, render: ConversationRenderer) -> str:
    """Return the first usable row with its trained text marked; of several datums the first."""
    from tinker_cookbook.display import describe_example

    index = report.first_usable
    if index is None:
        return ""
    [row] = file.rows([index])
    [rendered] = render([row])
    more = len(rendered.datums) - 1
    title = f"{row.where} as trained"
    if more:
        title += f", the first of {more + 1} datums"
    text = describe_example(
        rendered.datums[0], render.renderer.tokenizer, title=title, stream=sys.stdout
    )
    return f"\n{text.rstrip()}\n"


def _conversation_renderer(args: argparse.Namespace) -> tuple[str, ConversationRenderer]:
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer
    from tinker_cookbook.supervised.types import ChatDatasetBuilder

    config = _common_config(args)
    renderer = ChatDatasetBuilder(common_config=config).renderer
    mode = TrainOnWhat(args.train_on_what)
    render = ConversationRenderer(renderer, args.max_length, mode, markup=args.markup)
    return config.renderer_name, render


def _common_config(args: argparse.Namespace) -> ChatDatasetBuilderCommonConfig:
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=args.model,
        renderer_name=args.renderer or get_recommended_renderer_name(args.model),
        max_length=args.max_length,
        batch_size=1,
    )


def _progress_bar(num_rows: int) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=num_rows, unit=" rows", disable=not sys.stderr.isatty(), leave=False)


def _format(figures: Figures, read: ReadCounts, batch_size: int | None) -> str:
    from tinker_cookbook.supervised.lazy_dataset import last_batch_lines

    lines = [
        f"{figures['file']}: {figures['rows']:,} rows, {figures['blank_lines']:,} blank lines",
        f"{figures['model']}, renderer {figures['renderer']}, trains {figures['train_on_what']}",
        "",
        _row("container", figures["container"]),
        *(_row("shape", line) for line in read.shape_lines()),
        *(_row("converted", line) for line in _converted(figures, read)),
        *([_row("not used", f"keys {read.unused_text()}")] if read.unused else []),
        _row("usable", f"{figures['usable_rows']:,} rows, {figures['datums']:,} datums"),
        _row("unusable", _unusable(figures)),
        _row("tokens", _tokens(figures["tokens"])),
        _row("trained", _tokens(figures["trained_tokens"])),
        _row("truncated", _truncated(figures["truncated"])),
        _row("duplicates", _duplicates(figures["duplicates"])),
    ]
    if batch_size is not None:
        rows = figures["usable_rows"]
        batches = last_batch_lines(rows, batch_size, drop_last=False)
        lines += [_row("batches", line) for line in batches]
    return "\n".join(lines)


def _problems(figures: Figures, max_problems: int) -> str:
    if not figures["unusable_rows"]:
        return ""
    shown = figures["problems"][:max_problems]
    lines = ["", "problems", *(f"  {problem}" for problem in shown)] if shown else []
    more = figures["unusable_rows"] - len(shown)
    if more:
        lines.append(f"  and {more:,} more; raise --max-problems to see them")
    return "\n".join([*lines, ""])


def _row(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def _unusable(figures: Figures) -> str:
    reasons = figures["unusable_by_reason"].items()
    listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return f"{figures['unusable_rows']:,} rows" + (f": {listed}" if listed else "")


def _tokens(figures: Figures) -> str:
    parts = [f"{name} {figures[name]:,}" for name in figures if name != "total"]
    return f"{figures['total']:,}; per row {', '.join(parts)}"


def _truncated(figures: Figures) -> str:
    if figures["max_length"] is None:
        return "nothing (no --max-length)"
    text = (
        f"{figures['rows']:,} rows at max_length={figures['max_length']}; "
        f"{figures['tokens_cut']:,} tokens cut, {figures['trained_tokens_cut']:,} of them trained"
    )
    text += _listed(figures["first_lines"], figures["rows"])
    if lost := figures["rows_without_trained_tokens"]:
        lines = _listed(figures["first_lines_without_trained_tokens"], lost)
        text += f"; {lost:,} rows have no trained token left{lines}"
    return text


def _converted(figures: Figures, read: ReadCounts) -> list[str]:
    """Return a line for each kind of conversion, with the first rows that it applies to."""
    found = figures["converted"].values()
    return [
        line + _listed(figure["first_lines"], figure["rows"])
        for line, figure in zip(read.note_lines(), found, strict=True)
    ]


def _listed(lines: list[int | str], num_rows: int) -> str:
    """Return the first line numbers in brackets; an empty text if there are none."""
    if not lines:
        return ""
    more = ", ..." if num_rows > len(lines) else ""
    return f" (line{'s' * (num_rows != 1)} {', '.join(map(str, lines))}{more})"


def _duplicates(figures: Figures) -> str:
    pairs = [f"line {later} = line {first}" for later, first in figures["first_lines"][:5]]
    more = ", ..." if figures["rows"] > len(pairs) else ""
    listed = f" ({', '.join(pairs)}{more})" if pairs else ""
    return f"{figures['rows']:,} rows repeat an earlier one{listed}"
