"""Read the files that clients may point at instead of sending them, all in one folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinker_cookbook.local.errors import UserError

__all__ = ["read_asset"]

MAX_ASSET_BYTES = 32 * 2**20


def read_asset(assets_dir: Path | None, location: str, where: str) -> bytes:
    """Return the bytes of a file in the assets folder.

    Args:
        assets_dir: the folder; None: clients may not point at files.
        location: a path relative to the folder, an absolute path inside it, or a `file://` URL.
        where: the field of the request, for error messages.

    Raises:
        UserError: the service has no assets folder, or the file is outside the folder (after
            following links), missing, not a regular file or too large.
    """
    if assets_dir is None:
        raise UserError(
            f"{where}.location={location[:200]!r}: this service does not read files for clients; "
            "send the image itself, or start the service with --assets-dir FOLDER"
        )
    refusal = UserError(
        f"{where}.location={location[:200]!r} is not a readable file in the service's assets "
        "folder; give a path inside the folder"
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
    # the file may have changed since the check: do not follow a link or wait for a pipe
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > MAX_ASSET_BYTES:
            raise UserError(
                f"{where}: the file has {status.st_size} bytes; at most {MAX_ASSET_BYTES} are "
                "accepted"
            )
        return file.read(MAX_ASSET_BYTES)
