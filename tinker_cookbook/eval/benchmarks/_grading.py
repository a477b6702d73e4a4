"""Grade one reply, so that a grader that raises or hangs costs only that reply."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tinker_cookbook.eval.benchmarks._types import BenchmarkBuilder, BenchmarkConfig, Grade, Logs
from tinker_cookbook.exceptions import (
    ConfigurationError,
    EvalGradingError,
    SandboxError,
)

__all__ = ["GRADE_SECONDS", "grade_in_time"]

GRADE_SECONDS = 60.0
"""Time limit of the grading of one reply."""


async def grade_in_time(
    benchmark: BenchmarkBuilder,
    reply: str,
    logs: Logs,
    config: BenchmarkConfig,
    seconds: float = GRADE_SECONDS,
) -> Grade:
    """Return the grade of a reply, by `config.grade_fn` or by the benchmark.

    Raises:
        EvalGradingError: if the grader raises, takes too long, or returns something that is not
            a number; the message has the reason.
        SandboxError: if the sandbox itself fails.
    """
    try:
        async with asyncio.timeout(seconds):
            if config.grade_fn is None:
                return await benchmark.grade(reply, logs, config)
            grade_fn = config.grade_fn
            return Grade(float(await _in_thread(lambda: grade_fn(reply, dict(logs)))))
    except TimeoutError as error:
        raise EvalGradingError(f"no grade after {seconds:g} seconds") from error
    except (ConfigurationError, SandboxError):
        raise
    except Exception as error:
        raise EvalGradingError(f"the grader raised {type(error).__name__}: {error}") from error


async def _in_thread(work: Callable[[], float]) -> float:
    """Run a function in a thread that the end of the program does not wait for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[float] = loop.create_future()

    def settle(value: float | None, error: Exception | None) -> None:
        if future.done():  # the time was up
            return
        if error is not None:
            future.set_exception(error)
        elif value is not None:
            future.set_result(value)
        else:
            future.set_exception(TypeError("it returned None instead of a number"))

    def run() -> None:
        value, problem = None, None
        try:
            value = work()
        except Exception as error:
            problem = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=run, daemon=True).start()
    return await future
