"""Main function of a background rendering process; see `background`."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import traceback
from typing import Any, BinaryIO

__all__ = ["main"]

_PARENT_CHECK_SECONDS = 5.0


def main(parent_pid: int) -> None:
    """Answer requests from stdin on stdout until stdin ends or process `parent_pid` is gone.

    The first request is the pickled render function; the others are lists of rows. An answer is
    (True, results) or (False, text of the error).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    requests, answers = _own_pipes()
    # The SDK imports torch if it is installed: 2 s and 200 MB that rendering does not need.
    sys.modules.setdefault("torch", None)  # pyright: ignore[reportArgumentType]
    os.environ["USE_TORCH"] = "0"
    from tinker_cookbook.supervised.background import read_frame, write_frame

    render: Any = None
    try:
        while _wait_for_request(requests, parent_pid):
            request = read_frame(requests)
            try:
                if render is None:
                    render = pickle.loads(request)
                    answer = (True, None)
                else:
                    answer = (True, render(request))
            except Exception:  # the parent gets every error and renders the rows itself
                answer = (False, traceback.format_exc(limit=-3))
            write_frame(answers, answer)
    except (EOFError, BrokenPipeError):
        pass
    os._exit(0)  # nothing to flush, and the parent does not wait for clean-up


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Reserve stdin and stdout for the protocol: a print would corrupt the answers."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return _Exact(requests), answers  # pyright: ignore[reportReturnType]


class _Exact:
    """Reads exactly the requested bytes, unbuffered, so that `select` sees the rest."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def fileno(self) -> int:
        return self.raw.fileno()

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (piece := self.raw.read(size - len(data))):
            data += piece
        return bytes(data)


def _wait_for_request(requests: BinaryIO, parent_pid: int) -> bool:
    """Return False once the parent is gone, even if a fork of it keeps the pipe open."""
    if sys.platform == "win32":
        return True  # select does not accept pipes on Windows
    while os.getppid() == parent_pid:
        if select.select([requests], [], [], _PARENT_CHECK_SECONDS)[0]:
            return True
    return False
