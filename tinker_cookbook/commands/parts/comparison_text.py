"""Differences between a renderer and a chat template, side by side on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.template_comparison import Comparison

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Renderer
    from tinker_cookbook.renderers.battery.differences import Difference

__all__ = ["print_comparisons"]

_CONTEXT = 4
"""Equal tokens shown before a difference."""
_WIDTH = 34
_LINE_WIDTH = 2 * _WIDTH + 28
_RED, _GREEN, _YELLOW, _DIM, _RESET = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


def print_comparisons(
    title: str, comparisons: Sequence[Comparison], renderer: Renderer, *, color: bool
) -> None:
    """Print every comparison: our tokens on the left, the template's on the right."""
    print(f"{title}; ! marks a difference, ~ an expected one")
    for comparison in comparisons:
        print(f"\n--- {comparison.heading}")
        for line in _side_by_side(comparison, renderer, color=color):
            print(line)


def _side_by_side(comparison: Comparison, renderer: Renderer, *, color: bool) -> Iterator[str]:
    """Yield a line for each token that differs, and for a few equal tokens before it."""
    ours, theirs = comparison.ours, comparison.theirs
    shown_to = 0
    for difference in comparison.differences:
        start = max(shown_to, difference.start - _CONTEXT)
        if start > shown_to:
            yield f"  ... {start - shown_to} equal tokens"
        offset = difference.template_start - difference.start
        for index in range(start, difference.start):
            yield _line(index, ours[index], theirs[offset + index], renderer)
        yield from _differing_lines(comparison, difference, renderer, color=color)
        shown_to = difference.end
    if shown_to < len(ours) and comparison.differences:
        yield f"  ... {len(ours) - shown_to} equal tokens"


def _differing_lines(
    comparison: Comparison, difference: Difference, renderer: Renderer, *, color: bool
) -> Iterator[str]:
    start, end, template_start, template_end, kind = difference
    left_tokens = comparison.ours[start:end]
    right_tokens = comparison.theirs[template_start:template_end]
    for step in range(max(len(left_tokens), len(right_tokens))):
        left = left_tokens[step] if step < len(left_tokens) else None
        right = right_tokens[step] if step < len(right_tokens) else None
        mark = "~" if difference.is_meant else "!"
        line = _line(start + step, left, right, renderer, mark=mark)
        if not step:
            line = f"{line:<{_LINE_WIDTH}}  {kind.value}"
        shade = _DIM if difference.is_meant else _shade(left, right)
        yield f"{shade}{line}{_RESET}" if color else line


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
    """Return the text of one token, with U+FFFD for a part of a character."""
    data = renderer.encoder.token_bytes(token)
    return renderer.encoder.decode([token]) if data is None else data.decode("utf-8", "replace")


def _cut(text: str) -> str:
    """Cut a text to the column's width."""
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
