"""A folder that appears under its name only when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.durable_files import move_durably

__all__ = ["complete_folder"]


@contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write to; rename it to `path` at the end of the block.

    If the block fails (disk full, Ctrl-C), what was written is deleted.

    Raises:
        ConfigurationError: if `path` exists and is not an empty folder.
    """
    target = Path(path).expanduser()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigurationError(
            f"{target} exists and is not an empty folder; give another name or delete it first."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, so that the final rename stays on one file system.
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        move_durably(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
