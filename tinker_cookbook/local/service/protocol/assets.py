"""Files that a client may point at instead of sending them: those under one folder of the owner."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinker_cookbook.local.errors import UserError

__all__ = ["read_asset"]

MAX_ASSET_BYTES = 32 * 2**20


def read_asset(assets_dir: Path | None, location: str, where: str) -> bytes:
    """The bytes of a file under the folder.

    Args:
        location: a path relative to the folder, an absolute one inside it, or its `file://` URL.

    Raises:
        UserError: assets are not allowed here, or the file is outside of the folder (links
            followed), missing, not a plain file or too large.
    """
    if assets_dir is None:
        raise UserError(
            f"{where}.location={location[:200]!r}: this service reads no files for clients; send "
            "the image itself, or start the service with --assets-dir FOLDER"
        )
    refusal = UserError(
        f"{where}.location={location[:200]!r} is no readable file under the service's assets "
        "folder; give a path inside it"
    )
    if "://" in location:
        parts = urlsplit(location)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            raise refusal
        location = unquote(parts.path)
    try:
        root = assets_dir.resolve(strict=True)
        path = (root / location).resolve(strict=True)
        if not path.is_relative_to(root):
            raise refusal
        return _read(path, where)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise refusal from error


def _read(path: Path, where: str) -> bytes:
    # a link put there after the check is not followed, and a pipe not waited for
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        if status.st_size > MAX_ASSET_BYTES:
            raise UserError(
                f"{where}: the file has {status.st_size} bytes; at most {MAX_ASSET_BYTES} are read"
            )
        return file.read(MAX_ASSET_BYTES)
