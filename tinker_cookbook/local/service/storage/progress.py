"""How the loss of each run develops, one point an optimizer step, for the dashboard.

Points are kept in memory and appended to `curves/` in the state folder now and then, so that the
curves of finished runs can be looked at after a restart. They are for the eye: a crash may lose the
last seconds of them, and of a very long run not every step is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinker_cookbook.local.engine.types import SparseRows, TrainDatum, TrainResult

__all__ = ["Point", "ProgressLog"]

logger = logging.getLogger(__name__)

MAX_POINTS_SENT = 2000
MAX_POINTS_SAVED = 20_000
"""Of one run; beyond it every second one of them goes."""


@dataclass(frozen=True)
class Point:
    """One optimizer step."""

    step: int
    """Counted from 1 within a run."""
    loss: float
    """Sum of the loss since the last step, divided by the tokens it was taken over."""
    num_tokens: int
    time: float


@dataclass
class _RunProgress:
    loss_sum: float = 0.0
    num_tokens: int = 0
    weight: float = 0.0
    num_steps: int = 0
    num_saved: int = 0
    stride: int = 1
    """Steps between two saved points."""
    unsaved: list[Point] | None = None


class ProgressLog:
    """Used on the event loop's thread; `save` and `curve`, which wait for the disk, on others."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "curves"
        self._runs: dict[str, _RunProgress] = {}
        self._saving = threading.Lock()
        """A point is in memory or in the file for whoever holds this, which may take long."""
        self._adding = threading.Lock()
        """Held for a moment only: the event loop takes it."""
        self.num_trained_tokens = 0
        self.num_steps = 0

    def add_batch(self, run_id: str, data: Sequence[TrainDatum], result: TrainResult) -> None:
        """Count a forward_backward."""
        run = self._runs.setdefault(run_id, _RunProgress())
        num_tokens = sum(len(datum.tokens) for datum in data)
        run.loss_sum += result.metrics.get("loss:sum", 0.0)
        run.num_tokens += num_tokens
        run.weight += sum(_weight(datum) for datum in data)
        self.num_trained_tokens += num_tokens

    def add_step(self, run_id: str) -> None:
        """Count an optimizer step: a point, if there was a batch before it."""
        self.num_steps += 1
        run = self._runs.setdefault(run_id, _RunProgress())
        run.num_steps += 1
        if run.weight > 0:
            point = Point(run.num_steps, run.loss_sum / run.weight, run.num_tokens, time.time())
            with self._adding:
                run.unsaved = [*(run.unsaved or []), point]
        run.loss_sum = run.weight = 0.0
        run.num_tokens = 0

    def drop(self, run_id: str) -> None:
        """Forget a run that has left the memory; `save` comes first, and what was saved stays."""
        self._runs.pop(run_id, None)

    def num_steps_of(self, run_id: str) -> int:
        return self._runs[run_id].num_steps if run_id in self._runs else 0

    def save(self) -> None:
        """Append new points to the files."""
        for run_id, run in list(self._runs.items()):
            with self._saving:
                with self._adding:
                    points, run.unsaved = run.unsaved, None
                if not points:
                    continue
                try:
                    self._append(run_id, run, points)
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
        found = list(self._folder.glob("*.jsonl"))
        # asked afterwards: a run is known before its curve begins
        known = {self._path(run_id) for run_id in known_ids()}
        for path in found:
            if path not in known:
                with contextlib.suppress(OSError):  # a folder that has become read-only
                    path.unlink(missing_ok=True)

    def curve(self, run_id: str) -> list[list[Any]]:
        """All points of a run as [step, loss, tokens, time], thinned out if there are many."""
        with self._saving:
            points = self._saved(run_id)
            run = self._runs.get(run_id)
            unsaved = run.unsaved if run is not None else None
            points += [_as_list(point) for point in unsaved or []]
        stride = -(-len(points) // MAX_POINTS_SENT) or 1
        return points[::-stride][::-1]  # the newest is always there

    def _saved(self, run_id: str) -> list[list[Any]]:
        points: list[list[Any]] = []
        with contextlib.suppress(OSError, ValueError):  # none yet, or a line that a crash cut short
            for line in self._path(run_id).read_text(encoding="utf-8").splitlines():
                points.append(json.loads(line))
        return points

    def _path(self, run_id: str) -> Path:
        """A client's text never becomes a file name."""
        return self._folder / f"{hashlib.sha256(run_id.encode()).hexdigest()[:32]}.jsonl"


def _as_lines(points: Sequence[list[Any]]) -> str:
    return "".join(json.dumps(point) + "\n" for point in points)


def _as_list(point: Point) -> list[Any]:
    return [point.step, point.loss, point.num_tokens, point.time]


def _weight(datum: TrainDatum) -> float:
    """How many tokens a datum's loss is taken over: its weights, else what has an advantage."""
    for name in ("weights", "advantages"):
        values = datum.loss_inputs.get(name)
        if values is not None:
            dense = values.values if isinstance(values, SparseRows) else values
            return float(np.sum(dense) if name == "weights" else np.count_nonzero(dense))
    return float(len(datum.tokens))
