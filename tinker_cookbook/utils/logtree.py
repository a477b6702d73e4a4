"""A report that code writes as it runs: nested sections, texts and tables, as one HTML page.

    with logtree.init_trace("Step 3", path="step_3.html"):
        with logtree.scope_header("Question 1"):
            logtree.log_text("What is 2 + 2?")

Without a trace, and under `scope_disable`, every call returns at once, so environments can log
unconditionally. Every asyncio task has its own position in the report; a thread of
`asyncio.to_thread` continues at the position of its caller.
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
from typing import (
    TYPE_CHECKING,
    Any,
    ParamSpec,
    Protocol,
    TypeGuard,
    TypeVar,
    overload,
    runtime_checkable,
)

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

if TYPE_CHECKING:
    import jinja2

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

P = ParamSpec("P")
R = TypeVar("R")

_MAX_LEVEL = 6


class Formatter(Protocol):
    """An object that can be shown in a report."""

    def to_html(self) -> str:
        """Return the element."""
        ...

    def get_css(self) -> str:
        """Return its style sheet; equal style sheets are written once."""
        ...

    def to_data(self) -> dict[str, object] | None:
        """Return the content as JSON, or None."""
        ...


@runtime_checkable
class _DataFrame(Protocol):
    """A data frame of pandas or of a library like it."""

    columns: Sequence[object]

    def to_dict(self, orient: str) -> list[dict[str, object]]:
        """Return the rows, for the orient `records`."""
        ...


@dataclass(frozen=True)
class _Position:
    """Position at which the next element is added."""

    trace: Trace
    node: Node
    level: int
    """Level of the next header: 2 under the title."""


_position: ContextVar[_Position | None] = ContextVar("logtree_position", default=None)


# ---- reports and sections ----


@contextmanager
def init_trace(
    title: str, path: str | os.PathLike | None = None, *, write_on_error: bool = True
) -> Iterator[Trace]:
    """Start a report.

    Args:
        title: Heading of the report.
        path: File to write at the end; None to write none.
        write_on_error: Write the report, with the exception at its end, when the block raises.
    """
    trace = Trace(title, path, write_on_error)
    try:
        with _at(_Position(trace, trace.root, 2)):
            yield trace
    except BaseException as error:
        trace.root.children.append(_describe_exception(error))
        if write_on_error:
            write_trace(trace)
        raise
    write_trace(trace)


@contextmanager
def scope_header(title: str, **attrs: object) -> Iterator[None]:
    """Open a section with a header one level below the header of the enclosing section.

    Args:
        title: Text of the header.
        attrs: HTML attributes of the section: `class_="wide"`, `data_step=3`.
    """
    position = _position.get()
    if position is None:
        yield
        return
    section = Node("section", _attributes(attrs), [_header_node(title, position.level)])
    with _inside(position, section, deeper=True):
        yield


@overload
def scope_header_decorator(title: str) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
@overload
def scope_header_decorator(title: Callable[P, R]) -> Callable[P, R]: ...
def scope_header_decorator(
    title: str | Callable[P, R],
) -> Callable[P, R] | Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function, async or not, so that each call logs into its own section.

    Args:
        title: Title of the sections; without one the name of the function is used.
    """
    if not isinstance(title, str):
        return _in_section(title, title.__name__)
    return lambda func: _in_section(func, title)


@contextmanager
def scope_div(**attrs: object) -> Iterator[None]:
    """Open a `div`; it does not change the level of headers."""
    position = _position.get()
    if position is None:
        yield
        return
    with _inside(position, Node("div", _attributes(attrs))):
        yield


@contextmanager
def scope_details(summary: str) -> Iterator[None]:
    """Open a part that is collapsed until the reader opens it."""
    position = _position.get()
    if position is None:
        yield
        return
    with _inside(position, Node("details", children=[Node("summary", children=[summary])])):
        yield


@contextmanager
def scope_disable() -> Iterator[None]:
    """Drop everything that is logged inside the block."""
    with _at(None):
        yield


@contextmanager
def optional_enable_logging(enable: bool) -> Iterator[None]:
    """Drop everything that is logged inside the block, unless `enable` is true."""
    with _at(_position.get() if enable else None):
        yield


# ---- what is logged ----


def log_text(text: str, *, div_class: str | None = None) -> None:
    """Add a paragraph, inside a `div` of the class `div_class` if one is given."""
    _add(_classed(Node("p", children=[str(text)]), div_class))


def log_html(html: str, *, div_class: str | None = None) -> None:
    """Add HTML without escaping it. Never pass text that a model wrote."""
    _add(_classed(Node(RAW, children=[html]), div_class))


def log_formatter(formatter: Formatter) -> None:
    """Add an object that can be shown in a report."""
    position = _position.get()
    if position is not None:
        position.trace.add_style(formatter.get_css())
        position.node.children.append(
            Node(RAW, children=[formatter.to_html()], data=formatter.to_data())
        )


def details(text: str, *, summary: str = "Details", pre: bool = True) -> None:
    """Add a collapsed text; `pre` keeps its line breaks and spaces."""
    body = Node("pre" if pre else "p", children=[str(text)])
    _add(Node("details", children=[Node("summary", children=[summary]), body]))


def header(text: str, *, level: int | None = None) -> None:
    """Add a header of `level` 1 to 6; by default the level of the current section."""
    position = _position.get()
    if position is not None:
        position.node.children.append(
            _header_node(text, position.level if level is None else level)
        )


def table(obj: object, *, caption: str | None = None) -> None:
    """Add a table.

    Args:
        obj: A data frame, a list of dicts (columns in the order they first appear), a list of
            rows, a dict of columns, or a dict of single values.
        caption: Text above the table.

    Raises:
        DataValidationError: if `obj` is anything else.
    """
    if _position.get() is None:
        return
    if isinstance(obj, _DataFrame):
        obj = obj.to_dict("records")
    if isinstance(obj, Mapping):
        is_columns = obj and all(_is_row(value) for value in obj.values())
        (table_from_dict_of_lists if is_columns else table_from_dict)(obj, caption=caption)
        return
    rows = list(obj) if _is_row(obj) else [obj]
    records = [row for row in rows if isinstance(row, Mapping)]
    if len(records) == len(rows):
        names = list(dict.fromkeys(name for row in records for name in row))
        cells = [[row.get(name, "") for name in names] for row in records]
        _add(_table_node(names, cells, caption))
    elif all(_is_row(row) for row in rows):
        _add(_table_node([], [list(row) for row in rows if _is_row(row)], caption))
    else:
        raise DataValidationError(
            f"obj={obj!r:.40} is not a table; give a list of dicts, a list of rows, a dict or a "
            "data frame."
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
        DataValidationError: if `sort_by` is anything else.
    """
    if _position.get() is None:
        return
    if sort_by not in (None, "key", "value"):
        raise DataValidationError(f"sort_by={sort_by!r} is unknown; use key, value or None.")
    rows = [list(item) for item in data.items()]
    if sort_by is not None:
        rows.sort(key=lambda row: row[sort_by == "value"])
    _add(_table_node([key_header, value_header], rows, caption))


def table_from_dict_of_lists(
    columns: Mapping[str, Sequence[object]],
    *,
    caption: str | None = None,
    order: Sequence[str] | None = None,
) -> None:
    """Add a table of columns of equal length; `order` selects and orders them.

    Raises:
        DataValidationError: if lengths differ, or `order` names a missing column.
    """
    if _position.get() is None:
        return
    names = list(columns if order is None else order)
    missing = [name for name in names if name not in columns]
    lengths = {name: len(columns[name]) for name in names if name in columns}
    if missing or len(set(lengths.values())) > 1:
        raise DataValidationError(
            f"columns have the lengths {lengths}, and {missing} are missing; give lists of equal "
            "length, and only their names in order=."
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
    """Write a page around a body that is already HTML."""
    write_text(path, build_page(build_head(title, theme, "", extra_head), body_html, lang))


def write_trace_json(trace: Trace, path: str | os.PathLike) -> None:
    """Write a report as JSON with `title`, `started_at`, `path` and the tree under `root`."""
    write_text(path, json.dumps(trace.to_dict(), ensure_ascii=False, indent=1, default=str))


def jinja_context(trace: Trace, **extra: object) -> dict[str, object]:
    """Return what a custom page template needs: title, head, body and start time."""
    return {
        "title": trace.title,
        "head_html": trace.head_html(),
        "body_html": trace.body_html(wrap_body=False),
        "started_at": trace.started_at,
        **extra,
    }


def render_with_jinja(
    env: jinja2.Environment,
    template_name: str,
    *,
    context: dict[str, object],
    write_to: str | os.PathLike | None = None,
) -> str:
    """Render a template of a Jinja environment, and write the page if a file is given."""
    page = env.get_template(template_name).render(**context)
    if write_to is not None:
        write_text(write_to, page)
    return page


def current_trace() -> Trace | None:
    """Return the current report, or None if logging does nothing here."""
    position = _position.get()
    return None if position is None else position.trace


def flush_trace() -> bool:
    """Write the report so far; return whether there was a report with a file to write."""
    position = _position.get()
    if position is None or position.trace.path is None:
        return False
    write_trace(position.trace)
    return True


# ---- inside ----


@contextmanager
def _at(position: _Position | None) -> Iterator[None]:
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


@contextmanager
def _inside(position: _Position, node: Node, *, deeper: bool = False) -> Iterator[None]:
    position.node.children.append(node)
    with _at(replace(position, node=node, level=position.level + deeper)):
        yield


def _in_section(func: Callable[P, R], title: str) -> Callable[P, R]:
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def logged_async(*args: P.args, **kwargs: P.kwargs) -> object:
            with scope_header(title):
                return await func(*args, **kwargs)

        return logged_async  # pyright: ignore[reportReturnType]

    @functools.wraps(func)
    def logged(*args: P.args, **kwargs: P.kwargs) -> R:
        with scope_header(title):
            return func(*args, **kwargs)

    return logged


def _add(node: Node) -> None:
    position = _position.get()
    if position is not None:
        position.node.children.append(node)


def _header_node(text: str, level: int) -> Node:
    return Node(f"h{min(max(level, 1), _MAX_LEVEL)}", children=[str(text)])


def _classed(node: Node, div_class: str | None) -> Node:
    return node if div_class is None else Node("div", {"class": div_class}, [node])


def _attributes(attrs: Mapping[str, object]) -> dict[str, str]:
    """Return HTML attributes: `class_` becomes `class`, `data_step` becomes `data-step`."""
    return {key.rstrip("_").replace("_", "-"): str(value) for key, value in attrs.items()}


def _is_row(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _table_node(
    names: Sequence[str], rows: Sequence[Sequence[object]], caption: str | None
) -> Node:
    lines = [_row_node("th", names)] if names else []
    lines += [_row_node("td", row) for row in rows]
    if caption:
        lines.insert(0, Node("caption", children=[caption]))
    data = {"type": "table", "columns": list(names), "rows": [list(row) for row in rows]}
    return Node("table", children=[*lines], data=data)


def _row_node(tag: str, cells: Sequence[object]) -> Node:
    return Node("tr", children=[Node(tag, children=[str(cell)]) for cell in cells])


def _describe_exception(error: BaseException) -> Node:
    text = "".join(traceback.format_exception(error))
    heading = Node("h2", children=[f"Exception: {type(error).__name__}: {error}"])
    return Node("section", {"class": "lt-exception"}, [heading, Node("pre", children=[text])])


def write_trace(trace: Trace) -> None:
    """Write a report as a page, if it has a file."""
    if trace.path is not None:
        write_text(trace.path, trace.get_html())
