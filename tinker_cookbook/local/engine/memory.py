"""How much memory is free and in use, and what the process tells the system about its own."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

__all__ = [
    "LARGE_PAGE",
    "available_bytes",
    "prefer_large_pages",
    "resident_bytes",
    "return_freed_memory",
]

_CGROUP = Path("/sys/fs/cgroup")
LARGE_PAGE = 2 * 2**20
"""Size of a large memory page on most systems."""
_MADV_HUGEPAGE = 14
"""Linux's constant of this name."""


def available_bytes() -> int | None:
    """Return the free bytes of the machine or container, whichever is less; None if not known."""
    known = [value for value in (_machine_bytes(), _container_bytes()) if value is not None]
    return min(known) if known else None


def resident_bytes() -> int:
    """Return the bytes of memory of this process; 0 if not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def return_freed_memory(*, collect: bool = True) -> None:
    """Return freed blocks to the system, which glibc does not do by itself.

    Args:
        collect: first collect objects that only refer to each other, which pauses Python briefly.
    """
    if collect:
        gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def prefer_large_pages(address: int, num_bytes: int) -> None:
    """Ask Linux for large pages in memory that nothing has used yet.

    Matrices that every step reads from end to end are read a fifth faster from large pages. Only
    whole large pages within the memory are used.
    """
    start = -(-address // LARGE_PAGE) * LARGE_PAGE
    num_bytes = (address + num_bytes - start) // LARGE_PAGE * LARGE_PAGE
    if num_bytes <= 0:
        return
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_HUGEPAGE)


def _machine_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return _total_bytes()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _total_bytes() -> int | None:
    """Return three quarters of the installed memory, where free memory is not reported."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    except (OSError, ValueError, AttributeError):
        return None


def _container_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
