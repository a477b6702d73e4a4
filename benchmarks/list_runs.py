"""Measure how long the list of many long runs takes, the first time and again.

    python benchmarks/list_runs.py [--runs 1000] [--rows 10000] [--rounds 9]

The runs are files as the supervised loop writes them, in a temporary folder. "Cold" has no index of
earlier lists; the files are in the memory of the system. "Warm" is the list of another program
after that, with one run that has changed and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


def write_runs(folder: Path, num_runs: int, num_rows: int) -> None:
    """Write runs; every second one is complete."""
    start = 1.7e9
    lines = [
        {"step": n, "train/mean_nll": 3 - n / num_rows, "time/total": 1.5, "optim/lr": 1e-4}
        for n in range(num_rows)
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    for number in range(num_runs):
        run = folder / "sl_basic" / f"run-{number:04}"
        run.mkdir(parents=True)
        settings = {"model_name": "some/model", "learning_rate": 1e-4, "log_path": str(run)}
        (run / "config.json").write_text(json.dumps(settings))
        (run / "metrics.jsonl").write_text(metrics)
        record = {"name": "final" if number % 2 else "000100", "batch": num_rows, "time": start}
        (run / "checkpoints.jsonl").write_text(json.dumps(record) + "\n")
        for path in (*run.iterdir(), run):  # what has just changed is always read again
            os.utime(path, (start, start))


def list_once(folder: Path, expected: int) -> float:
    """Return the seconds of one list."""
    from tinker_cookbook.stores import LocalStorage, RunRegistry

    started = time.perf_counter()
    found = RunRegistry([LocalStorage(folder)]).refresh()
    seconds = time.perf_counter() - started
    if len(found) != expected:
        raise SystemExit(f"the list has {len(found)} runs instead of {expected}")
    return seconds


def main() -> None:
    """Print the seconds of each kind of list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary) / "runs", Path(temporary) / "home"
        write_runs(folder, args.runs, args.rows)
        list_once(folder, args.runs)  # imports, and the files into the memory of the system
        times: dict[str, list[float]] = {"cold": [], "warm": [], "warm, one changed": []}
        for number in range(args.rounds):
            os.environ["TINKER_COOKBOOK_HOME"] = str(home / str(number))
            times["cold"].append(list_once(folder, args.runs))
            times["warm"].append(list_once(folder, args.runs))
            with (folder / "sl_basic" / "run-0000" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1}\n')
            times["warm, one changed"].append(list_once(folder, args.runs))
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:<18} {middle:.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
