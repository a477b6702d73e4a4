"""What the dashboard knows about a run besides its curve: its loss, its steps, where it began."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["FactsFiles", "Origin", "RunFacts"]

MAX_MARKS = 1000
"""The newest checkpoints of a run whose step is known."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run began from."""

    path: str
    run_id: str
    """The run that saved it."""
    step: int
    """Optimizer steps behind the checkpoint, those of earlier parts included."""
    is_resumed: bool
    """With its optimizer: the run goes on. False: only the weights were taken."""


@dataclass
class RunFacts:
    """Kept as JSON beside the curve."""

    loss_fn: str | None = None
    """Of the newest batch; `custom` where the client computes it."""
    num_steps: int = 0
    """Of this run, without earlier parts."""
    origin: Origin | None = None
    marks: dict[str, int] = field(default_factory=dict)
    """`SEGMENT/NAME` of a checkpoint -> `num_steps` when it was saved."""

    @property
    def first_step(self) -> int:
        """Steps that earlier parts of the run have done."""
        return self.origin.step if self.origin is not None and self.origin.is_resumed else 0

    def mark(self, checkpoint: str) -> None:
        self.marks.pop(checkpoint, None)
        self.marks[checkpoint] = self.num_steps
        while len(self.marks) > MAX_MARKS:
            del self.marks[next(iter(self.marks))]


_DAMAGED = (ValueError, TypeError, AttributeError, KeyError, RecursionError)


class FactsFiles:
    """Facts of runs on the disk, perhaps of another service; read again once they have changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], RunFacts]] = {}

    def read(self, path: Path) -> RunFacts | None:
        """None where there are none, or none that can be read."""
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size)
            known = self._known.get(path)
            if known is None or known[0] != version:
                known = (version, _parse(json.loads(path.read_text(encoding="utf-8"))))
                self._known[path] = known
        except (OSError, *_DAMAGED):
            self._known.pop(path, None)
            return None
        return known[1]

    def write(self, path: Path, facts: RunFacts) -> None:
        """Replace the file at once; OSError if the disk does not take it."""
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(asdict(facts)), encoding="utf-8")
        part.replace(path)


def _parse(values: dict[str, Any]) -> RunFacts:
    """Raises one of `_DAMAGED` for what no service wrote."""
    found = values.get("origin")
    origin = None
    if found is not None:
        path, run_id, is_resumed = str(found["path"]), str(found["run_id"]), found["is_resumed"]
        origin = Origin(path, run_id, int(found["step"]), bool(is_resumed))
    loss_fn = values.get("loss_fn")
    return RunFacts(
        loss_fn=None if loss_fn is None else str(loss_fn),
        num_steps=int(values.get("num_steps", 0)),
        origin=origin,
        marks={name: int(step) for name, step in values.get("marks", {}).items()},
    )
