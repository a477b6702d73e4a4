"""Show conversations as the model sees them: every token, and which of them are trained."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Renderer, TrainOnWhat
    from tinker_cookbook.renderers.picture import TokenView
    from tinker_cookbook.supervised.conversations import Conversation, SourceRow

__all__ = ["add_arguments", "read_conversation", "run"]


class _Example(NamedTuple):
    """One training example, ready to be shown."""

    heading: str
    views: list[TokenView]
    roles: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from tinker_cookbook.model_files import DEFAULT_MODEL
    from tinker_cookbook.renderers import TrainOnWhat

    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="data file, folder or several, as for `check`"
    )
    parser.add_argument(
        "--verify",
        metavar="MODEL_OR_FOLDER",
        help="no FILE: check every renderer against this model's chat template, and say which fits",
    )
    parser.add_argument(
        "--against-template",
        action="store_true",
        help="show where the tokens differ from the model's own chat template; exit 1 if they do",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="model whose tokenizer is used: a name or a folder (%(default)s)",
    )
    parser.add_argument("--renderer", help="chat format; the model's recommended one if not given")
    parser.add_argument(
        "--train-on-what",
        choices=[mode.value for mode in TrainOnWhat],
        default=TrainOnWhat.ALL_ASSISTANT_MESSAGES.value,
        metavar="WHAT",
        help="which tokens are trained: %(choices)s (%(default)s)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--index", type=int, help="show this row only; the first is 0")
    which.add_argument("--limit", type=int, default=3, help="rows shown (%(default)s)")
    parser.add_argument(
        "--tokens", action="store_true", help="one token a line, with id and origin"
    )
    parser.add_argument("--html", metavar="OUT", help="write a page to this file instead")
    parser.add_argument(
        "--no-color", action="store_true", help="mark trained text with «» instead of colours"
    )


def run(args: argparse.Namespace) -> int:
    """Print the examples, or write the page."""
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.renderers import TrainOnWhat, load_renderer

    if args.verify is not None:
        from tinker_cookbook.commands.parts.renderer_check import run_verify

        return run_verify(args)
    if args.file is None:
        raise ConfigurationError("no FILE given; name a file of conversations, or use --verify.")
    rows = _selected_rows(args)
    if args.against_template:
        from tinker_cookbook.commands.parts.template_comparison import run_against_template

        return run_against_template(rows, args)
    name = args.renderer or get_recommended_renderer_name(args.model)
    renderer = load_renderer(name, args.model)
    examples = _examples(rows, renderer, TrainOnWhat(args.train_on_what))
    title = f"{args.model}, renderer {name}, trains {args.train_on_what}"
    if args.html:
        _write_page(Path(args.html), title, list(examples))
    else:
        _print_examples(title, examples, args)
    return 0


def _selected_rows(args: argparse.Namespace) -> list[SourceRow]:
    from tinker_cookbook.supervised.sources.several import open_data

    file = open_data(args.file)
    if args.index is None:
        if args.limit < 1:
            raise ConfigurationError(f"--limit={args.limit} shows nothing; use 1 or more.")
        return file.rows(range(min(args.limit, len(file))))
    if not 0 <= args.index < len(file):
        raise ConfigurationError(
            f"--index={args.index} is not in {args.file}; it has rows 0 to {len(file) - 1}."
        )
    return file.rows([args.index])


def read_conversation(row: SourceRow) -> Conversation:
    """Read a row that is a conversation.

    Raises:
        DataValidationError: a row that cannot be used, or is plain text.
    """
    from tinker_cookbook.exceptions import DataValidationError
    from tinker_cookbook.supervised.conversations import parse_row

    conversation = parse_row(row)
    if conversation.text is not None:
        raise DataValidationError(
            f"{row.where}: plain text has no chat format; `tinker-cookbook check` shows how it is "
            "trained."
        )
    return conversation


def _examples(
    rows: list[SourceRow], renderer: Renderer, train_on_what: TrainOnWhat
) -> Iterator[_Example]:
    from tinker_cookbook.exceptions import DataValidationError, RendererError
    from tinker_cookbook.renderers.picture import token_views
    from tinker_cookbook.supervised.rendering import ConversationRenderer

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

    color = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
    bold = "green is trained, yellow is context, bold are control tokens"
    legend = bold if color else "«» is trained"
    print(f"{title} ({legend})")
    for example in examples:
        print(f"\n--- {example.heading}")
        if args.tokens:
            print(token_table(example.views, example.roles, color=color))
        else:
            print(terminal_text(example.views, color=color))


def _write_page(path: Path, title: str, examples: list[_Example]) -> None:
    from tinker_cookbook.renderers.picture import html_page

    page = html_page(title, examples)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"--html={path} cannot be written ({error.strerror}); give a file in a folder that "
            "exists."
        ) from error
    print(f"wrote {len(examples)} examples to {path}")
