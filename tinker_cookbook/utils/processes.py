"""Processes of this machine."""

import os

__all__ = ["is_running"]


def is_running(pid: int) -> bool:
    """Return whether a process exists, also if it belongs to another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
