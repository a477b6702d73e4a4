"""Measure the CPU time of imports and of `--help`.

    python benchmarks/startup.py [--repeats N]

Prints the median CPU seconds (user and system, of a fresh process) and whether torch, tinker or
transformers was imported. The exit status is 1 if a limit is
exceeded.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "tinker", "transformers", "datasets")
# Command, maximum CPU seconds, and modules that must not be imported.
CASES = (
    ("import tinker_cookbook", ["-c", "import tinker_cookbook"], 0.2, HEAVY),
    ("import tinker_cookbook.renderers", ["-c", "import tinker_cookbook.renderers"], 0.5, HEAVY),
    ("tinker-cookbook --help", ["-m", "tinker_cookbook.cli", "--help"], 0.3, HEAVY),
    ("recipes.sl_basic --help", ["-m", "recipes.sl_basic", "--help"], 1.5, ("torch",)),
    ("recipes.book_style --help", ["-m", "recipes.book_style", "--help"], 1.5, ("torch",)),
)


def measure_cpu_seconds(words: list[str]) -> float:
    """Return the CPU seconds of one new process."""
    before = os.times()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def find_imported(words: list[str], names: tuple[str, ...]) -> list[str]:
    """Return which of the packages `names` the process imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return [name for name in names if name in modules]


def main(repeats: int) -> int:
    """Print the table; return 1 if a case exceeds its limit."""
    failed = False
    print(f"{'case':<36}{'CPU s':>8}{'limit':>8}  imports")
    for name, words, limit, forbidden in CASES:
        seconds = statistics.median(measure_cpu_seconds(words) for _ in range(repeats))
        imported = find_imported(words, HEAVY)
        bad = seconds > limit or any(module in forbidden for module in imported)
        failed = failed or bad
        mark = "  TOO MUCH" if bad else ""
        print(f"{name:<36}{seconds:>8.2f}{limit:>8.2f}  {', '.join(imported) or '-'}{mark}")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    sys.exit(main(parser.parse_args().repeats))
