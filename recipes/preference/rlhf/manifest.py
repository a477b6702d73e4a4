"""Which weights each stage of a pipeline left, and from which weights it started.

A stage takes its input from the record of the stage before it, never from whatever checkpoint is
the newest in a folder. A record is written after its stage is complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.durable_files import write_atomically

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class StageRecord:
    """A completed stage."""

    log_path: str
    state_path: str
    """Training state, to start the next training from."""
    sampler_path: str
    """Weights to sample from."""
    inputs: dict[str, str | None] = field(default_factory=dict)
    """Weights that the stage used, by purpose; None is the base model."""


class Manifest:
    """The records of a pipeline, in its run directory."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / MANIFEST_FILE
        self._stages: dict[str, StageRecord] = {}
        if self.path.exists():
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))
                self._stages = {name: StageRecord(**row) for name, row in rows.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigurationError(
                    f"{self.path} cannot be read ({error}); delete it, and the stages write it "
                    "again from their own run directories."
                ) from error

    def get(self, stage: str) -> StageRecord | None:
        """Return the record of a stage; None if it is not complete."""
        return self._stages.get(stage)

    def record(self, stage: str, record: StageRecord) -> None:
        """Write the record of a completed stage."""
        self._stages[stage] = record
        rows = {name: asdict(found) for name, found in self._stages.items()}
        write_atomically(self.path, json.dumps(rows, indent=1) + "\n")

    def check_inputs(self, stage: str, **expected: str | None) -> StageRecord | None:
        """Return the record of a stage after checking which weights it used.

        Raises:
            ConfigurationError: if it used others, because an earlier stage was trained again.
        """
        record = self._stages.get(stage)
        if record is None:
            return None
        for purpose, path in expected.items():
            if record.inputs.get(purpose) != path:
                raise ConfigurationError(
                    f"stage {stage} in {record.log_path} used {purpose}={record.inputs[purpose]}, "
                    f"and this pipeline now has {purpose}={path}; train the stage again "
                    f"(run_{stage}=true behavior_if_log_dir_exists=delete), or use another "
                    "log_path."
                )
        return record
