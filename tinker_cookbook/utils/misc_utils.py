"""Small general functions. Their names are public."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "all_same",
    "concat_lists",
    "dict_mean",
    "iteration_dir",
    "lookup_func",
    "not_none",
    "safezip",
    "split_list",
    "timed",
]

T = TypeVar("T")

safezip = cast(type[zip], lambda *iterables: zip(*iterables, strict=True))
"""`zip` that raises ValueError when the lengths differ."""


@contextlib.contextmanager
def timed(key: str, metrics: MutableMapping[str, float]) -> Iterator[None]:
    """Store the seconds spent inside the block as `metrics["time/<key>"]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        metrics[f"time/{key}"] = time.perf_counter() - started


def dict_mean(list_of_dicts: Sequence[Mapping[str, float | int | None]]) -> dict[str, float]:
    """Average each key over the dicts in which it has a value."""
    values: dict[str, list[float]] = {}
    for row in list_of_dicts:
        for key, value in row.items():
            if value is not None:
                values.setdefault(key, []).append(float(value))
    return {key: sum(found) / len(found) for key, found in values.items()}


def all_same(xs: Sequence[object]) -> bool:
    """Return whether every element equals the first; true for an empty sequence."""
    return all(x == xs[0] for x in xs)


def lookup_func(path_to_func: str, default_module: str | None = None) -> Any:
    """Import and return the object named by `module:name` or `module.name`.

    Args:
        path_to_func: Path; a name without a module is looked up in `default_module`.
        default_module: Module for names without one.

    Raises:
        ConfigurationError: if the module or the name does not exist.
    """
    separator = ":" if ":" in path_to_func else "."
    module_name, _, name = path_to_func.rpartition(separator)
    module_name = module_name or default_module or ""
    if not module_name:
        raise ConfigurationError(
            f"path_to_func={path_to_func!r} has no module; use module:function."
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"path_to_func={path_to_func!r} cannot be imported ({error}); use module:function."
        ) from error


def split_list(lst: Sequence[T], num_splits: int) -> list[list[T]]:
    """Cut a sequence into `num_splits` consecutive pieces whose lengths differ by at most one.

    Raises:
        ConfigurationError: if there are more pieces than elements, or fewer than one.
    """
    if not 1 <= num_splits <= len(lst):
        raise ConfigurationError(
            f"num_splits={num_splits} is out of range; use 1 to {len(lst)} (the list's length)."
        )
    edges = [round(i * len(lst) / num_splits) for i in range(num_splits + 1)]
    return [list(lst[a:b]) for a, b in itertools.pairwise(edges)]


def concat_lists(list_of_lists: Sequence[Sequence[T]]) -> list[T]:
    """Join lists into one."""
    return [x for xs in list_of_lists for x in xs]


def not_none(x: T | None) -> T:
    """Return `x`, which the caller knows to be set."""
    assert x is not None, "expected a value, got None"
    return x


def iteration_dir(log_path: str | Path | None, step: int) -> Path | None:
    """Return the folder of a step's files in a run directory; None without a run directory."""
    return None if log_path is None else Path(log_path) / f"iteration_{step:06d}"
