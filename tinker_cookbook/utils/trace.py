"""The time that each part of a step takes.

`trace_iteration` opens a window for one step; every `scope`, `scope_span` and `scope_span_sync`
inside it adds its span. `trace_init` also writes every span to a file that Perfetto
(https://ui.perfetto.dev) can display. Without both, a span has almost no cost.
"""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tinker_cookbook.utils.disk_errors import optional_file
from tinker_cookbook.utils.jsonl_log import append_row

__all__ = [
    "IterationWindow",
    "ScopeContext",
    "SpanRecord",
    "TraceCollector",
    "current_step",
    "get_scope_context",
    "save_gantt_chart_html",
    "scope",
    "scope_span",
    "scope_span_sync",
    "trace_context",
    "trace_init",
    "trace_iteration",
    "trace_shutdown",
    "update_scope_context",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class SpanRecord:
    """One timed piece of work; times are seconds of `time.perf_counter`."""

    name: str
    start_time: float
    end_time: float
    wall_start: float
    """Seconds since the epoch."""
    wall_end: float


class IterationWindow:
    """The spans of one step."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spans: list[SpanRecord] = []
        self._lock = threading.Lock()

    def record_span(self, name: str, start_time: float, end_time: float) -> None:
        """Add a span given by two readings of `time.perf_counter`."""
        offset = time.time() - time.perf_counter()
        span = SpanRecord(name, start_time, end_time, start_time + offset, end_time + offset)
        self.merge_spans([span])

    def merge_spans(self, spans: Sequence[SpanRecord]) -> None:
        """Add spans that were recorded elsewhere."""
        with self._lock:
            self._spans.extend(spans)

    def aggregate(self) -> dict[str, float]:
        """Return the total seconds by span name."""
        totals: dict[str, float] = {}
        with self._lock:
            for span in self._spans:
                totals[span.name] = totals.get(span.name, 0.0) + span.end_time - span.start_time
        return totals

    def get_timing_metrics(self) -> dict[str, float]:
        """Return `time/<name>` of every span, and `time/total` since the window was opened."""
        metrics = {f"time/{name}": seconds for name, seconds in self.aggregate().items()}
        return metrics | {"time/total": time.perf_counter() - self._started}

    def get_span_dicts(self) -> list[dict[str, Any]]:
        """Return the spans as JSON objects, in the order in which they ended."""
        with self._lock:
            return [
                {
                    "name": span.name,
                    "wall_start": span.wall_start,
                    "duration_seconds": span.end_time - span.start_time,
                }
                for span in self._spans
            ]

    def write_spans_jsonl(self, path: Path | str, step: int) -> None:
        """Append `{"step", "spans"}` to a file; if that fails, log one warning."""
        with optional_file(path):
            append_row(Path(path), {"step": step, "spans": self.get_span_dicts()})


class TraceCollector:
    """Writes spans as Chrome trace events: one JSON object per line, times in microseconds."""

    def __init__(
        self, flush_interval_sec: float = 1.0, output_file: str = "trace_events.jsonl"
    ) -> None:
        self._file = Path(output_file).open("a", encoding="utf-8")  # noqa: SIM115
        self._flush_interval = flush_interval_sec
        self._last_flush = time.perf_counter()
        self._lock = threading.Lock()

    def add_span(
        self,
        name: str,
        start_time: float,
        end_time: float,
        attributes: Mapping[str, object] | None = None,
    ) -> None:
        """Add a span given by two readings of `time.perf_counter`, with its attributes."""
        event: dict[str, object] = {
            "name": name,
            "ph": "X",
            "ts": start_time * 1e6,
            "dur": (end_time - start_time) * 1e6,
            "pid": os.getpid(),
            "tid": threading.get_ident(),
        }
        if attributes:
            event["args"] = dict(attributes)
        with self._lock, optional_file(self._file.name):
            self._file.write(json.dumps(event, default=str) + "\n")
            if end_time - self._last_flush >= self._flush_interval:
                self._file.flush()
                self._last_flush = end_time

    def shutdown(self) -> None:
        """Write the remaining events and close the file."""
        with self._lock, optional_file(self._file.name):
            self._file.close()


_collector: TraceCollector | None = None


def trace_init(flush_interval_sec: float = 1.0, output_file: str = "trace_events.jsonl") -> None:
    """Write every span of this process to a file from now on."""
    global _collector
    trace_shutdown()
    with optional_file(output_file):
        _collector = TraceCollector(flush_interval_sec, output_file)


def trace_shutdown() -> None:
    """Stop what `trace_init` started."""
    global _collector
    if _collector is not None:
        _collector.shutdown()
    _collector = None


def save_gantt_chart_html(window: IterationWindow, step: int, path: Path | str) -> None:
    """Draw the spans of a step as bars over time, in a self-contained HTML file."""
    spans = window.get_span_dicts()
    start = min((span["wall_start"] for span in spans), default=0.0)
    end = max((span["wall_start"] + span["duration_seconds"] for span in spans), default=1.0)
    scale = 100 / max(end - start, 1e-9)
    rows = "\n".join(
        _GANTT_ROW.format(
            label=html.escape(f"{span['name']} {span['duration_seconds']:.3f} s"),
            left=(span["wall_start"] - start) * scale,
            width=max(span["duration_seconds"] * scale, 0.1),
        )
        for span in spans
    )
    with optional_file(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(_GANTT_PAGE.format(step=step, rows=rows), encoding="utf-8")


_GANTT_ROW = (
    '<div class="row"><span>{label}</span><i style="left:{left:.3f}%;width:{width:.3f}%"></i></div>'
)
_GANTT_PAGE = """<!doctype html><meta charset="utf-8"><title>Step {step}</title>
<style>
body{{font:13px sans-serif}}
.row{{position:relative;height:22px;background:#f4f4f4;margin:2px}}
.row span{{position:relative;z-index:1;padding:3px}}
.row i{{position:absolute;top:0;bottom:0;background:#8ab4d8}}
</style>
<h1>Step {step}</h1>
{rows}
"""


@dataclass
class ScopeContext:
    """Attributes of a span, in addition to its name: `args` in the trace file."""

    attributes: dict[str, object] = field(default_factory=dict)


trace_context: ContextVar[ScopeContext | None] = ContextVar("trace_context", default=None)
"""Context of the innermost open span; None if nothing is traced."""


def get_scope_context() -> ScopeContext:
    """Return the context of the innermost open span; outside a span, an unused empty one."""
    return trace_context.get() or ScopeContext()


def update_scope_context(values: Mapping[str, object]) -> None:
    """Attach attributes to the innermost open span, if there is one."""
    get_scope_context().attributes.update(values)


_window: ContextVar[IterationWindow | None] = ContextVar("iteration_window", default=None)
_step: ContextVar[int | None] = ContextVar("iteration_step", default=None)


def current_step() -> int | None:
    """Return the step that `trace_iteration` is in; None outside of a step."""
    return _step.get()


@contextlib.contextmanager
def trace_iteration(
    step: int, *, window: IterationWindow | None = None
) -> Iterator[IterationWindow]:
    """Collect the spans of a step; pass a window again to add more spans to it."""
    current = window or IterationWindow()
    window_token, step_token = _window.set(current), _step.set(step)
    try:
        yield current
    finally:
        _step.reset(step_token)
        _window.reset(window_token)


@contextlib.contextmanager
def scope_span_sync(name: str) -> Iterator[None]:
    """Time a block of code."""
    window, collector = _window.get(), _collector
    if window is None and collector is None:
        yield
        return
    context = ScopeContext()
    token = trace_context.set(context)
    started = time.perf_counter()
    try:
        yield
    finally:
        ended = time.perf_counter()
        trace_context.reset(token)
        if window is not None:
            window.record_span(name, started, ended)
        if collector is not None:
            collector.add_span(name, started, ended, context.attributes)


@contextlib.asynccontextmanager
async def scope_span(name: str) -> AsyncIterator[None]:
    """Time a block of asynchronous code."""
    with scope_span_sync(name):
        yield


def scope(func: F) -> F:
    """Time every call of a function, synchronous or asynchronous, under the function's name."""
    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def traced_async(*args: Any, **kwargs: Any) -> Any:
            with scope_span_sync(func.__name__):
                return await func(*args, **kwargs)

        return traced_async  # pyright: ignore[reportReturnType]

    @functools.wraps(func)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with scope_span_sync(func.__name__):
            return func(*args, **kwargs)

    return traced  # pyright: ignore[reportReturnType]
