"""The benchmarks by name."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._types import BenchmarkBuilder
from tinker_cookbook.exceptions import BenchmarkNotFoundError
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = ["REGISTRY", "find_benchmark", "register"]

REGISTRY: dict[str, BenchmarkBuilder] = {}


def register(builder: BenchmarkBuilder) -> BenchmarkBuilder:
    """Make a benchmark known by its name; a later one replaces an earlier one of that name."""
    REGISTRY[builder.name] = builder
    return builder


def find_benchmark(name: str) -> BenchmarkBuilder:
    """Return the benchmark with this name.

    Raises:
        BenchmarkNotFoundError: if there is none; the message has the nearest name and the list.
    """
    if name not in REGISTRY:
        known = ", ".join(sorted(REGISTRY))
        raise BenchmarkNotFoundError(
            f"benchmark={name!r} is unknown.{did_you_mean(name, REGISTRY)} Use one of {known}."
        )
    return REGISTRY[name]
