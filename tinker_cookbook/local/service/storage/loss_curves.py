"""Curves of training runs for the dashboard: one point per optimizer step, and the run's origin.

Points are kept in memory and appended to `curves/` in the state folder, periodically and with every
checkpoint. The curves of finished runs are therefore available after a restart, and a resumed run
can be shown together with its first part. The curves are only for display: a crash may lose the
last seconds, and not every step of a very long run is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from tinker_cookbook.local.engine.types import TrainDatum, TrainResult
from tinker_cookbook.local.service.storage.batch_sums import BatchSums
from tinker_cookbook.local.service.storage.rows import CheckpointRow
from tinker_cookbook.local.service.storage.run_facts import FactsFiles, Origin, RunFacts
from tinker_cookbook.utils.durable_files import write_atomically

__all__ = ["COLUMNS", "Point", "ProgressLog", "losses_agree"]

logger = logging.getLogger(__name__)

KINDS = ("jsonl", "json")
"""Extensions of a run's files: its points and its facts."""
MAX_POINTS_SENT = 2000
MAX_POINTS_SAVED = 20_000
"""Maximum number of points of one run. Beyond it, every second point is removed."""


SavedPoint = list[Any]
"""The values of `COLUMNS` of a point. Step and time are numbers, the others may also be None."""
COLUMNS = ("step", "loss", "tokens", "time", "negative_logprob", "divergence")
"""Columns of a point, as it is saved and sent. Older versions saved only the first four."""
MIN_COLUMNS = 4
MAX_PARTS = 200
"""Maximum number of parts of a resumed run that are joined to one curve."""


@dataclass(frozen=True)
class Point:
    """One optimizer step."""

    step: int
    """Number of the step within the run, from 1."""
    sums: BatchSums
    """Sums over the batches since the last step."""
    time: float


@dataclass
class _RunProgress:
    sums: BatchSums = field(default_factory=BatchSums)
    facts: RunFacts = field(default_factory=RunFacts)
    has_new_facts: bool = False
    num_saved: int = 0
    stride: int = 1
    """Steps between two saved points."""
    unsaved: list[Point] | None = None


class ProgressLog:
    """The curves of all runs. Use it on the event loop's thread, except for the methods that wait
    for the disk (`save`, `curve`, `facts`, `origin_in`), which run on other threads."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "curves"
        self._runs: dict[str, _RunProgress] = {}
        self._files = FactsFiles()
        self._saving = threading.Lock()
        """Held while points move from memory to the file, which may take long."""
        self._adding = threading.Lock()
        """Held only for a moment, because the event loop waits for it."""
        self.num_trained_tokens = 0
        self.num_steps = 0

    def add_batch(
        self,
        run_id: str,
        data: Sequence[TrainDatum],
        result: TrainResult,
        loss_fn: str = "cross_entropy",
    ) -> None:
        """Add a forward_backward."""
        run = self._run(run_id)
        sums = run.sums
        before = sums.num_tokens
        sums.num_batches += 1
        sums.loss += result.metrics.get("loss:sum", 0.0)
        for index, datum in enumerate(data):
            is_known = len(result.logprobs) == len(data)
            sums.add(datum, result.logprobs[index] if is_known else None)
        self.num_trained_tokens += sums.num_tokens - before
        with self._adding:
            run.facts.loss_fn = "custom" if sums.is_linear else loss_fn

    def add_step(self, run_id: str) -> None:
        """Add an optimizer step. It gives a point if there was a batch before it."""
        self.num_steps += 1
        run = self._run(run_id)
        with self._adding:
            run.facts.num_steps += 1
            run.has_new_facts = True
            if run.sums.num_batches:
                point = Point(run.facts.num_steps, run.sums, time.time())
                run.unsaved = [*(run.unsaved or []), point]
        run.sums = BatchSums()

    def mark_saved(self, run_id: str, checkpoint: str) -> None:
        """Record the step at which a checkpoint, `SEGMENT/NAME`, was saved."""
        run = self._run(run_id)
        with self._adding:
            run.facts.mark(checkpoint)
            run.has_new_facts = True

    def begin_from(self, run_id: str, origin: Origin) -> None:
        """Record the checkpoint that a run began from. Later loads have no effect."""
        run = self._run(run_id)
        with self._adding:
            if not run.facts.num_steps:
                run.facts.origin = origin
                run.has_new_facts = True

    def origin_in(self, checkpoint: CheckpointRow, *, is_resumed: bool) -> Origin:
        """Return a checkpoint as the origin of a run."""
        facts = self.facts(checkpoint.run_id)
        step = facts.marks.get(f"{checkpoint.segment}/{checkpoint.name}")
        if step is None:  # saved by an older version
            points = self._saved(checkpoint.run_id)
            step = max((p[0] for p in points if p[3] <= checkpoint.created_at), default=0)
        return Origin(
            checkpoint.tinker_path, checkpoint.run_id, facts.first_step + step, is_resumed
        )

    def facts(self, run_id: str) -> RunFacts:
        """Return the facts of a run, whether in memory or saved; empty facts for an unknown run."""
        with self._adding:
            run = self._runs.get(run_id)
            if run is not None:
                return replace(run.facts, marks=dict(run.facts.marks))
        return self._files.read(self._path(run_id, "json")) or RunFacts()

    def _run(self, run_id: str) -> _RunProgress:
        return self._runs.setdefault(run_id, _RunProgress())

    def drop(self, run_id: str) -> None:
        """Remove a run from memory. Call `save` first; saved points stay."""
        self._runs.pop(run_id, None)

    def save(self) -> None:
        """Append new points to the files, and write changed facts."""
        for run_id, run in list(self._runs.items()):
            with self._saving:
                with self._adding:
                    points, run.unsaved = run.unsaved, None
                    facts = replace(run.facts, marks=dict(run.facts.marks))
                    has_new_facts, run.has_new_facts = run.has_new_facts, False
                try:
                    if points:
                        self._append(run_id, run, points)
                    if has_new_facts:
                        self._folder.mkdir(exist_ok=True)
                        self._files.write(self._path(run_id, "json"), facts)
                except OSError as error:
                    logger.warning("the loss curve of %s could not be saved: %s", run_id, error)

    def _append(self, run_id: str, run: _RunProgress, points: Sequence[Point]) -> None:
        kept = [_as_list(point) for point in points if point.step % run.stride == 0]
        self._folder.mkdir(exist_ok=True)
        with self._path(run_id).open("a", encoding="utf-8") as file:
            file.write(_as_lines(kept))
        run.num_saved += len(kept)
        if run.num_saved > MAX_POINTS_SAVED:
            run.stride *= 2
            run.num_saved = self._thin_out(run_id, run.stride)

    def _thin_out(self, run_id: str, stride: int) -> int:
        """Keep only the saved points of every `stride`th step; returns their number."""
        path = self._path(run_id)
        kept = [point for point in self._saved(run_id) if point[0] % stride == 0]
        write_atomically(path, _as_lines(kept))
        return len(kept)

    def remove_unknown(self, known_ids: Callable[[], Iterable[str]]) -> None:
        """Remove the curves of runs that no longer exist."""
        found = [path for kind in KINDS for path in self._folder.glob(f"*.{kind}")]
        # after the listing, because a run is known before its curve begins
        known = {self._path(run_id).stem for run_id in known_ids()}
        for path in found:
            if path.stem not in known:
                with contextlib.suppress(OSError):  # a folder that has become read-only
                    path.unlink(missing_ok=True)

    def curve(self, run_id: str) -> list[list[float | None]]:
        """Return the points of a run and of the earlier parts that it continues.

        If there are too many points, only some are returned.

        Returns:
            For each point, a list with the values of `COLUMNS`. Steps are counted from the start
            of the first part.
        """
        points: list[list[float | None]] = []
        seen: set[str] = set()
        last, loss_fn = math.inf, None
        while run_id not in seen and len(seen) < MAX_PARTS:
            seen.add(run_id)
            facts = self.facts(run_id)
            if not losses_agree(loss_fn, facts.loss_fn):
                break
            loss_fn = loss_fn or facts.loss_fn
            own = [[facts.first_step + p[0], *p[1:]] for p in self._own_points(run_id)]
            points = [point for point in own if point[0] <= last] + points
            if not facts.first_step or facts.origin is None:
                break
            run_id, last = facts.origin.run_id, facts.first_step
        stride = -(-len(points) // MAX_POINTS_SENT) or 1
        return points[::-stride][::-1]  # always includes the newest

    def _own_points(self, run_id: str) -> list[SavedPoint]:
        with self._saving:
            points = self._saved(run_id)
            run = self._runs.get(run_id)
            unsaved = run.unsaved if run is not None else None
            points += [_as_list(point) for point in unsaved or []]
        return [[*point, *[None] * (len(COLUMNS) - len(point))] for point in points]

    def _saved(self, run_id: str) -> list[SavedPoint]:
        points: list[object] = []
        # the file may not exist yet, and a crash may have cut its last line short
        with contextlib.suppress(OSError, ValueError, RecursionError):
            for line in self._path(run_id).read_text(encoding="utf-8").splitlines():
                points.append(json.loads(line, parse_constant=lambda _: None))
        return [point for point in points if _is_point(point)]

    def _path(self, run_id: str, kind: str = "jsonl") -> Path:
        """Return the path of a run's file. A client's text does not become a file name."""
        return self._folder / f"{hashlib.sha256(run_id.encode()).hexdigest()[:32]}.{kind}"


def losses_agree(first: str | None, second: str | None) -> bool:
    """Return whether curves of these losses can be joined; None: nothing was trained yet."""
    return first is None or second is None or first == second


def _is_point(values: object) -> TypeGuard[SavedPoint]:
    """Return whether a saved line has the columns that every version writes."""
    if not isinstance(values, list) or not MIN_COLUMNS <= len(values) <= len(COLUMNS):
        return False
    is_number = [isinstance(value, int | float) for value in values]
    return (
        is_number[0]
        and is_number[3]
        and all(known or value is None for known, value in zip(is_number, values, strict=True))
    )


def _as_lines(points: Sequence[SavedPoint]) -> str:
    return "".join(json.dumps(point) + "\n" for point in points)


def _as_list(point: Point) -> SavedPoint:
    sums = point.sums
    return [
        point.step,
        sums.mean_loss,
        sums.num_tokens,
        point.time,
        sums.mean_negative_logprob,
        sums.divergence,
    ]
