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
    from tinker_cookbook.eval.endpoint import EndpointClient, endpoint_format
    from tinker_cookbook.eval.eval_store import EvalStore, RunMetadata

__all__ = [
    "REGISTRY",
    "BenchmarkBuilder",
    "BenchmarkConfig",
    "BenchmarkEvaluator",
    "BenchmarkEvaluatorBuilder",
    "BenchmarkResult",
    "EndpointClient",
    "EvalStore",
    "Evaluator",
    "EvaluatorBuilder",
    "RunMetadata",
    "SamplingClientEvaluator",
    "SamplingClientEvaluatorBuilder",
    "StoredTrajectory",
    "TrainingClientEvaluator",
    "compare_results",
    "endpoint_format",
    "load_result",
    "print_trajectory",
    "register",
    "run_benchmark",
    "run_benchmarks",
]


_MODULES = {
    "BenchmarkEvaluator": "benchmark_evaluator",
    "BenchmarkEvaluatorBuilder": "benchmark_evaluator",
    "EndpointClient": "endpoint",
    "EvalStore": "eval_store",
    "RunMetadata": "eval_store",
    "endpoint_format": "endpoint",
}


def __getattr__(name: str) -> object:
    """Import benchmarks when they are first used: they need `rl`, whose evaluators need this."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'benchmarks')}")
    return getattr(module, name)
