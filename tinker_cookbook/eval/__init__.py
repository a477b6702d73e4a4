"""Evaluators that run during training, and benchmarks of finished models."""

from importlib import import_module
from typing import TYPE_CHECKING

from tinker_cookbook.eval.evaluators import (
    Evaluator,
    EvaluatorBuilder,
    SamplingClientEvaluator,
    SamplingClientEvaluatorBuilder,
    TrainingClientEvaluator,
)

if TYPE_CHECKING:
    from tinker_cookbook.eval.benchmark_evaluator import (
        BenchmarkEvaluator,
        BenchmarkEvaluatorBuilder,
    )
    from tinker_cookbook.eval.benchmarks import (
        REGISTRY,
        BenchmarkBuilder,
        BenchmarkConfig,
        BenchmarkResult,
        StoredTrajectory,
        compare_results,
        load_result,
        print_trajectory,
        register,
        run_benchmark,
        run_benchmarks,
    )

__all__ = [
    "REGISTRY",
    "BenchmarkBuilder",
    "BenchmarkConfig",
    "BenchmarkEvaluator",
    "BenchmarkEvaluatorBuilder",
    "BenchmarkResult",
    "Evaluator",
    "EvaluatorBuilder",
    "SamplingClientEvaluator",
    "SamplingClientEvaluatorBuilder",
    "StoredTrajectory",
    "TrainingClientEvaluator",
    "compare_results",
    "load_result",
    "print_trajectory",
    "register",
    "run_benchmark",
    "run_benchmarks",
]


def __getattr__(name: str) -> object:
    """Import benchmarks when they are first used: they need `rl`, whose evaluators need this."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    evaluator = name.startswith("BenchmarkEvaluator")
    module = "benchmark_evaluator" if evaluator else "benchmarks"
    return getattr(import_module(f"{__name__}.{module}"), name)
