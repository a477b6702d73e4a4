"""How each run develops, one point an optimizer step, and where it began, for the dashboard.

Points are kept in memory and appended to `curves/` in the state folder now and then, and with every
checkpoint, so that the curves of finished runs can be looked at after a restart, and a resumed run
joined with its first part. They are for the eye: a crash may lose the last seconds of them, and of
a very long run not every step is kept.
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
from typing import Any

from tinker_cookbook.local.engine.types import TrainDatum, TrainResult
from tinker_cookbook.local.service.batch_sums import BatchSums
from tinker_cookbook.local.service.index import CheckpointRow
from tinker_cookbook.local.service.run_facts import FactsFiles, Origin, RunFacts

__all__ = ["COLUMNS", "Point", "ProgressLog", "losses_agree"]

logger = logging.getLogger(__name__)

KINDS = ("jsonl", "json")
"""Endings of a run's files: its points, its facts."""
MAX_POINTS_SENT = 2000
MAX_POINTS_SAVED = 20_000
"""Of one run; beyond it every second one of them goes."""


COLUMNS = ("step", "loss", "tokens", "time", "negative_logprob", "divergence")
"""Of a point, as it is saved and sent; points of older versions have the first four."""
MIN_COLUMNS = 4
MAX_PARTS = 200
"""Parts of a run that are joined to one curve."""


@dataclass(frozen=True)
class Point:
    """One optimizer step."""

    step: int
    """Counted from 1 within a run."""
    sums: BatchSums
    """Of the batches since the last step."""
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
    """Used on the event loop's thread; what waits for the disk (`save`, `curve`, `facts`,
    `origin_in`) on others."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "curves"
        self._runs: dict[str, _RunProgress] = {}
        self._files = FactsFiles()
        self._saving = threading.Lock()
        """A point is in memory or in the file for whoever holds this, which may take long."""
        self._adding = threading.Lock()
        """Held for a moment only: the event loop takes it."""
        self.num_trained_tokens = 0
        self.num_steps = 0

    def add_batch(
        self,
        run_id: str,
        data: Sequence[TrainDatum],
        result: TrainResult,
        loss_fn: str = "cross_entropy",
    ) -> None:
        """Count a forward_backward."""
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
        """Count an optimizer step: a point, if there was a batch before it."""
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
        """Note at which step a checkpoint, `SEGMENT/NAME`, was saved."""
        run = self._run(run_id)
        with self._adding:
            run.facts.mark(checkpoint)
            run.has_new_facts = True

    def begin_from(self, run_id: str, origin: Origin) -> None:
        """Note what a run began from; later loads change nothing."""
        run = self._run(run_id)
        with self._adding:
            if not run.facts.num_steps:
                run.facts.origin = origin
                run.has_new_facts = True

    def origin_in(self, checkpoint: CheckpointRow, *, is_resumed: bool) -> Origin:
        """A checkpoint as an origin."""
        facts = self.facts(checkpoint.run_id)
        step = facts.marks.get(f"{checkpoint.segment}/{checkpoint.name}")
        if step is None:  # saved by an older version
            points = self._saved(checkpoint.run_id)
            step = max((p[0] for p in points if p[3] <= checkpoint.created_at), default=0)
        return Origin(
            checkpoint.tinker_path, checkpoint.run_id, facts.first_step + step, is_resumed
        )

    def facts(self, run_id: str) -> RunFacts:
        """A run's facts, also of one that has left the memory; empty ones of an unknown run."""
        with self._adding:
            run = self._runs.get(run_id)
            if run is not None:
                return replace(run.facts, marks=dict(run.facts.marks))
        return self._files.read(self._path(run_id, "json")) or RunFacts()

    def _run(self, run_id: str) -> _RunProgress:
        return self._runs.setdefault(run_id, _RunProgress())

    def drop(self, run_id: str) -> None:
        """Forget a run that has left the memory; `save` comes first, and what was saved stays."""
        self._runs.pop(run_id, None)

    def save(self) -> None:
        """Append new points to the files, and write new facts."""
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
        """Keep the saved points of some steps; returns how many there are."""
        path = self._path(run_id)
        kept = [point for point in self._saved(run_id) if point[0] % stride == 0]
        temporary = path.with_suffix(".part")
        temporary.write_text(_as_lines(kept), encoding="utf-8")
        temporary.replace(path)
        return len(kept)

    def remove_unknown(self, known_ids: Callable[[], Iterable[str]]) -> None:
        """Remove the curves of runs that are not known any more."""
        found = [path for kind in KINDS for path in self._folder.glob(f"*.{kind}")]
        # asked afterwards: a run is known before its curve begins
        known = {self._path(run_id).stem for run_id in known_ids()}
        for path in found:
            if path.stem not in known:
                with contextlib.suppress(OSError):  # a folder that has become read-only
                    path.unlink(missing_ok=True)

    def curve(self, run_id: str) -> list[list[Any]]:
        """All points of a run and of the parts it goes on from, thinned out if there are many.

        Returns:
            A list for each point, with the values of `COLUMNS`; steps are counted from the first
            part on.
        """
        points: list[list[Any]] = []
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
        return points[::-stride][::-1]  # the newest is always there

    def _own_points(self, run_id: str) -> list[list[Any]]:
        with self._saving:
            points = self._saved(run_id)
            run = self._runs.get(run_id)
            unsaved = run.unsaved if run is not None else None
            points += [_as_list(point) for point in unsaved or []]
        return [[*point, *[None] * (len(COLUMNS) - len(point))] for point in points]

    def _saved(self, run_id: str) -> list[list[Any]]:
        points: list[list[Any]] = []
        # none yet, or a line that a crash cut short
        with contextlib.suppress(OSError, ValueError, RecursionError):
            for line in self._path(run_id).read_text(encoding="utf-8").splitlines():
                points.append(json.loads(line, parse_constant=lambda _: None))
        return list(filter(_is_point, points))

    def _path(self, run_id: str, kind: str = "jsonl") -> Path:
        """A client's text never becomes a file name."""
        return self._folder / f"{hashlib.sha256(run_id.encode()).hexdigest()[:32]}.{kind}"


def losses_agree(first: str | None, second: str | None) -> bool:
    """Whether curves of these losses can be one; None where nothing was trained yet."""
    return first is None or second is None or first == second


def _is_point(values: Any) -> bool:
    """Whether a saved line has the columns that every version writes."""
    if not isinstance(values, list) or not MIN_COLUMNS <= len(values) <= len(COLUMNS):
        return False
    is_number = [isinstance(value, int | float) for value in values]
    return (
        is_number[0]
        and is_number[3]
        and all(known or value is None for known, value in zip(is_number, values, strict=True))
    )


def _as_lines(points: Sequence[list[Any]]) -> str:
    return "".join(json.dumps(point) + "\n" for point in points)


def _as_list(point: Point) -> list[Any]:
    sums = point.sums
    return [
        point.step,
        sums.mean_loss,
        sums.num_tokens,
        point.time,
        sums.mean_negative_logprob,
        sums.divergence,
    ]
