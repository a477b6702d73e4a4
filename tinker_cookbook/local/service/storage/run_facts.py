"""Facts about a run for the dashboard: its loss, its number of steps and its origin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinker_cookbook.utils.durable_files import write_atomically

__all__ = ["FactsFiles", "Origin", "RunFacts"]

MAX_MARKS = 1000
"""Maximum number of checkpoints of a run whose steps are recorded; the oldest are dropped."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run began from."""

    path: str
    run_id: str
    """The run that saved it."""
    step: int
    """Number of optimizer steps before the checkpoint, including those of earlier parts."""
    is_resumed: bool
    """Whether the optimizer state was loaded too: then the run continues the other run."""


@dataclass
class RunFacts:
    """Facts about a run, saved as JSON next to its curve."""

    loss_fn: str | None = None
    """Loss of the newest batch; `custom` if the client computes it."""
    num_steps: int = 0
    """Number of optimizer steps of this run, without earlier parts."""
    origin: Origin | None = None
    marks: dict[str, int] = field(default_factory=dict)
    """`SEGMENT/NAME` of a checkpoint -> `num_steps` when it was saved."""

    @property
    def first_step(self) -> int:
        """Number of steps of the earlier parts of the run."""
        return self.origin.step if self.origin is not None and self.origin.is_resumed else 0

    def mark(self, checkpoint: str) -> None:
        self.marks.pop(checkpoint, None)
        self.marks[checkpoint] = self.num_steps
        while len(self.marks) > MAX_MARKS:
            del self.marks[next(iter(self.marks))]


_DAMAGED = (ValueError, TypeError, AttributeError, KeyError, RecursionError)


class FactsFiles:
    """Saved facts of runs. A file is read again when it has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, int], RunFacts]] = {}

    def read(self, path: Path) -> RunFacts | None:
        """Return saved facts, or None if the file is missing or damaged."""
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size)
            known = self._known.get(path)
            if known is None or known[0] != version:
                known = (version, _parse(path.read_text(encoding="utf-8")))
                self._known[path] = known
        except (OSError, *_DAMAGED):
            self._known.pop(path, None)
            return None
        return known[1]

    def write(self, path: Path, facts: RunFacts) -> None:
        """Replace the file in one step; OSError if the disk is full or read-only."""
        write_atomically(path, json.dumps(asdict(facts)))


def _parse(text: str) -> RunFacts:
    """Read saved facts; one of `_DAMAGED` if they are damaged."""
    values = json.loads(text)
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
