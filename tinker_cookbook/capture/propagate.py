"""Make the scope of `capture` follow the code into threads that the program starts."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tinker_cookbook.capture.scope import current_scope, replace_scope

__all__ = ["instrument_threads", "threads_instrumented", "uninstrument_threads"]

_lock = threading.Lock()
_originals: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def instrument_threads() -> None:
    """Give new threads, and functions submitted to thread pools, the scope of their starter.

    It replaces `threading.Thread.start` and `ThreadPoolExecutor.submit` until
    `uninstrument_threads`. A second call changes nothing.
    """
    global _originals
    with _lock:
        if _originals is not None:
            return
        start, submit = threading.Thread.start, ThreadPoolExecutor.submit
        _originals = (start, submit)

        def start_in_scope(thread: threading.Thread) -> None:
            scope, run = current_scope(), thread.run

            def run_in_scope() -> None:
                with replace_scope(scope):
                    run()

            if scope:
                thread.run = run_in_scope
            start(thread)

        def submit_in_scope(
            pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
        ) -> Future[Any]:
            context = contextvars.copy_context()
            return submit(pool, context.run, function, *args, **kwargs)

        threading.Thread.start = start_in_scope
        ThreadPoolExecutor.submit = submit_in_scope


def threads_instrumented() -> bool:
    """Return whether `instrument_threads` is in force."""
    return _originals is not None


def uninstrument_threads() -> None:
    """Undo `instrument_threads`."""
    global _originals
    with _lock:
        if _originals is not None:
            threading.Thread.start, ThreadPoolExecutor.submit = _originals
            _originals = None
