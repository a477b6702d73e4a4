"""Show conversations as the model sees them: every token, and which of them are trained."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from tinker_cookbook.commands.parts.conversation_rows import read_conversation
from tinker_cookbook.commands.parts.page_file import write_page
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.commands.parts.template_comparison import Comparison
    from tinker_cookbook.renderers import Renderer, TrainOnWhat
    from tinker_cookbook.renderers.picture import TokenView
    from tinker_cookbook.supervised.conversations import SourceRow

__all__ = ["add_arguments", "run"]


class _Example(NamedTuple):
    """One training example with its tokens, for display."""

    heading: str
    views: list[TokenView]
    roles: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from tinker_cookbook.model_files import DEFAULT_MODEL
    from tinker_cookbook.renderers import TrainOnWhat

    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="data file, folder or several, as in `check`"
    )
    parser.add_argument(
        "--verify",
        metavar="MODEL_OR_FOLDER",
        help="instead of FILE: check every renderer against this model's chat template and say "
        "which one fits",
    )
    parser.add_argument(
        "--against-template",
        action="store_true",
        help="show where the tokens differ from the model's own chat template; exit status 1 if "
        "they do",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="model whose tokenizer is used: a name or a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--renderer", help="chat format (default: the recommended one of the model)"
    )
    parser.add_argument(
        "--train-on-what",
        choices=[mode.value for mode in TrainOnWhat],
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES.value,
        metavar="WHAT",
        help="which tokens are trained: %(choices)s (default: %(default)s)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="show only this row; the first is 0")
    which.add_argument(
        "--limit", type=int, default=3, help="maximum rows shown (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", action="store_true", help="show one token per line, with its id and origin"
    )
    parser.add_argument(
        "--html", metavar="OUT", help="write an HTML page to this file instead of printing"
    )
    parser.add_argument(
        "--no-color", action="store_true", help="mark trained text with «» instead of colours"
    )


def run(args: argparse.Namespace) -> int:
    """Print the examples or write them as a page; return the exit status."""
    from tinker_cookbook.renderers import TrainOnWhat

    if args.verify is not None:
        from tinker_cookbook.commands.parts.renderer_check import run_verify

        return run_verify(args)
    if args.file is None:
        raise ConfigurationError(
            "FILE is missing; give a file of conversations, or use --verify MODEL."
        )
    rows = _selected_rows(args)
    if args.against_template:
        return _compare_with_template(rows, args)
    name, renderer = _load_renderer(args)
    examples = _examples(rows, renderer, TrainOnWhat(args.train_on_what))
    title = f"{args.model}, renderer {name}, trains {args.train_on_what}"
    if args.html:
        _write_examples(args.html, title, list(examples))
    else:
        _print_examples(title, examples, args)
    return 0


def _selected_rows(args: argparse.Namespace) -> list[SourceRow]:
    from tinker_cookbook.supervised.sources.several import open_data

    file = open_data(args.file)
    if args.index is None:
        if args.limit < 1:
            raise ConfigurationError(f"--limit={args.limit} is too small; use 1 or more.")
        return file.rows(range(min(args.limit, len(file))))
    if not 0 <= args.index < len(file):
        raise ConfigurationError(
            f"--index={args.index} is not in {args.file}; it has rows 0 to {len(file) - 1}."
        )
    return file.rows([args.index])


def _examples(
    rows: list[SourceRow], renderer: Renderer, train_on_what: TrainOnWhat
) -> Iterator[_Example]:
    from tinker_cookbook.exceptions import DataValidationError, RendererError
    from tinker_cookbook.renderers.picture import token_views
    from tinker_cookbook.supervised.conversation_renderer import ConversationRenderer

    render = ConversationRenderer(renderer, None, train_on_what)
    for row in rows:
        conversation = read_conversation(row)
        try:
            messages, mode = render.marked(conversation)
            examples = renderer.render_examples([messages], mode)[0]
        except RendererError as error:
            raise DataValidationError(f"{row.where}: {error}") from error
        roles = [message["role"] for message in messages]
        for number, (rendering, weights) in enumerate(examples, start=1):
            which = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
            trained = int((weights != 0).sum())
            heading = f"{row.where}{which}: {len(weights)} tokens, {trained} trained"
            views = token_views(rendering, weights, renderer.encoder)
            yield _Example(heading, views, roles)


def _print_examples(title: str, examples: Iterator[_Example], args: argparse.Namespace) -> None:
    from tinker_cookbook.renderers.picture import terminal_text, token_table

    color = _use_color(args)
    legend = "«» is trained"
    if color:
        legend = "green is trained, yellow is context, control tokens are bold"
    print(f"{title} ({legend})")
    for example in examples:
        print(f"\n--- {example.heading}")
        if args.tokens:
            print(token_table(example.views, example.roles, color=color))
        else:
            print(terminal_text(example.views, color=color))


def _write_examples(path: str, title: str, examples: list[_Example]) -> None:
    from tinker_cookbook.renderers.picture import html_page

    write_page(path, html_page(title, examples))
    print(f"wrote {len(examples)} examples to {path}")


def _compare_with_template(rows: list[SourceRow], args: argparse.Namespace) -> int:
    """Show the differences; return 1 if one is unexpected or a row is refused, else 0."""
    from tinker_cookbook.commands.parts.template_comparison import Outcome, compare_rows

    name, renderer = _load_renderer(args)
    if not getattr(renderer.tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"--model={args.model} has no chat template to compare with; leave out "
            "--against-template."
        )
    comparisons, options = compare_rows(rows, renderer)
    title = f"{args.model}: renderer {name} (left) against the chat template (right)"
    if options:
        title += f" with {', '.join(f'{key}={value}' for key, value in options.items())}"
    _show_comparisons(title, comparisons, renderer, args)
    counts = Counter(comparison.outcome for comparison in comparisons)
    always = (Outcome.SAME, Outcome.EXPECTED, Outcome.DIFFERENT)
    shown = [outcome for outcome in Outcome if outcome in always or counts[outcome]]
    print("\n" + ", ".join(f"{counts[outcome]} {outcome}" for outcome in shown))
    if any(found.is_meant for comparison in comparisons for found in comparison.differences):
        print(
            "~ marks an expected difference: a reply is encoded separately from its prompt, as it "
            "is sampled, and typed control tokens stay text (docs/renderers.md)."
        )
    return 1 if counts[Outcome.DIFFERENT] or counts[Outcome.REFUSED] else 0


def _show_comparisons(
    title: str, comparisons: list[Comparison], renderer: Renderer, args: argparse.Namespace
) -> None:
    if args.html:
        from tinker_cookbook.commands.parts.comparison_page import comparison_page

        write_page(args.html, comparison_page(title, comparisons, renderer))
        print(f"wrote {len(comparisons)} comparisons to {args.html}")
    else:
        from tinker_cookbook.commands.parts.comparison_text import print_comparisons

        print_comparisons(title, comparisons, renderer, color=_use_color(args))


def _load_renderer(args: argparse.Namespace) -> tuple[str, Renderer]:
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.renderers import load_renderer

    name = args.renderer or get_recommended_renderer_name(args.model)
    return name, load_renderer(name, args.model)


def _use_color(args: argparse.Namespace) -> bool:
    return sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
