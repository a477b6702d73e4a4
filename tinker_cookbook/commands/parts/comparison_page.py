"""Differences between a renderer and a chat template, as a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.template_comparison import Comparison

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Renderer
    from tinker_cookbook.renderers.battery.differences import Difference

__all__ = ["comparison_page"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 0; }}
ins {{ background: #2e9e4f40; }} del {{ background: #c8372d40; }}
.b {{ background: #c8372d40; border-bottom: 2px solid #c8372d; }}
.m {{ background: #f5c54240; border-bottom: 2px dotted #b08a1a; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><ins>only ours</ins> <del>only the template's</del>
<span class="b">the same text in other tokens</span>
<span class="m">the same text in other tokens, as expected</span>; hover for the tokens.</p>
{sections}
</body>
</html>
"""


def comparison_page(title: str, comparisons: Sequence[Comparison], renderer: Renderer) -> str:
    """Return the page."""
    sections = "\n".join(
        f"<h2>{html.escape(one.heading)}</h2>\n<pre>{''.join(_pieces(one, renderer))}</pre>"
        for one in comparisons
    )
    return _PAGE.format(title=html.escape(title), sections=sections)


def _pieces(comparison: Comparison, renderer: Renderer) -> Iterator[str]:
    position = 0
    for found in comparison.differences:
        yield _text(comparison.ours[position : found.start], renderer)
        yield _difference(comparison, found, renderer)
        position = found.end
    yield _text(comparison.ours[position:], renderer)


def _difference(comparison: Comparison, found: Difference, renderer: Renderer) -> str:
    from tinker_cookbook.renderers.battery.differences import DifferenceKind

    ours = comparison.ours[found.start : found.end]
    theirs = comparison.theirs[found.template_start : found.template_end]
    hint = html.escape(f"{found.kind.value}: ours {ours}, the template's {theirs}")
    if found.kind is DifferenceKind.TEXT:
        mine = f'<ins title="{hint}">{_text(ours, renderer)}</ins>' if ours else ""
        other = f'<del title="{hint}">{_text(theirs, renderer)}</del>' if theirs else ""
        return mine + other
    mark = "m" if found.is_meant else "b"
    return f'<span class="{mark}" title="{hint}">{_text(ours, renderer)}</span>'


def _text(tokens: Sequence[int], renderer: Renderer) -> str:
    from tinker_cookbook.renderers.picture import printable

    return html.escape(printable(renderer.encoder.decode(tokens))).replace("\n", "↵\n")
