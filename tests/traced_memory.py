"""The memory that Python code allocates, measured in a separate process.

`tracemalloc.stop` may crash a process in which other threads start or end at the same moment
(Python issue gh-128679), and the processes of the tests have many threads.
"""

from __future__ import annotations

import json
import subprocess
import sys

__all__ = ["traced_memory"]

_PROGRAM = """
import json, sys, tracemalloc
names = {}
exec(sys.argv[1], names)
tracemalloc.start()
exec(sys.argv[2], names)
print(json.dumps(tracemalloc.get_traced_memory()))
"""


def traced_memory(setup: str, work: str) -> tuple[int, int]:
    """Return the bytes that `work` has allocated at its end, and the most at any time.

    Args:
        setup: code that runs before, such as imports.
        work: code that is measured. If it fails, so does the test.
    """
    command = [sys.executable, "-c", _PROGRAM, setup, work]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    size, peak = json.loads(done.stdout.splitlines()[-1])
    return size, peak
