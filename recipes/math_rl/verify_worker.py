"""A separate program that compares expressions with math-verify.

It reads a JSON list of import folders, then one JSON object per line with `given`, `wanted` and
`seconds`, and answers each with a line `true` or `false`. A comparison that takes too much memory
gives `false`; one that takes too much processor time ends this process.
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
    os.dup2(2, 1)  # output of a library goes to stderr
    sys.path[:] = json.loads(sys.stdin.readline())
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports] - optional

    def same(given: str, wanted: str) -> bool:
        try:
            return bool(verify(parse(f"${wanted}$"), parse(f"${given}$")))
        except (MemoryError, RecursionError, ValueError, OverflowError):
            return False

    same("1", "1")  # the first call loads the grammars
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
    """End this process after this much processor time, even inside one operation; 0: no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
