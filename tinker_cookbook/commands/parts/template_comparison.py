"""`tinker-cookbook render FILE --against-template`: our tokens beside the template's."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinker_cookbook.exceptions import ConfigurationError, DataValidationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message, Renderer, ToolSpec
    from tinker_cookbook.renderers.battery.differences import Difference
    from tinker_cookbook.renderers.rendering import Rendering
    from tinker_cookbook.supervised.conversations import SourceRow

__all__ = ["Comparison", "run_against_template"]

_CONTEXT = 4
_WIDTH = 34
_RED, _GREEN, _YELLOW, _DIM, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
_SAME, _MEANT, _DIFFERENT = "same tokens", "same text, other token borders", "different"
_REFUSED = "refused"


class Comparison(NamedTuple):
    """One conversation both ways."""

    where: str
    ours: list[int]
    theirs: list[int]
    differences: list[Difference]
    refusal: str = ""
    """Why there are no tokens to compare: the renderer or the template refuses the conversation."""

    @property
    def kind(self) -> str:
        """How near the two are."""
        if self.refusal:
            return _REFUSED
        if not self.differences:
            return _SAME
        return _MEANT if all(found.is_meant for found in self.differences) else _DIFFERENT

    @property
    def heading(self) -> str:
        """What is said above it."""
        if self.refusal:
            return f"{self.where}: {self.refusal}"
        counts = Counter(found.kind.value for found in self.differences)
        reasons = "".join(f"; {count} x {reason}" for reason, count in counts.items())
        return f"{self.where}: {self.kind} ({len(self.ours)} tokens{reasons})"


def run_against_template(rows: Sequence[SourceRow], args: argparse.Namespace) -> int:
    """Print or write the differences; exit status 1 if one is not meant, or a row is refused."""
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.renderers import load_renderer

    name = args.renderer or get_recommended_renderer_name(args.model)
    renderer = load_renderer(name, args.model)
    if not getattr(renderer.tokenizer, "chat_template", None):
        raise ConfigurationError(
            f"--model={args.model} has no chat template to compare with; leave out "
            "--against-template."
        )
    comparisons, options = _compare_all(rows, renderer)
    title = f"{args.model}: renderer {name} (left) against the chat template (right)"
    if options:
        title += f" with {', '.join(f'{key}={value}' for key, value in options.items())}"
    counts: dict[str, int] = dict.fromkeys((_SAME, _MEANT, _DIFFERENT), 0)
    for comparison in comparisons:
        counts[comparison.kind] = counts.get(comparison.kind, 0) + 1
    if args.html:
        from tinker_cookbook.commands.parts.comparison_page import write_page

        write_page(args.html, title, comparisons, renderer)
    else:
        _print(title, comparisons, renderer, args)
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if any(found.is_meant for comparison in comparisons for found in comparison.differences):
        print(
            "What is marked ~ is meant: a reply is encoded apart from the prompt it is sampled "
            "after, and typed control tokens stay text (docs/renderers.md)."
        )
    return 1 if counts[_DIFFERENT] or _REFUSED in counts else 0


def _compare_all(
    rows: Sequence[SourceRow], renderer: Renderer
) -> tuple[list[Comparison], Mapping[str, Any]]:
    """Return every row both ways, under the options with which the template is nearest.

    Raises:
        DataValidationError: if every row is refused.
    """
    from tinker_cookbook.renderers.battery.verify import TEMPLATE_OPTIONS

    sides = [_side(row, renderer) for row in rows]
    best: tuple[list[Comparison], Mapping[str, Any]] | None = None
    for options in TEMPLATE_OPTIONS:
        found = [
            side if isinstance(side, Comparison) else _compare(*side, renderer, options)
            for side in sides
        ]
        if best is None or _distance(found) < _distance(best[0]):
            best = found, options
        if not _distance(found):
            break
    assert best is not None, "there are options to try"
    if all(comparison.refusal for comparison in best[0]):
        raise DataValidationError(best[0][0].heading)
    return best


def _side(row: SourceRow, renderer: Renderer) -> tuple[SourceRow, Any, Rendering] | Comparison:
    """Return the row with our rendering, or our refusal."""
    from tinker_cookbook.commands.render import read_conversation
    from tinker_cookbook.exceptions import RendererError

    conversation = read_conversation(row)
    try:
        messages = renderer.declare_tools(conversation.messages, conversation.tools)
        return row, conversation, renderer.render(messages)
    except RendererError as error:
        return Comparison(row.where, [], [], [], refusal=f"the renderer refuses it: {error}")


def _distance(comparisons: Sequence[Comparison]) -> int:
    return sum(comparison.kind in (_DIFFERENT, _REFUSED) for comparison in comparisons)


def _compare(
    row: SourceRow,
    conversation: Any,
    rendering: Rendering,
    renderer: Renderer,
    options: Mapping[str, Any],
) -> Comparison:
    import jinja2

    from tinker_cookbook.renderers.battery.differences import differences, tokens_with_pads
    from tinker_cookbook.renderers.battery.verify import DATE_STRING

    try:
        theirs: Any = renderer.tokenizer.apply_chat_template(
            _for_template(conversation.messages, renderer),
            tools=_tool_records(conversation.tools),
            tokenize=True,
            return_dict=False,
            date_string=DATE_STRING,
            **options,
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        return Comparison(row.where, [], [], [], refusal=f"the template refuses it: {error}")
    ours, _ = tokens_with_pads(rendering, renderer.encoder)
    found = differences(rendering, theirs, renderer.encoder)
    return Comparison(row.where, ours, list(theirs), found)


def _for_template(messages: Sequence[Message], renderer: Renderer) -> list[dict[str, Any]]:
    """Return messages as servers hand them to templates: arguments as objects."""
    import json

    from tinker_cookbook.renderers.images import has_images

    records = []
    for message in messages:
        parts: Any = message["content"]
        if has_images(message):
            texts_only: Message = {**message, "content": ""}
            record = renderer.to_openai_message(texts_only)
            record["content"] = [
                {"type": "image"} if part["type"] == "image" else part for part in parts
            ]
        else:
            record = renderer.to_openai_message(message)
        for call in record.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                call["function"]["arguments"] = json.loads(arguments)
        records.append(record)
    return records


def _tool_records(tools: Sequence[ToolSpec]) -> Any:
    from tinker_cookbook.renderers.tool_calls import tool_declaration

    return [tool_declaration(tool) for tool in tools] or None


def _print(
    title: str, comparisons: Sequence[Comparison], renderer: Renderer, args: argparse.Namespace
) -> None:
    color = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
    print(f"{title}; ! differs, ~ is meant to")
    for comparison in comparisons:
        print(f"\n--- {comparison.heading}")
        for line in _side_by_side(comparison, renderer, color=color):
            print(line)


def _side_by_side(comparison: Comparison, renderer: Renderer, *, color: bool) -> Iterator[str]:
    """Yield the tokens that differ, with some before and after, ours left and theirs right."""
    ours, theirs, found = comparison.ours, comparison.theirs, comparison.differences
    shown_to = 0
    for difference in found:
        a, b, c, d, kind = difference
        start = max(shown_to, a - _CONTEXT)
        if start > shown_to:
            yield f"  ... {start - shown_to} equal tokens"
        for index in range(start, a):
            yield _line(index, ours[index], theirs[c - a + index], renderer)
        for step in range(max(b - a, d - c)):
            left = ours[a + step] if a + step < b else None
            right = theirs[c + step] if c + step < d else None
            line = _line(a + step, left, right, renderer, mark="~" if difference.is_meant else "!")
            if not step:
                line = f"{line:<{_LINE_WIDTH}}  {kind.value}"
            shade = _DIM if difference.is_meant else _shade(left, right)
            yield f"{shade}{line}{_RESET}" if color else line
        shown_to = b
    if shown_to < len(ours) and found:
        yield f"  ... {len(ours) - shown_to} equal tokens"


_LINE_WIDTH = 2 * _WIDTH + 28


def _shade(left: int | None, right: int | None) -> str:
    if left is None:
        return _RED
    return _GREEN if right is None else _YELLOW


def _line(
    position: int, left: int | None, right: int | None, renderer: Renderer, *, mark: str = " "
) -> str:
    return f"{mark} {position:>6} {_token(left, renderer)} | {_token(right, renderer)}".rstrip()


def _token(token: int | None, renderer: Renderer) -> str:
    if token is None:
        return " " * (_WIDTH + 8)
    return f"{token:>7} {_cut(repr(_token_text(token, renderer))):<{_WIDTH}}"


def _token_text(token: int, renderer: Renderer) -> str:
    """The text of one token; what is no whole character is shown as the replacement character."""
    data = renderer.encoder.token_bytes(token)
    return renderer.encoder.decode([token]) if data is None else data.decode("utf-8", "replace")


def _cut(text: str) -> str:
    """Cut a text to the column's width."""
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
