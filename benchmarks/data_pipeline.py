"""Measure memory, time to the first batch and speed of the data pipeline for growing files.

    python benchmarks/data_pipeline.py                              # 10,000 and 1,000,000 rows
    python benchmarks/data_pipeline.py --rows 1000000 --batches 0   # a whole epoch

Every size is measured in a separate process: open the file, build the dataset, shuffle, and take
batches in order. Memory is the peak resident set (VmHWM) of that process and of its workers.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH_SIZE = 128
WORDS = (
    "the a of to and in that it is was for on as with he be at by had not but from or have an they"
    " which one you were all her she there would their we him been has when who will no more if out"
    " sea ship whale captain water light wind morning question answer because between through never"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--words", type=int, default=60, help="mean number of words per message")
    parser.add_argument(
        "--batches", type=int, default=300, help="number of batches; 0 is one epoch"
    )
    parser.add_argument(
        "--workers", type=int, help="number of processes (default: chosen by the size)"
    )
    parser.add_argument(
        "--model", help="model whose tokenizer is used (default: the default model)"
    )
    parser.add_argument(
        "--folder", type=Path, help="folder that keeps the generated files for the next run"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print_header()
        for num_rows in args.rows:
            path = folder / f"rows-{num_rows}-{args.words}.jsonl"
            if not path.exists():
                generate(path, num_rows, args.words)
            print_row(num_rows, path, measured_apart(args, path))


def generate(path: Path, num_rows: int, mean_words: int) -> None:
    """Write two-message conversations of random length, equal for equal arguments."""
    draw = random.Random(num_rows)
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            lengths = [1 + int(draw.expovariate(1 / mean_words)) for _ in range(2)]
            texts = [" ".join(draw.choices(WORDS, k=min(length, 2000))) for length in lengths]
            messages = [
                {"role": "user", "content": f"{number}: {texts[0]}"},
                {"role": "assistant", "content": texts[1]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    part.rename(path)


def measured_apart(args: argparse.Namespace, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), "--batches", str(args.batches)]
    command += ["--workers", str(args.workers)] if args.workers is not None else []
    command += ["--model", args.model] if args.model else []
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return all figures of one file; runs in a separate process."""
    from tinker_cookbook.model_files import DEFAULT_MODEL
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.supervised import (
        ChatDatasetBuilderCommonConfig,
        FromConversationFileBuilder,
    )
    from tinker_cookbook.supervised.lazy_dataset import LazyDataset

    model = args.model or DEFAULT_MODEL
    builder = FromConversationFileBuilder(
        common_config=ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=model,
            renderer_name=get_recommended_renderer_name(model),
            max_length=2048,
            batch_size=BATCH_SIZE,
        ),
        file_path=str(args.measure),
        num_workers=args.workers,
    )
    import tinker  # noqa: F401  (a run loads it before its data)

    builder.renderer  # noqa: B018  (loads the tokenizer, which is not part of the cost of the file)
    memory_before = peak_megabytes("self")
    started, cpu_started = time.perf_counter(), cpu_seconds()
    train, _ = builder()
    assert isinstance(train, LazyDataset)
    train.set_epoch(0)
    opened = time.perf_counter() - started
    num_batches = min(args.batches or len(train), len(train))
    gaps, num_tokens, workers_peak = [], 0, {}
    last = time.perf_counter()
    first_batch = 0.0
    for index in range(num_batches):
        batch = train.get_batch(index)
        now = time.perf_counter()
        first_batch = first_batch or now - started
        gaps.append(now - last)
        last = now
        num_tokens += sum(datum.model_input.length for datum in batch)
        workers_peak |= {pid: peak_megabytes(str(pid)) for pid in train.worker_pids}
    seconds = sum(gaps[1:]) or gaps[0]
    train.close()
    cpu = cpu_seconds() - cpu_started
    return {
        "open_seconds": opened,
        "first_batch_seconds": first_batch,
        "rows_per_second": (num_batches - 1) * BATCH_SIZE / seconds,
        "rows_per_cpu_second": num_batches * BATCH_SIZE / cpu,
        "tokens_per_second": num_tokens * (num_batches - 1) / num_batches / seconds,
        "median_batch_seconds": statistics.median(gaps),
        "memory_before": memory_before,
        "memory_main": peak_megabytes("self"),
        "memory_workers": sum(workers_peak.values()),
        "workers": len(workers_peak),
        "batches": num_batches,
    }


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_megabytes(pid: str) -> float:
    """Return the peak resident memory of a process so far; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def print_header() -> None:
    print(
        f"{'rows':>9} {'file':>8} {'batches':>7} | {'open':>7} {'first batch':>11} "
        f"{'rows/s':>7} {'rows/CPU s':>10} {'tokens/s':>9} | peak MB: "
        f"{'before':>6} {'main':>6} {'workers':>11}"
    )


def print_row(num_rows: int, path: Path, figures: dict[str, float]) -> None:
    workers = f"{figures['memory_workers']:.0f} ({figures['workers']:.0f})"
    print(
        f"{num_rows:>9,} {path.stat().st_size / 1e6:>5.0f} MB {figures['batches']:>7.0f} | "
        f"{figures['open_seconds']:>5.2f} s {figures['first_batch_seconds']:>9.2f} s "
        f"{figures['rows_per_second']:>7.0f} {figures['rows_per_cpu_second']:>10.0f} "
        f"{figures['tokens_per_second']:>9,.0f} | "
        f"{'':>8} {figures['memory_before']:>6.0f} {figures['memory_main']:>6.0f} {workers:>11}",
        flush=True,
    )


if __name__ == "__main__":
    main()
