"""Score a checkpoint or a model on benchmarks, and compare it with another one."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.evaluation_target import add_endpoint_arguments, open_target
from tinker_cookbook.commands.parts.sampler_target import add_sampler_arguments
from tinker_cookbook.exceptions import ConfigurationError, EvalError

if TYPE_CHECKING:
    from tinker_cookbook.commands.parts.evaluation_target import EvaluationTarget
    from tinker_cookbook.eval.benchmarks import BenchmarkConfig, BenchmarkResult

__all__ = ["add_arguments", "run"]

MAX_TOKENS = 1024
TEMPERATURE = 0.6
CONCURRENCY = 16
_HEADER = ("benchmark", "score", "correct", "truncated", "errors", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_sampler_arguments(parser, max_tokens=MAX_TOKENS)
    add_endpoint_arguments(parser)
    parser.set_defaults(temperature=TEMPERATURE)
    parser.add_argument(
        "--benchmarks",
        default="arithmetic",
        metavar="A,B",
        help="names of benchmarks, or `list` to show all (default: %(default)s)",
    )
    parser.add_argument(
        "--max-examples", type=int, metavar="N", help="examples per benchmark (default: all)"
    )
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="another checkpoint or model, or the folder of an earlier evaluation",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="replies per example; with 2 or more, pass@k is shown (default: %(default)s)",
    )
    parser.add_argument(
        "--save-dir",
        metavar="FOLDER",
        help="folder for replies and scores (default: one in ~/tinker-runs/eval that is named "
        "after the model and the settings); the same command resumes there",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start anew if the folder holds replies of other settings; they are moved aside",
    )
    parser.add_argument(
        "--regrade",
        action="store_true",
        help="grade the stored replies with the current graders first, without sampling",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="data of a benchmark: a JSONL file, `hub`, or `package`; can be repeated",
    )
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="system prompt that replaces the benchmark's; an empty text removes it",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        metavar="N",
        help="examples at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="time limit of one attempt at an example (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a table; the status is 1 if some replies have no grade."""
    from tinker_cookbook.eval.benchmarks import REGISTRY, find_benchmark

    if args.benchmarks == "list":
        for name in sorted(REGISTRY):
            print(f"{name:12} {(type(REGISTRY[name]).__doc__ or '').strip().splitlines()[0]}")
        return 0
    names = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
    try:
        for name in names:
            find_benchmark(name)
    except EvalError as error:
        raise ConfigurationError(error.args[0]) from error
    _show_progress()
    evaluations = [_evaluate(args, args.target, names)]
    if args.compare is not None:
        stored = _stored(args.compare, names)
        evaluations.append(stored or _evaluate(_without_endpoint(args), args.compare, names))
    _print_table(evaluations)
    if args.compare is not None:
        _print_comparison(evaluations[0], evaluations[1])
    return int(any(result.num_errors for each in evaluations for result in each.results))


@dataclass(frozen=True)
class _Evaluation:
    """The results of one model."""

    target: str
    save_dir: str
    results: Sequence[BenchmarkResult]


def _evaluate(args: argparse.Namespace, target: str | None, names: list[str]) -> _Evaluation:
    from tinker_cookbook.eval.benchmarks import run_benchmarks

    words = argparse.Namespace(**{**vars(args), "target": target})
    with open_target(words) as opened:
        config = _config(args, opened, target)
        assert config.save_dir is not None, "`_config` sets it"
        print(f"replies  {config.save_dir}", flush=True)
        if args.regrade:
            _regrade(config.save_dir, names)
        found = asyncio.run(
            run_benchmarks(names, opened.client, opened.renderer, config, parallel=False)
        )
    return _Evaluation(opened.name, config.save_dir, list(found.values()))


def _without_endpoint(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options for the second model, which is not at the endpoint."""
    if args.endpoint is None:
        return args
    return argparse.Namespace(**{**vars(args), "endpoint": None, "model": None})


def _config(
    args: argparse.Namespace, opened: EvaluationTarget, target: str | None
) -> BenchmarkConfig:
    from tinker_cookbook.cli_utils import runs_path
    from tinker_cookbook.eval.benchmarks import BenchmarkConfig

    settings = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "num_samples": args.num_samples,
        "system_prompt": args.system_prompt,
        "data": _data(args.data),
    }
    key = repr([opened.name, opened.renderer._renderer_name, *sorted(settings.items())])
    words = re.sub(r"[^A-Za-z0-9.]+", "-", opened.name.removeprefix("tinker://")).strip("-.")
    name = f"{words[-60:].strip('-.')}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    save_dir = args.save_dir
    if save_dir is not None and args.compare is not None:
        save_dir = str(Path(save_dir) / ("other" if target == args.compare else "target"))
    if opened.model_with_files is None:
        settings["context_window"] = None
    return BenchmarkConfig.for_model(
        opened.model_with_files or "",
        max_examples=args.max_examples,
        concurrency=args.concurrency,
        timeout_seconds=args.timeout,
        save_dir=save_dir or str(Path(runs_path("eval", name)).expanduser()),
        if_settings_differ="restart" if args.restart else "refuse",
        **settings,
    )


def _data(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not (name and equals and source):
            raise ConfigurationError(f"--data={each} is not NAME=FILE; use for instance gsm8k=hub.")
        found[name] = source
    return found


def _regrade(save_dir: str, names: list[str]) -> None:
    from tinker_cookbook.eval.benchmarks import load_trajectories, regrade_trajectories

    for name in names:
        if load_trajectories(save_dir, name):
            regrade_trajectories(save_dir, name)


def _stored(other: str, names: list[str]) -> _Evaluation | None:
    """Return an earlier evaluation; None if `other` is not the folder of one."""
    from tinker_cookbook.eval.benchmarks import load_result

    if not (Path(other).expanduser() / "summary.json").exists():
        return None
    results = [load_result(other, name) for name in names]
    missing = [name for name, result in zip(names, results, strict=True) if result is None]
    if missing:
        raise ConfigurationError(f"--compare={other} has no result of {', '.join(missing)}.")
    return _Evaluation(other, other, [result for result in results if result is not None])


def _print_table(evaluations: Sequence[_Evaluation]) -> None:
    for evaluation in evaluations:
        rows = [_HEADER, *map(_row, evaluation.results)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        print(f"\n{evaluation.target}")
        for row in rows:
            cells = [
                f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
        for result in evaluation.results:
            _print_details(result)


def _row(result: BenchmarkResult) -> tuple[str, ...]:
    replies = result.num_examples * result.num_samples - result.num_errors
    return (
        result.name,
        f"{result.score:.3f} ± {result.standard_error:.3f}",
        f"{result.num_correct}/{replies}",
        str(result.num_truncated),
        str(result.num_errors),
        f"{result.time_seconds:.1f}",
    )


def _print_details(result: BenchmarkResult) -> None:
    parts = [f"{name} {value:.3f}" for name, value in result.metrics.items()]
    parts += [f"pass@{k} {value:.3f}" for k, value in result.pass_at_k.items()]
    if parts:
        print(f"  {result.name}: {', '.join(parts)}")


def _print_comparison(first: _Evaluation, other: _Evaluation) -> None:
    from tinker_cookbook.eval.benchmarks import compare_results

    print(f"\n{first.target} minus {other.target}, on the same examples")
    for result in first.results:
        found = compare_results(other.save_dir, first.save_dir, result.name)
        low, high = found.interval
        print(
            f"  {result.name}: {found.difference:+.3f} ± {found.standard_error:.3f} (95 % interval "
            f"{low:+.3f} to {high:+.3f}), p = {found.p_value:.3g}, {found.num_better} better, "
            f"{found.num_worse} worse, {found.num_examples} examples"
        )


def _show_progress() -> None:
    logger = logging.getLogger("tinker_cookbook.eval")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
