"""Runs an operation of an uploaded loss: from a fixed table, its size bounded before it runs."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tinker_cookbook.local.engine.loss_graph_names import FUNCTIONS
from tinker_cookbook.local.engine.training.graph_bounds import Cost, bound
from tinker_cookbook.local.errors import UserError

__all__ = ["Budget", "call_function", "call_method", "read_attribute"]

_MAX_CELLS = 2**26
_CELLS_PER_TENSOR = 1024
_MAX_PRODUCTS = 2**32
_MAX_SECONDS = 10.0
"""Of the engine's thread, for the data that are computed together; it serves others between."""
_MAX_INT = 2**63
_ROOTS: dict[str, Any] = {"torch": torch, "math": math, "operator": operator}
_ARITHMETIC = frozenset(
    f"operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
)


class Budget:
    """What the graph of one datum may still compute, and how long those of a pack may take."""

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` is of `time.thread_time()`; a full time from now unless given."""
        self._cells, self._products = _MAX_CELLS, _MAX_PRODUCTS
        self._deadline = Budget.deadline() if deadline is None else deadline

    @staticmethod
    def deadline() -> float:
        """When the work that this thread begins now has taken too long."""
        return time.thread_time() + _MAX_SECONDS

    def take(self, cost: Cost) -> None:
        """Raises UserError with the numbers where something is exceeded."""
        self._cells -= cost.cells + _CELLS_PER_TENSOR * cost.tensors
        self._products -= cost.products
        if self._cells < 0:
            raise UserError(
                f"a result of up to {cost.cells:,} values and {cost.tensors:,} tensors goes beyond "
                f"the {_MAX_CELLS:,} values that all results for one datum may have (a tensor "
                f"counts as {_CELLS_PER_TENSOR:,} more)"
            )
        if self._products < 0:
            raise UserError(f"a product of {cost.products:,} multiplications is too large")
        if time.thread_time() > self._deadline:
            raise UserError(f"the loss takes longer than {_MAX_SECONDS:g} s; make it simpler")


def _resolve(name: str) -> Callable[..., Any]:
    root, *path = name.split(".")
    found = _ROOTS[root]
    for part in path:
        found = getattr(found, part)
    return found


_FUNCTIONS: dict[str, Callable[..., Any]] = {name: _resolve(name) for name in FUNCTIONS}


def call_function(target: str, args: Sequence[Any], kwargs: dict[str, Any], budget: Budget) -> Any:
    """Call a function of the table with values; the result's size is charged first."""
    if target in _ARITHMETIC:
        _check_numbers(target, args)
    budget.take(bound(target.rsplit(".", 1)[-1], args, kwargs))
    return _checked(_FUNCTIONS[target](*args, **kwargs))


def call_method(target: str, args: Sequence[Any], kwargs: dict[str, Any], budget: Budget) -> Any:
    """Call a method of the tensor `args[0]`."""
    if not args or not isinstance(args[0], torch.Tensor):
        raise UserError(f"method {target!r} is called on something that is no tensor")
    budget.take(bound(target, args, kwargs))
    return _checked(getattr(torch.Tensor, target)(*args, **kwargs))


def read_attribute(owner: Any, name: str) -> Any:
    """`shape`, `dtype` and the like of a tensor, `values` and `indices` of a pair of them."""
    of_pair = name in ("values", "indices")
    if of_pair != isinstance(owner, tuple) or not isinstance(owner, torch.Tensor | tuple):
        raise UserError(f"{type(owner).__name__} has no attribute {name!r} that can be read")
    return getattr(owner, name)


def _checked(result: Any) -> Any:
    if isinstance(result, int) and abs(result) >= _MAX_INT:
        raise UserError("the result is a whole number beyond 64 bits")
    return result


def _check_numbers(target: str, args: Sequence[Any]) -> None:
    """Python would multiply texts and lists, and raise whole numbers to any power."""
    for value in args:
        if not isinstance(value, torch.Tensor | int | float):
            raise UserError(f"{target} takes tensors and numbers, not a {type(value).__name__}")
    if target == "operator.pow" and all(isinstance(value, int) for value in args):
        base, exponent = args
        if base.bit_length() * abs(exponent) > 64:
            raise UserError(f"{base} ** {exponent} is beyond 64 bits")
