"""Runs one operation of an uploaded loss.

Functions come from a fixed table, and the size of a result is bounded before it is computed.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from tinker_cookbook.local.engine.loss_graph_names import FUNCTIONS
from tinker_cookbook.local.engine.training.graph_bounds import Cost, bound
from tinker_cookbook.local.errors import UserError

__all__ = ["Budget", "call_function", "call_method", "read_attribute"]

_MAX_CELLS = 2**26
_CELLS_PER_TENSOR = 1024
_MAX_PRODUCTS = 2**32
_MAX_SECONDS = 10.0
"""Maximum time of the engine's thread for one pack; it serves other requests between packs."""
_MAX_INT = 2**63
_ROOTS: dict[str, ModuleType] = {"torch": torch, "math": math, "operator": operator}
_ARITHMETIC = frozenset(
    f"operator.{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
)


class Budget:
    """The remaining work for the graph of one datum, and the time limit for those of a pack."""

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` is a value of `time.thread_time()`; None allows the full time from now."""
        self._cells, self._products = _MAX_CELLS, _MAX_PRODUCTS
        self._deadline = Budget.deadline() if deadline is None else deadline

    @staticmethod
    def deadline() -> float:
        """Return the time at which work that this thread begins now has taken too long."""
        return time.thread_time() + _MAX_SECONDS

    def take(self, cost: Cost) -> None:
        """Charge an operation.

        Raises:
            UserError: with the numbers, if a limit is exceeded.
        """
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


def _resolve(name: str) -> Callable[..., object]:
    root, *path = name.split(".")
    found = _ROOTS[root]
    for part in path:
        found = getattr(found, part)
    assert callable(found), "the list holds functions"
    return found


_FUNCTIONS: dict[str, Callable[..., object]] = {name: _resolve(name) for name in FUNCTIONS}


def call_function(
    target: str, args: Sequence[object], kwargs: dict[str, object], budget: Budget
) -> object:
    """Call a function of the table; the result's size is charged first."""
    if target in _ARITHMETIC:
        _check_numbers(target, args)
    budget.take(bound(target.rsplit(".", 1)[-1], args, kwargs))
    return _checked(_FUNCTIONS[target](*args, **kwargs))


def call_method(
    target: str, args: Sequence[object], kwargs: dict[str, object], budget: Budget
) -> object:
    """Call a method of the tensor `args[0]`; the result's size is charged first."""
    if not args or not isinstance(args[0], torch.Tensor):
        raise UserError(f"method {target!r} is called on a value that is not a tensor")
    budget.take(bound(target, args, kwargs))
    return _checked(getattr(torch.Tensor, target)(*args, **kwargs))


def read_attribute(owner: object, name: str) -> object:
    """Read an attribute of a tensor, such as `shape`, or `values` or `indices` of a result pair."""
    of_pair = name in ("values", "indices")
    if of_pair != isinstance(owner, tuple) or not isinstance(owner, torch.Tensor | tuple):
        raise UserError(f"{type(owner).__name__} has no attribute {name!r} that can be read")
    return getattr(owner, name)


def _checked(result: object) -> object:
    if isinstance(result, int) and abs(result) >= _MAX_INT:
        raise UserError("the result is a whole number beyond 64 bits")
    return result


def _check_numbers(target: str, args: Sequence[object]) -> None:
    """Refuse operands that Python would take too: texts, lists, and powers of any size."""
    for value in args:
        if not isinstance(value, torch.Tensor | int | float):
            raise UserError(f"{target} takes tensors and numbers, not a {type(value).__name__}")
    if target == "operator.pow" and len(args) == 2:
        base, exponent = args
        if not isinstance(base, int) or not isinstance(exponent, int):
            return
        if base.bit_length() * abs(exponent) > 64:
            raise UserError(f"{base} ** {exponent} is beyond 64 bits")
