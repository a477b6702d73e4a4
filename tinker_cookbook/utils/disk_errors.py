"""Files that cannot be written: some end a run with one clear line, others it can do without."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

__all__ = ["describe_disk_error", "naming_file", "optional_file"]

logger = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_warned: set[str] = set()


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Let errors of the block name the file, which those of a write and a flush do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def optional_file(path: Path | str) -> Iterator[None]:
    """Go on where the block cannot write a file that a run can do without; logged once a name."""
    try:
        yield
    except OSError as error:
        name = Path(path).name
        if name not in _warned:
            _warned.add(name)
            logger.warning("%s cannot be written: %s; the run goes on", path, error.strerror)


def describe_disk_error(error: OSError) -> str | None:
    """`FILE cannot be written: WHY` for a disk that is full or broken; None for other errors."""
    if error.errno not in DISK_ERRORS or error.filename is None:
        return None
    return f"{error.filename} cannot be written: {error.strerror}."
