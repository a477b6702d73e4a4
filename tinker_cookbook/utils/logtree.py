"""A report that code writes as it runs: nested sections, texts and tables, as one HTML page.

    with logtree.init_trace("Step 3", path="step_3.html"):
        with logtree.scope_header("Question 1"):
            logtree.log_text("What is 2 + 2?")

Without a trace, and under `scope_disable`, every call costs next to nothing and does nothing, so
that environments may log always. Tasks of asyncio each have their own place in the report; threads
of `asyncio.to_thread` go on at the place of their caller.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, overload

from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.utils.logtree_page import (
    RAW,
    Node,
    Theme,
    Trace,
    build_head,
    build_page,
    write_text,
)

__all__ = [
    "Formatter",
    "Node",
    "Theme",
    "Trace",
    "current_trace",
    "details",
    "flush_trace",
    "header",
    "init_trace",
    "jinja_context",
    "log_formatter",
    "log_html",
    "log_text",
    "optional_enable_logging",
    "render_with_jinja",
    "scope_details",
    "scope_disable",
    "scope_div",
    "scope_header",
    "scope_header_decorator",
    "table",
    "table_from_dict",
    "table_from_dict_of_lists",
    "write_html_with_default_style",
    "write_trace",
    "write_trace_json",
]

F = TypeVar("F", bound=Callable[..., Any])

_MAX_LEVEL = 6


class Formatter(Protocol):
    """An object that knows how it is shown."""

    def to_html(self) -> str:
        """The element."""
        ...

    def get_css(self) -> str:
        """Its style; equal styles are written once."""
        ...

    def to_data(self) -> dict[str, Any] | None:
        """The same as JSON, or None."""
        ...


@dataclass(frozen=True)
class _Place:
    """Where the next element goes."""

    trace: Trace
    node: Node
    level: int
    """Of the next header: 2 under the title."""


_place: ContextVar[_Place | None] = ContextVar("logtree_place", default=None)


# ---- reports and sections ----


@contextmanager
def init_trace(
    title: str, path: str | os.PathLike | None = None, *, write_on_error: bool = True
) -> Iterator[Trace]:
    """Start a report.

    Args:
        title: Its heading.
        path: File that is written at the end; None: none is.
        write_on_error: Write the report, with the exception at its end, when the block raises.
    """
    trace = Trace(title, path, write_on_error)
    try:
        with _at(_Place(trace, trace.root, 2)):
            yield trace
    except BaseException as error:
        trace.root.children.append(_describe_exception(error))
        if write_on_error:
            write_trace(trace)
        raise
    write_trace(trace)


@contextmanager
def scope_header(title: str, **attrs: Any) -> Iterator[None]:
    """A section with a header, one level below that of the section around it.

    Args:
        title: The header.
        attrs: Attributes of the section: `class_="wide"`, `data_step=3`.
    """
    place = _place.get()
    if place is None:
        yield
        return
    section = Node("section", _attributes(attrs), [_header_node(title, place.level)])
    with _inside(place, section, deeper=True):
        yield


@overload
def scope_header_decorator(title: str) -> Callable[[F], F]: ...
@overload
def scope_header_decorator(title: F) -> F: ...
def scope_header_decorator(title: str | F) -> F | Callable[[F], F]:
    """Give every call of a function, synchronous or not, a section: under its name or a title."""
    if not isinstance(title, str):
        return _in_section(title, title.__name__)
    return lambda func: _in_section(func, title)


@contextmanager
def scope_div(**attrs: Any) -> Iterator[None]:
    """A `div`; headers in it have the level they would have around it."""
    place = _place.get()
    if place is None:
        yield
        return
    with _inside(place, Node("div", _attributes(attrs))):
        yield


@contextmanager
def scope_details(summary: str) -> Iterator[None]:
    """A part that is folded until somebody opens it."""
    place = _place.get()
    if place is None:
        yield
        return
    with _inside(place, Node("details", children=[Node("summary", children=[summary])])):
        yield


@contextmanager
def scope_disable() -> Iterator[None]:
    """Leave out everything logged inside the block."""
    with _at(None):
        yield


@contextmanager
def optional_enable_logging(enable: bool) -> Iterator[None]:
    """Leave out everything logged inside the block, unless `enable`."""
    with _at(_place.get() if enable else None):
        yield


# ---- what is logged ----


def log_text(text: str, *, div_class: str | None = None) -> None:
    """Add a paragraph; with `div_class`, in a `div` of that class."""
    _add(_classed(Node("p", children=[str(text)]), div_class))


def log_html(html: str, *, div_class: str | None = None) -> None:
    """Add HTML as it is: only your own, never what a model wrote."""
    _add(_classed(Node(RAW, children=[html]), div_class))


def log_formatter(formatter: Formatter) -> None:
    """Add an object that knows how it is shown."""
    place = _place.get()
    if place is not None:
        place.trace.add_style(formatter.get_css())
        place.node.children.append(
            Node(RAW, children=[formatter.to_html()], data=formatter.to_data())
        )


def details(text: str, *, summary: str = "Details", pre: bool = True) -> None:
    """Add a text that is folded; `pre` keeps its lines and spaces."""
    body = Node("pre" if pre else "p", children=[str(text)])
    _add(Node("details", children=[Node("summary", children=[summary]), body]))


def header(text: str, *, level: int | None = None) -> None:
    """Add a header; `level` 1 to 6, else as deep as the section it stands in."""
    place = _place.get()
    if place is not None:
        place.node.children.append(_header_node(text, place.level if level is None else level))


def table(obj: Any, *, caption: str | None = None) -> None:
    """Add a table.

    Args:
        obj: A data frame, a list of dicts (columns in the order they first appear), a list of
            rows, a dict of columns, or a dict of single values.
        caption: Above it.

    Raises:
        DataValidationError: for anything else.
    """
    if _place.get() is None:
        return
    if hasattr(obj, "columns") and hasattr(obj, "to_dict"):
        obj = obj.to_dict("records")
    if isinstance(obj, Mapping):
        is_columns = obj and all(_is_row(value) for value in obj.values())
        (table_from_dict_of_lists if is_columns else table_from_dict)(obj, caption=caption)
    elif _is_row(obj) and all(isinstance(row, Mapping) for row in obj):
        names = list(dict.fromkeys(name for row in obj for name in row))
        _add(_table_node(names, [[row.get(name, "") for name in names] for row in obj], caption))
    elif _is_row(obj) and all(_is_row(row) for row in obj):
        _add(_table_node([], [list(row) for row in obj], caption))
    else:
        raise DataValidationError(
            f"a {type(obj).__name__} is no table; give a list of dicts, a list of rows, a dict, or "
            "a data frame."
        )


def table_from_dict(
    data: Mapping[Any, Any],
    *,
    caption: str | None = None,
    key_header: str = "key",
    value_header: str = "value",
    sort_by: str | None = None,
) -> None:
    """Add a table of keys and values; `sort_by` is `key`, `value` or None.

    Raises:
        DataValidationError: for another `sort_by`.
    """
    if _place.get() is None:
        return
    if sort_by not in (None, "key", "value"):
        raise DataValidationError(f"sort_by={sort_by!r} is unknown; use key, value or None.")
    rows = [list(item) for item in data.items()]
    if sort_by is not None:
        rows.sort(key=lambda row: row[sort_by == "value"])
    _add(_table_node([key_header, value_header], rows, caption))


def table_from_dict_of_lists(
    columns: Mapping[str, Sequence[Any]],
    *,
    caption: str | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """Add a table of columns, all of one length; `order` chooses and orders them.

    Raises:
        DataValidationError: if lengths differ, or `order` names a column that is not there.
    """
    if _place.get() is None:
        return
    names = list(columns if order is None else order)
    missing = [name for name in names if name not in columns]
    lengths = {name: len(columns[name]) for name in names if name in columns}
    if missing or len(set(lengths.values())) > 1:
        raise DataValidationError(
            f"columns have the lengths {lengths} and lack {missing}; give lists of one length, and "
            "in order= only their names."
        )
    rows = [list(row) for row in zip(*(columns[name] for name in names), strict=True)]
    _add(_table_node(names, rows, caption))


# ---- files ----


def write_html_with_default_style(
    body_html: str,
    path: str | os.PathLike,
    *,
    title: str = "Trace",
    theme: Theme | None = None,
    lang: str = "en",
    extra_head: str | None = None,
) -> None:
    """Write a page around a body that is HTML already."""
    write_text(path, build_page(build_head(title, theme, "", extra_head), body_html, lang))


def write_trace_json(trace: Trace, path: str | os.PathLike) -> None:
    """Write a report as JSON: `title`, `started_at`, `path` and the tree under `root`."""
    write_text(path, json.dumps(trace.to_dict(), ensure_ascii=False, indent=1, default=str))


def jinja_context(trace: Trace, **extra: Any) -> dict[str, Any]:
    """What a template of one's own needs: `title`, `head_html`, `body_html`, `started_at`."""
    return {
        "title": trace.title,
        "head_html": trace.head_html(),
        "body_html": trace.body_html(wrap_body=False),
        "started_at": trace.started_at,
        **extra,
    }


def render_with_jinja(
    env: Any,
    template_name: str,
    *,
    context: dict[str, Any],
    write_to: str | os.PathLike | None = None,
) -> str:
    """Render a template of a Jinja environment, and write it if a file is given."""
    page = env.get_template(template_name).render(**context)
    if write_to is not None:
        write_text(write_to, page)
    return page


def current_trace() -> Trace | None:
    """The report that is written to here; None where logging does nothing."""
    place = _place.get()
    return None if place is None else place.trace


def flush_trace() -> bool:
    """Write the report so far; False if there is none, or it has no file."""
    place = _place.get()
    if place is None or place.trace.path is None:
        return False
    write_trace(place.trace)
    return True


# ---- inside ----


@contextmanager
def _at(place: _Place | None) -> Iterator[None]:
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def _inside(place: _Place, node: Node, *, deeper: bool = False) -> Iterator[None]:
    place.node.children.append(node)
    with _at(replace(place, node=node, level=place.level + deeper)):
        yield


def _in_section(func: F, title: str) -> F:
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def logged_async(*args: Any, **kwargs: Any) -> Any:
            with scope_header(title):
                return await func(*args, **kwargs)

        return logged_async  # pyright: ignore[reportReturnType]

    @functools.wraps(func)
    def logged(*args: Any, **kwargs: Any) -> Any:
        with scope_header(title):
            return func(*args, **kwargs)

    return logged  # pyright: ignore[reportReturnType]


def _add(node: Node) -> None:
    place = _place.get()
    if place is not None:
        place.node.children.append(node)


def _header_node(text: str, level: int) -> Node:
    return Node(f"h{min(max(level, 1), _MAX_LEVEL)}", children=[str(text)])


def _classed(node: Node, div_class: str | None) -> Node:
    return node if div_class is None else Node("div", {"class": div_class}, [node])


def _attributes(attrs: Mapping[str, Any]) -> dict[str, str]:
    """Python's names as HTML's: `class_` is `class`, `data_step` is `data-step`."""
    return {key.rstrip("_").replace("_", "-"): str(value) for key, value in attrs.items()}


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _table_node(names: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None) -> Node:
    lines = [_row_node("th", names)] if names else []
    lines += [_row_node("td", row) for row in rows]
    if caption:
        lines.insert(0, Node("caption", children=[caption]))
    data = {"type": "table", "columns": list(names), "rows": [list(row) for row in rows]}
    return Node("table", children=[*lines], data=data)


def _row_node(tag: str, cells: Sequence[Any]) -> Node:
    return Node("tr", children=[Node(tag, children=[str(cell)]) for cell in cells])


def _describe_exception(error: BaseException) -> Node:
    text = "".join(traceback.format_exception(error))
    heading = Node("h2", children=[f"Exception: {type(error).__name__}: {error}"])
    return Node("section", {"class": "lt-exception"}, [heading, Node("pre", children=[text])])


def write_trace(trace: Trace) -> None:
    """Write a report as a page, if it has a file."""
    if trace.path is not None:
        write_text(trace.path, trace.get_html())
