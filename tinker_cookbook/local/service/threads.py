"""Threads beside the event loop, a few for each kind of work, so that no kind waits for another.

What takes long or waits for a lock runs here: a request of many megabytes is read, a text is cut
into tokens, the index waits for its write lock. With one pool for all of it, six writes that wait
for another program would keep the list of checkpoints from being read.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["READING", "STORING", "TEXTS", "Lane"]

T = TypeVar("T")


class Lane:
    """A few threads, started when they are first needed."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a call on one of the threads; its log lines keep the request's id."""
        call = functools.partial(
            contextvars.copy_context().run, functools.partial(function, *args, **kwargs)
        )
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


READING = Lane("reading", 2)
"""Bodies of requests: at most so many large ones are in memory twice."""
TEXTS = Lane("texts", 2)
"""Texts to tokens and tokens to texts."""
STORING = Lane("storing", 4)
"""Whatever writes to the index or the checkpoints."""
