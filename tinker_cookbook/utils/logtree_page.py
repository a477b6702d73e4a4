"""The tree of a logtree report, and its HTML page."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["RAW", "Node", "Theme", "Trace", "build_head", "build_page", "write_text"]

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
section section { margin-left: .4rem; padding-left: .9rem; border-left: 2px solid #8886 }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem } h3, h4, h5, h6 { font-size: 1rem }
p, pre { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: #8881; border-radius: 4px; padding: .5rem .7rem }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .2rem .7rem }
summary { cursor: pointer }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .2rem 0 }
th, td { border: 1px solid #8884; padding: .2rem .6rem; text-align: left; vertical-align: top;
         white-space: pre-wrap; overflow-wrap: anywhere }
.lt-exception { border-left: 4px solid #c0392b; padding-left: .8rem }
""".strip()
RAW = "raw"
"""Tag of a node whose children are already HTML; the node itself writes no element."""


@dataclass
class Node:
    """An element of the report."""

    tag: str
    attrs: dict[str, str] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)
    """Elements and texts; texts are escaped when the page is written."""
    data: dict[str, object] | None = field(default=None, repr=False)
    """Content of the element, for programs that read the JSON."""

    def to_html(self, indent: int = 0) -> str:
        """Return the element and everything in it."""
        if self.tag == RAW:
            return "".join(str(child) for child in self.children)
        attrs = "".join(f' {key}="{html.escape(value)}"' for key, value in self.attrs.items())
        start, end = f"{'  ' * indent}<{self.tag}{attrs}>", f"</{self.tag}>"
        if not any(isinstance(child, Node) for child in self.children):
            return start + "".join(html.escape(str(child)) for child in self.children) + end
        lines = [
            child.to_html(indent + 1) if isinstance(child, Node) else html.escape(child)
            for child in self.children
        ]
        return "\n".join([start, *lines, "  " * indent + end])

    def to_dict(self) -> dict[str, object]:
        """Return the element as JSON: `tag`, and `attrs`, `children` and `data` if not empty."""
        children = [c.to_dict() if isinstance(c, Node) else c for c in self.children]
        optional = {"attrs": self.attrs, "children": children, "data": self.data}
        return {"tag": self.tag, **{key: value for key, value in optional.items() if value}}


@dataclass
class Theme:
    """Style of a page."""

    css_text: str | None = None
    """Style sheet that replaces the default one."""
    css_urls: list[str] = field(default_factory=list)
    css_vars: dict[str, str] = field(default_factory=dict)
    """CSS custom properties by name, with or without the leading `--`."""


class Trace:
    """A report."""

    def __init__(self, title: str, path: str | os.PathLike | None, write_on_error: bool) -> None:
        self.title = title
        self.path = None if path is None else Path(path)
        self.write_on_error = write_on_error
        self.started_at = datetime.now(UTC)
        self.root = Node("body", {"class": "lt-root"}, [Node("h1", children=[title])])
        self._styles: dict[str, None] = {}

    def add_style(self, css: str) -> None:
        """Add a style sheet unless the report already has it."""
        if css:
            self._styles[css] = None

    def add_styles_of(self, other: Trace) -> None:
        """Add the style sheets of another report whose elements are shown in this one."""
        self._styles |= other._styles

    def body_html(self, wrap_body: bool = True) -> str:
        """Return the body element, or only its content if `wrap_body` is false."""
        if wrap_body:
            return self.root.to_html()
        return "\n".join(c.to_html() for c in self.root.children if isinstance(c, Node))

    def head_html(
        self, theme: Theme | None = None, title: str | None = None, extra_head: str | None = None
    ) -> str:
        """Return the head: title, styles and, unescaped, `extra_head`."""
        styles = "\n".join(self._styles)
        return build_head(title or self.title, theme, styles, extra_head)

    def get_html(self) -> str:
        """Return the whole page, which is self-contained."""
        return build_page(self.head_html(), self.body_html())

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON."""
        return {
            "title": self.title,
            "started_at": self.started_at.isoformat(),
            "path": None if self.path is None else str(self.path),
            "root": self.root.to_dict(),
        }


def build_head(title: str, theme: Theme | None, styles: str, extra_head: str | None) -> str:
    """Return the head of a page."""
    theme = theme or Theme()
    links = [f'<link rel="stylesheet" href="{html.escape(url)}">' for url in theme.css_urls]
    variables = "".join(f"--{k.removeprefix('--')}: {v}; " for k, v in theme.css_vars.items())
    css = [STYLE if theme.css_text is None else theme.css_text, styles]
    if variables:
        css.insert(0, f":root {{ {variables}}}")
    parts = [
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        *links,
        "<style>\n" + "\n".join(filter(None, css)) + "\n</style>",
        extra_head or "",
        "</head>",
    ]
    return "\n".join(filter(None, parts))


def build_page(head: str, body: str, lang: str = "en") -> str:
    """Return a page; `body` is the body element or its content."""
    if not body.lstrip().startswith("<body"):
        body = f"<body>\n{body}\n</body>"
    return f'<!doctype html>\n<html lang="{html.escape(lang)}">{head}\n{body}\n</html>\n'


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a page or JSON file, with escapes for halves of characters that models may sample."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
