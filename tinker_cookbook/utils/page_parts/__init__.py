"""Style and script that the pages of the client and of the local service share.

A page is an HTML file with the comments `/* look.css */` in its style and `/* parts.js */` in its
script; `fill_page` replaces them.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["fill_page"]

PARTS = ("look.css", "parts.js")


def fill_page(text: str) -> str:
    """Return a page with the shared style and script instead of the comments that name them."""
    for name in PARTS:
        content = Path(__file__).with_name(name).read_text(encoding="utf-8")
        text = text.replace(f"/* {name} */", content.removeprefix('"use strict";\n').rstrip())
    return text
