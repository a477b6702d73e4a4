"""Showing what is trained: every token of a rendering with its weight.

For a terminal (colours, or «» around trained text without colours), as a table, or as an HTML page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from tinker_cookbook.renderers.encoding.encoder import TextEncoder, Utf8TokenDecoder
from tinker_cookbook.renderers.rendering import Rendering

__all__ = ["TokenView", "html_page", "printable", "terminal_text", "token_table", "token_views"]


class TokenView(NamedTuple):
    """One position of a rendering."""

    position: int
    token: int | None
    """None for an image or audio clip, which takes many positions."""
    text: str
    """Bytes of an unfinished character as `\\xNN`."""
    shown: str
    """Like `text`, but a character that spans several tokens is shown at the last one."""
    weight: float
    kind: str
    message: int
    """-1 before the first message."""
    is_control: bool


def token_views(rendering: Rendering, weights: np.ndarray, encoder: TextEncoder) -> list[TokenView]:
    """Return every token with its weight and origin, in order."""
    views: list[TokenView] = []
    decoder = Utf8TokenDecoder(encoder)
    position = 0
    for segment in rendering.segments:
        origin = (segment.kind.value, segment.message)
        if segment.chunk is not None:
            text = f"<{segment.chunk.type}: {segment.length} positions>"
            weight = float(weights[position])
            views.append(TokenView(position, None, text, text, weight, *origin, True))
            position += segment.length
        for token in segment.tokens:
            text, shown = _token_text(token, encoder), decoder.decode_text((token,))
            weight, is_control = float(weights[position]), encoder.is_control(token)
            views.append(TokenView(position, token, text, shown, weight, *origin, is_control))
            position += 1
    return views


def _token_text(token: int, encoder: TextEncoder) -> str:
    data = encoder.token_bytes(token)
    if data is None:
        return encoder.decode([token])
    return data.decode("utf-8", errors="backslashreplace")


# ---- terminal ----

# Neighbouring tokens alternate between two shades, so that they can be distinguished.
_TRAINED = ("\x1b[32m", "\x1b[92;4m")
_CONTEXT = ("\x1b[33m", "\x1b[2;33m")
_NEGATIVE = ("\x1b[31m", "\x1b[91;4m")
_CONTROL = "\x1b[1m"
_RESET = "\x1b[0m"


def terminal_text(views: Sequence[TokenView], *, color: bool) -> str:
    """Return the text as a terminal shows it; trained text is green, or in «» without colour."""
    return _colored(views) if color else _marked(views)


def _colored(views: Sequence[TokenView]) -> str:
    pieces = []
    for view in views:
        shades = _TRAINED if view.weight > 0 else _NEGATIVE if view.weight < 0 else _CONTEXT
        # Reset colours before the end of a line: pagers drop them there.
        lines = printable(view.shown).split("\n")
        start = shades[view.position % 2] + (_CONTROL if view.is_control else "")
        pieces.append("\n".join(f"{start}{line}{_RESET}" if line else "" for line in lines))
    return "".join(pieces)


def _marked(views: Sequence[TokenView]) -> str:
    pieces = []
    for weight, group in groupby(views, key=lambda view: view.weight):
        text = "".join(printable(view.shown) for view in group)
        mark = "" if weight in (0, 1) else f"{weight:g}×"
        pieces.append(f"{mark}«{text}»" if weight else text)
    return "".join(pieces)


_SHOWN = "\n\t\u200d"  # newline, tab, and the joiner of emoji


def printable(text: str) -> str:
    """Show control characters, which could otherwise rewrite the terminal; newlines stay."""
    return "".join(
        character if character in _SHOWN or character.isprintable() else repr(character)[1:-1]
        for character in text
    )


def token_table(views: Sequence[TokenView], roles: Sequence[str], *, color: bool) -> str:
    """Return one line per token: position, id, weight, kind, message, text."""
    lines = [f"{'pos':>6} {'id':>7} {'weight':>6}  {'kind':<8}{'message':<14}text"]
    for view in views:
        token = "" if view.token is None else view.token
        row = (
            f"{view.position:>6} {token:>7} {view.weight:>6g}  {view.kind:<8}"
            f"{_origin(view.message, roles):<14}{view.text!r}"
        )
        shade = _TRAINED[0] if view.weight > 0 else _NEGATIVE[0] if view.weight < 0 else ""
        lines.append(f"{shade}{row}{_RESET}" if color and shade else row)
    return "\n".join(lines)


def _origin(message: int, roles: Sequence[str]) -> str:
    return "-" if message < 0 or message >= len(roles) else f"{message} {roles[message]}"


# ---- HTML ----

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --trained: #2e9e4f; --negative: #c8372d; --line: #8886; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 0; }}
.t {{ background: #2e9e4f40; border-bottom: 2px solid var(--trained); }}
.n {{ background: #c8372d40; border-bottom: 2px solid var(--negative); }}
.c {{ opacity: .75; }}
.o {{ filter: brightness(.82); }}
.k {{ outline: 1px solid var(--line); border-radius: 3px; font-weight: 600; }}
span:hover {{ background: #f5c54266; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><span class="t">trained</span> <span class="n">negative weight</span>
<span class="c">context</span> <span class="k">control token</span>;
point at a token for its id, weight and origin.</p>
{sections}
</body>
</html>
"""


def html_page(
    title: str, sections: Sequence[tuple[str, Sequence[TokenView], Sequence[str]]]
) -> str:
    """Return a self-contained page.

    Args:
        title: heading of the page.
        sections: for each example its heading, its tokens, and the roles of its messages.
    """
    body = "\n".join(
        f"<h2>{html.escape(heading)}</h2>\n<pre>{_html_tokens(views, roles)}</pre>"
        for heading, views, roles in sections
    )
    return _PAGE.format(title=html.escape(title), sections=body)


def _html_tokens(views: Sequence[TokenView], roles: Sequence[str]) -> str:
    return "".join(_html_token(view, roles) for view in views)


def _html_token(view: TokenView, roles: Sequence[str]) -> str:
    classes = ["t" if view.weight > 0 else "n" if view.weight < 0 else "c"]
    if view.position % 2:
        classes.append("o")
    if view.is_control:
        classes.append("k")
    name = "media" if view.token is None else f"id {view.token}"
    origin = _origin(view.message, roles)
    hint = f"{view.position}: {name}, weight {view.weight:g}, {view.kind}, message {origin}"
    shown = html.escape(printable(view.shown)).replace("\n", "↵\n")
    return f'<span class="{" ".join(classes)}" title="{html.escape(hint)}">{shown}</span>'
