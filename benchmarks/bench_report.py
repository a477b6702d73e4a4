"""The table of `engine.py`: recorded samples and targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rounds = list[dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    work: str
    row: str
    value: Callable[[dict[str, dict[str, Any]]], float]
    """Computes the figure of one round."""
    form: str
    target: float
    aim: float
    higher_is_better: bool = True
    tokens_of: tuple[str, ...] = ("service",)
    """Sides whose tokens per second are shown next to the figure."""


def _ratio(ours: str, theirs: str) -> Callable[[dict[str, dict[str, Any]]], float]:
    return lambda sides: sides[theirs]["seconds"] / sides[ours]["seconds"]


def _speed(peer: str) -> Callable[[dict[str, dict[str, Any]]], float]:
    return _ratio("service", peer)


def _memory(peer: str) -> Callable[[dict[str, dict[str, Any]]], float]:
    return lambda sides: sides["service"]["peak_bytes"] / sides[peer]["peak_bytes"]


def _tracking(sides: dict[str, dict[str, Any]]) -> float:
    return abs(sides["bfloat16"]["drop"] / sides["float32"]["drop"] - 1) * 100


def _roofline(sides: dict[str, dict[str, Any]]) -> float:
    sample = sides["service"]
    return sample["flops"] / sample["seconds"] / sample["peak_flops"] * 100


def _bandwidth(sides: dict[str, dict[str, Any]]) -> float:
    sample = sides["service"]
    return sample["bytes"] / sample["seconds"] / sample["peak_bytes_per_second"] * 100


def _share_of(dtype: str) -> Callable[[dict[str, dict[str, Any]]], float]:
    """Return the share of the product peak of a format, for records that have it."""

    def share(sides: dict[str, dict[str, Any]]) -> float:
        sample = sides["service"]
        if sample["peak_of"] == dtype:
            raise KeyError(dtype)  # the line above says it already
        return sample["flops"] / sample["seconds"] / sample["peaks"][dtype] * 100

    return share


def _overhead(sides: dict[str, dict[str, Any]]) -> float:
    return sides["difference"]["seconds"] * 1e3


X, PERCENT = "{:.2f}x", "{:.1f} %"
LINES = (
    Line(
        "SFT, against transformers + PEFT, padded",
        "train_padded",
        _speed("padded"),
        X,
        7.0,
        10.0,
        tokens_of=("service", "padded"),
    ),
    Line(
        "SFT, against the same without padding",
        "train_unpadded",
        _speed("unpadded"),
        X,
        2.5,
        4.0,
        tokens_of=("service", "unpadded"),
    ),
    Line(
        "2 groups of 8 replies to one prompt each, against the same without padding",
        "train_groups",
        _speed("unpadded"),
        X,
        0.0,
        0.0,
        tokens_of=("service", "unpadded"),
    ),
    Line(
        "the same against 16 different prompts",
        "train_groups",
        _speed("different"),
        X,
        0.0,
        0.0,
        tokens_of=("service", "different"),
    ),
    Line(
        "10 bfloat16 steps: difference of the drop",
        "tracking",
        _tracking,
        PERCENT,
        1.0,
        0.2,
        higher_is_better=False,
        tokens_of=(),
    ),
    Line(
        "SFT through the service, against the same step in one process",
        "in_process",
        _speed("engine"),
        X,
        0.93,
        0.98,
        tokens_of=("service", "engine"),
    ),
    Line(
        "SFT, share of the matrix-product peak of its format",
        "roofline",
        _roofline,
        PERCENT,
        45,
        65,
    ),
    Line("the same, of the float32 peak", "roofline", _share_of("float32"), PERCENT, 0, 0),
    Line(
        "peak memory of that step, against padded",
        "train_padded",
        _memory("padded"),
        X,
        1 / 3,
        1 / 5,
        higher_is_better=False,
        tokens_of=(),
    ),
    *(
        Line(
            f"sampling, {n} at once, against generate",
            f"decode_{n}",
            _speed("generate"),
            X,
            least,
            aim,
            tokens_of=("service", "generate"),
        )
        for n, least, aim in ((1, 7.0, 9.0), (8, 6.0, 9.0), (32, 7.0, 12.0))
    ),
    *(
        Line(
            f"sampling, {n} at once, against llama.cpp",
            f"decode_{n}",
            _speed("llama_cpp"),
            X,
            1.0,
            aim,
            tokens_of=("service", "llama_cpp"),
        )
        for n, aim in ((1, 1.5), (8, 4.0), (32, 6.0))
    ),
    Line(
        "decoding 1: bytes read per second, of the read bandwidth",
        "bandwidth",
        _bandwidth,
        PERCENT,
        70,
        85,
    ),
    *(
        Line(
            f"speculative decoding, 1 request, {what}, against without",
            "speculation",
            _ratio(name, f"{name}_plain"),
            X,
            least,
            0.0,
            tokens_of=(name, f"{name}_plain"),
        )
        for name, what, least in (("quote", "a reply that quotes", 1.2), ("story", "a story", 0.95))
    ),
    Line(
        "num_samples=16 against 16 requests",
        "group",
        _speed("separate"),
        X,
        1.4,
        1.8,
        tokens_of=("service", "separate"),
    ),
    Line(
        "the same with prompts of 256 tokens",
        "group_256",
        _speed("separate"),
        X,
        1.4,
        1.8,
        tokens_of=("service", "separate"),
    ),
    Line(
        "num_samples=16 against the same prompt 16 times",
        "group",
        _speed("same_prompt"),
        X,
        0.0,
        0.0,
        tokens_of=("service", "same_prompt"),
    ),
    Line(
        "compute_logprobs against a forward pass",
        "score",
        _speed("generate"),
        X,
        2.5,
        4.0,
        tokens_of=("service", "generate"),
    ),
    Line(
        "compute_logprobs, 64 endings of one 256-token prefix, against different prompts",
        "score_prefix",
        _speed("different"),
        X,
        3.0,
        10.0,
        tokens_of=("service", "different"),
    ),
    Line(
        "8-token forward_backward: overhead of HTTP",
        "http",
        _overhead,
        "{:.0f} ms",
        20,
        8,
        higher_is_better=False,
        tokens_of=(),
    ),
    Line(
        "serve to the first completed step",
        "startup",
        lambda sides: sides["service"]["seconds"],
        "{:.1f} s",
        10,
        6,
        higher_is_better=False,
        tokens_of=(),
    ),
    Line(
        "16 runs on a base: memory of each",
        "runs",
        lambda sides: sides["service"]["extra_bytes"] / 1e6,
        "{:.0f} MB",
        115,
        90,
        higher_is_better=False,
        tokens_of=(),
    ),
    Line(
        "16 runs on a base: step against one run",
        "runs",
        lambda sides: sides["service"]["seconds"] / sides["alone"]["seconds"],
        X,
        1.1,
        1.0,
        higher_is_better=False,
        tokens_of=(),
    ),
    Line(
        "8 adapters together against one",
        "adapters",
        _speed("one_adapter"),
        X,
        0.8,
        0.95,
        tokens_of=("service", "one_adapter"),
    ),
    Line(
        "one sequence of 8,192 tokens: peak memory",
        "context",
        lambda sides: sides["service"]["peak_bytes"] / 1e9,
        "{:.2f} GB",
        6,
        4,
        higher_is_better=False,
    ),
)


def print_report(record: dict[str, Any]) -> None:
    """Print the machine, the table and the skipped rows."""
    print(f"\n{record['machine']}")
    for name, about in record["peers"].items():
        print(f"peer {name}: {about}")
    header = ("work", "median", "rounds (lowest to highest)", "by CPU time", "at least", "aim")
    header += ("tokens/s",)
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for line in LINES:
        cells = _cells(line, record["rows"].get(line.row, []))
        if cells:
            print("| " + " | ".join(cells) + " |")
    for name, reason in record["skipped"].items():
        print(f"skipped {name}: {reason}")


def _cells(line: Line, rounds: Rounds) -> list[str]:
    values, complete = [], []
    for sides in rounds:
        try:
            values.append(line.value(sides))
            complete.append(sides)
        except KeyError:
            continue
    if not values:
        return []
    median = statistics.median(values)
    met = median >= line.target if line.higher_is_better else median <= line.target
    spread = f"{len(values)} ({line.form.format(min(values))} to {line.form.format(max(values))})"
    rates = []
    for side in line.tokens_of:
        rate = statistics.median(
            sides[side]["tokens"] / sides[side]["seconds"] for sides in complete
        )
        rates.append(f"{rate:.0f}")
    stated = line.target == 0
    return [
        line.work,
        line.form.format(median) + ("" if met or stated else " (missed)"),
        spread,
        _cpu_ratio(line, complete),
        "-" if stated else line.form.format(line.target),
        line.form.format(line.aim) if line.aim else "-",
        " / ".join(rates) or "-",
    ]


def _cpu_ratio(line: Line, rounds: Rounds) -> str:
    """Return the ratio of CPU seconds, which other programs on the machine affect less."""
    if len(line.tokens_of) != 2:
        return "-"
    ours, theirs = line.tokens_of
    ratio = statistics.median(
        sides[theirs]["cpu_seconds"] / sides[ours]["cpu_seconds"] for sides in rounds
    )
    return X.format(ratio)
