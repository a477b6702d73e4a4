"""The record of a checkpoint in a run directory."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from tinker_cookbook.exceptions import CheckpointError
from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE

__all__ = ["CheckpointRecord"]

_MISSING = object()


@dataclass
class CheckpointRecord:
    """One line of checkpoints.jsonl."""

    name: str
    batch: int | None = None
    """Index of the next batch of the epoch: the checkpoint contains all batches before it."""
    epoch: int | None = None
    final: bool | None = None
    state_path: str | None = None
    sampler_path: str | None = None
    extra: Row = field(default_factory=dict)
    """Other keys of the line, written by the loop."""

    def to_dict(self) -> Row:
        """Return the line as an object, without fields that are None."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {key: value for key, value in known.items() if value is not None} | self.extra

    @classmethod
    def from_dict(cls, d: Row) -> CheckpointRecord:
        """Read a line; unknown keys go to `extra`."""
        if "name" not in d:
            raise CheckpointError(
                f"checkpoint record {d} has no name; every line of {CHECKPOINTS_FILE} has one."
            )
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in d.items() if key not in known}
        return cls(**{key: d[key] for key in d.keys() & known}, extra=extra)

    def has(self, key: str) -> bool:
        """Return whether a field is set or a key is in `extra`."""
        return self.get(key, None) is not None or key in self.extra

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """Return a field's value (None included), else the value in `extra`, else `default`.

        Raises:
            KeyError: if the key is unknown and no default is given.
        """
        if key != "extra" and key in {f.name for f in fields(self)}:
            return getattr(self, key)
        if key in self.extra:
            return self.extra[key]
        if default is _MISSING:
            raise KeyError(key)
        return default
