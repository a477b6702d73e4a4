"""One run of a sweep, as a process that ends with the sweep.

    python -m tinker_cookbook.commands.parts.sweep_child RECIPE key=value ...

Standard input is a pipe from the sweep. When the sweep ends, even by `kill -9`, the pipe closes and
the run is interrupted, so that no run without its service is left behind.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

__all__ = ["main"]

GRACE_SECONDS = 20.0


def main(words: list[str]) -> None:
    """Run a recipe: the name of a module, or a file."""
    threading.Thread(target=_end_with_the_sweep, args=(sys.stdin.fileno(),), daemon=True).start()
    recipe = words[0]
    sys.argv = [recipe, *words[1:]]
    if recipe.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(recipe)))
        runpy.run_path(recipe, run_name="__main__")
    else:
        runpy.run_module(recipe, run_name="__main__", alter_sys=True)


def _end_with_the_sweep(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
