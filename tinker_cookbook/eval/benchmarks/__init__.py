"""Benchmarks: the registered ones, how they are run, and how stored runs are read."""

from tinker_cookbook.eval.benchmarks import (
    aime,
    arithmetic,
    ceval,
    gpqa,
    gsm8k,
    hellaswag,
    humaneval,
    ifbench,
    ifeval,
    math500,
    mbpp,
    mmlu,
    mmlu_pro,
    mmlu_redux,
    supergpqa,
    truthfulqa,
)
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, Row
from tinker_cookbook.eval.benchmarks._likelihood import LikelihoodBenchmark
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.eval.benchmarks._registry import REGISTRY, find_benchmark, register
from tinker_cookbook.eval.benchmarks._results import compare_results
from tinker_cookbook.eval.benchmarks._runner import (
    load_result,
    load_summary,
    load_trajectories,
    print_trajectory,
    regrade_trajectories,
    run_benchmark,
    run_benchmarks,
)
from tinker_cookbook.eval.benchmarks._types import (
    BenchmarkBuilder,
    BenchmarkConfig,
    BenchmarkResult,
    Grade,
    StoredTrajectory,
    StoredTurn,
)

__all__ = [
    "REGISTRY",
    "BenchmarkBuilder",
    "BenchmarkConfig",
    "BenchmarkData",
    "BenchmarkResult",
    "Grade",
    "LikelihoodBenchmark",
    "QuestionBenchmark",
    "Row",
    "StoredTrajectory",
    "StoredTurn",
    "aime",
    "arithmetic",
    "ceval",
    "compare_results",
    "find_benchmark",
    "gpqa",
    "gsm8k",
    "hellaswag",
    "humaneval",
    "ifbench",
    "ifeval",
    "load_result",
    "load_summary",
    "load_trajectories",
    "math500",
    "mbpp",
    "mmlu",
    "mmlu_pro",
    "mmlu_redux",
    "print_trajectory",
    "register",
    "regrade_trajectories",
    "run_benchmark",
    "run_benchmarks",
    "supergpqa",
    "truthfulqa",
]
