"""Compare two expressions with math-verify, in a separate process.

The process is an interpreter that runs verify_worker.py and nothing of the training program. It
serves all answers, and is replaced when an answer takes too long.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

__all__ = ["same_expression"]

START_SECONDS = 120.0
MAX_CHARACTERS = 2000
# A number, exponent or factorial of this size cannot be an answer; evaluating it might not end.
TOO_LARGE = re.compile(
    r"\d{400}"
    r"|(?:\^|\*\*)\s*[{(]*\s*[-+]?\s*\d{5}"
    r"|\d\s*e\s*[-+]?\d{4}"
    r"|\d{4}[\s)}]*!"
    r"|![\s)}]*!",
    re.IGNORECASE,
)
DIGIT_MARKS = re.compile(r"(?<=\d)(?:[,_]|\\[,!;: ]|\{,\})(?=\d)")


def same_expression(given: str, wanted: str, seconds: float) -> bool:
    """Return whether the expressions are equal; False if that takes too much time or memory.

    Args:
        given: The answer of the reply.
        wanted: The reference.
        seconds: Limit of processor time.
    """
    for text in (given, wanted):
        if len(text) > MAX_CHARACTERS or TOO_LARGE.search(DIGIT_MARKS.sub("", text)):
            return False
    with _lock:
        return _worker().ask(given, wanted, seconds)


class _Worker:
    """The process, and a thread that reads its answers."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("verify_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="backslashreplace",
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(json.dumps([entry or "." for entry in sys.path]))
        self.alive = self._next_line(START_SECONDS) == "ready"

    def ask(self, given: str, wanted: str, seconds: float) -> bool:
        question = {"given": given, "wanted": wanted, "seconds": seconds}
        self._send(json.dumps(question))
        # The process limits its own processor time. This limit is for a process that only waits.
        line = self._next_line(10 * seconds + 10.0)
        if line not in ("true", "false"):
            self.end()
        return line == "true"

    def end(self) -> None:
        self.alive = False
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None, "the process was started with a pipe"
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line.strip())
        self._lines.put("")  # the process has ended

    def _next_line(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None, "the process was started with a pipe"
        with contextlib.suppress(BrokenPipeError):  # the process has ended
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


_lock = threading.Lock()
_current: list[_Worker] = []


@atexit.register
def _end_worker() -> None:
    while _current:
        _current.pop().end()


def _worker() -> _Worker:
    """Return the running process, or start one."""
    if not _current or not _current[0].alive:
        _current[:] = [_Worker()]
    return _current[0]
