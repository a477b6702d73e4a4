"""Thread pools for slow work, one per kind of work, so that no kind waits for another.

The event loop must not wait for locks or long computations: parsing a request of many megabytes,
encoding a text into tokens, waiting for the write lock of the index. With one pool for all of
these, six writes that wait for another program would block the list of checkpoints.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["READING", "STORING", "TEXTS", "Lane"]

T = TypeVar("T")
P = ParamSpec("P")


class Lane:
    """A small thread pool. Its threads start when they are first needed."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on one of the threads. Its log lines keep the id of the request."""
        context = contextvars.copy_context()
        call = functools.partial(context.run, functools.partial(function, *args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


READING = Lane("reading", 2)
"""Parsing of request bodies. Only two threads, because parsing a large body takes much memory."""
TEXTS = Lane("texts", 2)
"""Conversion between texts and tokens."""
STORING = Lane("storing", 4)
"""Writes to the index and the checkpoints."""
