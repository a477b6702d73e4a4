"""Places where the files of runs can be: a local folder, or any file system that fsspec opens.

Paths are relative to the root of the storage, with `/` between their parts. A path that leaves the
root is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = [
    "AsyncStorage",
    "FsspecStorage",
    "LocalStorage",
    "Storage",
    "StorageStat",
    "storage_from_uri",
    "storage_join",
]


@dataclass(frozen=True, slots=True)
class StorageStat:
    """Size and time of a file or folder."""

    size: int
    mtime: float
    """Time of the last change, in seconds since 1970; 0 if the storage does not know it."""
    is_dir: bool = False


@runtime_checkable
class Storage(Protocol):
    """A place for files. A missing file raises FileNotFoundError where it is read."""

    def url(self, path: str = "") -> str: ...
    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def append(self, path: str, data: bytes) -> None: ...
    def exists(self, path: str) -> bool: ...
    def stat(self, path: str) -> StorageStat | None: ...
    def read_range(self, path: str, offset: int, length: int | None = None) -> bytes: ...
    def list_dir(self, prefix: str) -> list[str]: ...
    def remove(self, path: str) -> None: ...
    def remove_dir(self, path: str) -> None: ...
    def flush(self) -> None: ...


@runtime_checkable
class AsyncStorage(Protocol):
    """The same operations without blocking the event loop."""

    async def aread(self, path: str) -> bytes: ...
    async def awrite(self, path: str, data: bytes) -> None: ...
    async def aappend(self, path: str, data: bytes) -> None: ...
    async def aexists(self, path: str) -> bool: ...
    async def astat(self, path: str) -> StorageStat | None: ...
    async def aread_range(self, path: str, offset: int, length: int | None = None) -> bytes: ...
    async def alist_dir(self, prefix: str) -> list[str]: ...
    async def aremove(self, path: str) -> None: ...
    async def aremove_dir(self, path: str) -> None: ...


class _InThreads:
    """The asynchronous operations: each one runs its blocking form in a thread."""

    async def aread(self: Storage, path: str) -> bytes:
        return await asyncio.to_thread(self.read, path)

    async def awrite(self: Storage, path: str, data: bytes) -> None:
        await asyncio.to_thread(self.write, path, data)

    async def aappend(self: Storage, path: str, data: bytes) -> None:
        await asyncio.to_thread(self.append, path, data)

    async def aexists(self: Storage, path: str) -> bool:
        return await asyncio.to_thread(self.exists, path)

    async def astat(self: Storage, path: str) -> StorageStat | None:
        return await asyncio.to_thread(self.stat, path)

    async def aread_range(
        self: Storage, path: str, offset: int, length: int | None = None
    ) -> bytes:
        return await asyncio.to_thread(self.read_range, path, offset, length)

    async def alist_dir(self: Storage, prefix: str) -> list[str]:
        return await asyncio.to_thread(self.list_dir, prefix)

    async def aremove(self: Storage, path: str) -> None:
        await asyncio.to_thread(self.remove, path)

    async def aremove_dir(self: Storage, path: str) -> None:
        await asyncio.to_thread(self.remove_dir, path)


class LocalStorage(_InThreads):
    """A folder of this machine.

    Args:
        root: The folder.
        mkdir: Whether to create it if it is missing.
    """

    def __init__(self, root: str | Path, *, mkdir: bool = True) -> None:
        self._root = Path(root).expanduser()
        if mkdir:
            self._root.mkdir(parents=True, exist_ok=True)
        self._prefix = str(self._root)

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    def url(self, path: str = "") -> str:
        """Return the full path."""
        return self._full(path)

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        with open(self._full(path), "rb") as file:
            return file.read()

    def write(self, path: str, data: bytes) -> None:
        """Replace a file in one step; missing folders are created."""
        from tinker_cookbook.utils.durable_files import write_atomically

        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, data)

    def append(self, path: str, data: bytes) -> None:
        """Append to a file with one write, flushed to disk; missing folders are created."""
        target = Path(self._full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        return os.path.exists(self._full(path))

    def stat(self, path: str) -> StorageStat | None:
        """Return size and time; None if the path does not exist."""
        try:
            found = os.stat(self._full(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return StorageStat(found.st_size, found.st_mtime, (found.st_mode & 0o170000) == 0o040000)

    def read_range(self, path: str, offset: int, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset`, or everything from there."""
        with open(self._full(path), "rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)

    def list_dir(self, prefix: str) -> list[str]:
        """Return the sorted names in a folder; empty if it is not a folder or not readable."""
        try:
            return sorted(os.listdir(self._full(prefix)))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def remove(self, path: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._full(path))

    def remove_dir(self, path: str) -> None:
        """Delete a folder and its content, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._full(path))

    def flush(self) -> None:
        """Do nothing: every write is flushed at once."""

    def _full(self, path: str) -> str:
        return f"{self._prefix}/{_check(path)}" if path else self._prefix


class FsspecStorage(_InThreads):
    """A folder of a file system that the package fsspec opens, such as s3, gs or memory.

    Args:
        fs: An fsspec file system, or the name of its protocol.
        root: The folder in it.
        fs_kwargs: Options of the file system, if its protocol is given.
    """

    def __init__(self, fs: AbstractFileSystem | str, root: str = "", **fs_kwargs: Any) -> None:
        opened = _fsspec().filesystem(fs, **fs_kwargs) if isinstance(fs, str) else fs
        self._fs: AbstractFileSystem = opened
        self._root = root.rstrip("/")

    def url(self, path: str = "") -> str:
        """Return the full path, with its protocol."""
        return self._fs.unstrip_protocol(self._full(path))

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        return self.read_range(path, 0)

    def write(self, path: str, data: bytes) -> None:
        """Replace a file."""
        full = self._full(path)
        self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(full, data)

    def append(self, path: str, data: bytes) -> None:
        """Append to a file; where the file system cannot append, the file is written anew."""
        try:
            old = self.read(path)
        except FileNotFoundError:
            old = b""
        self.write(path, old + data)

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        return self._fs.exists(self._full(path))

    def stat(self, path: str) -> StorageStat | None:
        """Return size and time; None if the path does not exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.info(self._full(path))
        except FileNotFoundError:
            return None
        size, is_dir = int(found.get("size") or 0), found.get("type") == "directory"
        return StorageStat(size, _time_of(found), is_dir)

    def read_range(self, path: str, offset: int, length: int | None = None) -> bytes:
        """Return `length` bytes from `offset`, or everything from there."""
        end = None if length is None else offset + length
        data = self._fs.cat_file(self._full(path), start=offset, end=end)
        return data if isinstance(data, bytes) else data.encode()

    def list_dir(self, prefix: str) -> list[str]:
        """Return the sorted names in a folder; empty if it is not a folder."""
        self._fs.invalidate_cache()
        full = self._full(prefix)
        try:
            found = self._fs.ls(full, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found}
        is_file = [str(name).strip("/") for name in found] == [full.strip("/")]
        return [] if is_file else sorted(names)

    def remove(self, path: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def remove_dir(self, path: str) -> None:
        """Delete a folder and its content, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    def flush(self) -> None:
        """Do nothing: every write is sent at once."""

    def close(self) -> None:
        """Forget cached listings."""
        self._fs.invalidate_cache()

    def _full(self, path: str) -> str:
        return f"{self._root}/{_check(path)}" if path else self._root


def storage_from_uri(uri: str, **kwargs: Any) -> Storage:
    """Open the storage at a path or a URI such as `s3://bucket/runs`.

    Args:
        uri: A path, `file://PATH`, or a URI of a protocol that fsspec knows.
        kwargs: Options of the storage class.

    Raises:
        ConfigurationError: if fsspec or the package for the protocol is not installed.
    """
    protocol, separator, path = uri.partition("://")
    if not separator:
        return LocalStorage(uri, **kwargs)
    if protocol == "file":
        return LocalStorage(path, **kwargs)
    try:
        fs, root = _fsspec().core.url_to_fs(uri, **kwargs)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"uri={uri} cannot be opened ({error}); give a folder, or install the package that "
            "fsspec needs for this protocol."
        ) from error
    return FsspecStorage(fs, root)


def storage_join(*parts: str) -> str:
    """Join parts of a path; empty parts are left out."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def _check(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ConfigurationError(f"path={path} leaves the storage; give a path below its root.")
    return path


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigurationError(
            "storage at a URI needs the package fsspec; run `pip install fsspec`."
        ) from error
    return fsspec


def _time_of(found: dict[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = found.get(key)
        if isinstance(value, int | float):
            return float(value)
        if hasattr(value, "timestamp"):
            return float(value.timestamp())  # type: ignore[union-attr]
    return 0.0
