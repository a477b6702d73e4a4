"""Files that cannot be written: one line for a full disk, none for optional files."""

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
    """Add the name of the file to errors of the block; errors of write and flush lack it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def optional_file(path: Path | str) -> Iterator[None]:
    """Log, once per file name, that an optional file cannot be written, and continue."""
    try:
        yield
    except OSError as error:
        name = Path(path).name
        if name not in _warned:
            _warned.add(name)
            logger.warning(
                "%s cannot be written: %s; the run continues without it", path, error.strerror
            )


def describe_disk_error(error: OSError) -> str | None:
    """Return `FILE cannot be written: REASON` for a full or broken disk; None for other errors."""
    if error.errno not in DISK_ERRORS or error.filename is None:
        return None
    return f"{error.filename} cannot be written: {error.strerror}."
