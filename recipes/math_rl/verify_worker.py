"""The program that compares expressions with math-verify, apart from the one that trains.

Reads a JSON list of folders to import from, then one JSON object a line: `given`, `wanted` and
`seconds`. Answers each with `true` or `false` on a line. A comparison that takes more memory than
allowed is wrong; one that takes more processor time ends this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys

MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.path[:] = json.loads(sys.stdin.readline())
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports] - optional

    def same(given: str, wanted: str) -> bool:
        try:
            return bool(verify(parse(f"${wanted}$"), parse(f"${given}$")))
        except (MemoryError, RecursionError, ValueError, OverflowError):
            return False

    same("1", "1")  # loads the grammars
    _limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        _limit_seconds(question["seconds"])
        answer = same(question["given"], question["wanted"])
        _limit_seconds(0.0)
        print(json.dumps(answer), file=answers, flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _limit_seconds(seconds: float) -> None:
    """End this process after so much processor time, even inside one operation; 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
