"""Jobs that wait for the engine thread: one lane per run or sampler, served in turn. No torch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

__all__ = ["AnyJob", "EngineFuture", "FairShare", "Job", "JobLanes", "fail", "resolve"]

T = TypeVar("T")
_AnyFuture: TypeAlias = Future[Any]


class EngineFuture(Future[T]):
    """The outcome of a job: `await` it in an event loop, or call `result()` in another thread.

    Cancelling it, or the task that awaits it, keeps a job from starting that has not started.
    """

    def __await__(self) -> Generator[object, None, T]:
        return asyncio.wrap_future(self).__await__()


@dataclass(eq=False)
class Job(Generic[T]):
    """One operation for the engine thread."""

    name: str
    """Name of the operation for logs, e.g. `optim_step`."""
    lane: str
    """Jobs of one lane run in the order in which they were added."""
    call: Callable[[], T | None]
    """Returns the result; None for a deferred job."""
    future: EngineFuture[T] = field(default_factory=EngineFuture)
    opens: str | None = None
    """Another lane whose later jobs wait for this one."""
    quick: bool = False
    """Whether it takes almost no time, so that it runs before longer jobs of other lanes."""
    deferred: bool = False
    """Whether `call` only starts the work; something else resolves the future later."""
    after: _AnyFuture | None = None
    """A job of another lane that this one waits for; `JobLanes` sets it."""

    @property
    def is_ready(self) -> bool:
        """Whether no job of another lane has to run first."""
        return self.after is None or self.after.done()


AnyJob: TypeAlias = Job[Any]


class JobLanes:
    """The lanes that have jobs, least recently served first. Callers hold a lock."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, deque[AnyJob]] = OrderedDict()
        self._opening: dict[str, _AnyFuture] = {}
        """Lane -> the job of another lane that opens it."""

    def __len__(self) -> int:
        """Number of waiting jobs."""
        return sum(len(lane) for lane in self._lanes.values())

    def add(self, job: AnyJob) -> None:
        """Put a job at the end of its lane."""
        self._opening = {lane: f for lane, f in self._opening.items() if not f.done()}
        job.after = self._opening.get(job.lane)
        if job.opens is not None:
            self._opening[job.opens] = job.future
        self._lanes.setdefault(job.lane, deque()).append(job)

    def has_ready(self, *, quick: bool | None = None) -> bool:
        """Return whether a job can run; with `quick`, whether a quick (or a longer) job can."""
        return self._find(quick) is not None

    def take(self, *, quick: bool | None = None) -> AnyJob | None:
        """Remove and return the next job that can run; its lane becomes the last in turn."""
        name = self._find(quick)
        if name is None:
            return None
        lane = self._lanes.pop(name)
        job = lane.popleft()
        if lane:
            self._lanes[name] = lane
        return job

    def clear(self) -> list[AnyJob]:
        """Remove and return all jobs."""
        jobs = [job for lane in self._lanes.values() for job in lane]
        self._lanes.clear()
        return jobs

    def _find(self, quick: bool | None) -> str | None:
        for name, lane in self._lanes.items():
            if lane[0].is_ready and (quick is None or lane[0].quick == quick):
                return name
        return None


class FairShare:
    """Divides time evenly between training and sampling while both have work."""

    def __init__(self) -> None:
        self._used = {"training": 0.0, "sampling": 0.0}

    def charge(self, kind: str, seconds: float, *, other_waits: bool) -> None:
        """Count time spent on one kind of work.

        Args:
            other_waits: whether the other kind had work meanwhile. If it had none, both count as
                even afterwards: idle time earns no credit.
        """
        self._used[kind] += seconds
        if not other_waits:
            highest = max(self._used.values())
            self._used = dict.fromkeys(self._used, highest)

    def sampling_is_due(self) -> bool:
        """Return whether sampling has had at most as much time as training."""
        return self._used["sampling"] <= self._used["training"]


def resolve(future: Future[T], value: T) -> None:
    """Set a future's result unless it is done or cancelled."""
    if _can_resolve(future):
        future.set_result(value)


def fail(future: _AnyFuture, error: BaseException) -> None:
    """Set a future's error unless it is done or cancelled."""
    if _can_resolve(future):
        future.set_exception(error)


def _can_resolve(future: _AnyFuture) -> bool:
    if future.done():
        return False
    return future.running() or future.set_running_or_notify_cancel()
