"""Bounds of the work of one operation of an uploaded loss, from its operands, before it runs.

Sizes may be numbers, tensors with one number, or inside lists and tuples. Operations without a rule
here make at most as many values as their operands hold together or broadcast to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tinker_cookbook.local.engine.loss_graph import walk
from tinker_cookbook.local.errors import UserError

__all__ = ["Cost", "bound"]

_PAIRS = frozenset("sort topk cummax cummin max min aminmax median nanmedian kthvalue mode".split())
"""Operations that return values and their positions: two results."""
_PRODUCTS_PER_SINGULAR_VALUE = 32


@dataclass(frozen=True)
class Cost:
    """Upper bounds for one operation."""

    cells: int
    """Number of values in its results."""
    tensors: int = 1
    """Number of tensors that it reads and makes; views count too, since they are not free."""
    products: int = 0
    """Number of multiplications in a matrix product."""


class _Call:
    """The arguments of an operation, by position or by name."""

    def __init__(self, args: Sequence[object], kwargs: dict[str, object]) -> None:
        self.args = list(args)
        self.kwargs = kwargs

    def get(self, position: int, *names: str, default: object = None) -> object:
        """Return an argument by position or by one of its names."""
        if position < len(self.args):
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def rest(self, position: int, *names: str) -> list[object]:
        """Return all sizes from a position on: `x.repeat(2, 3)`, `x.repeat((2, 3))` or by name."""
        given = self.args[position:] or [self.kwargs[n] for n in names if n in self.kwargs]
        return list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else given

    def tensor(self, position: int, *names: str) -> torch.Tensor:
        """Return an argument that must be a tensor."""
        found = self.get(position, *names)
        if not isinstance(found, torch.Tensor):
            raise UserError(f"{names[0]} is a {type(found).__name__}; expected a tensor")
        return found

    @property
    def owner(self) -> torch.Tensor:
        """The tensor that the operation is a method of."""
        owner = self.get(0, "input", "self")
        if not isinstance(owner, torch.Tensor):
            raise UserError(f"the first operand is a {type(owner).__name__}; expected a tensor")
        return owner


def bound(name: str, args: Sequence[object], kwargs: dict[str, object]) -> Cost:
    """Return the bounds for an operation with this name, such as `repeat`, and these operands.

    Raises:
        UserError: if a size is not a whole number.
    """
    call = _Call(args, kwargs)
    owner = call.get(0)
    if name == "getitem" and isinstance(owner, tuple | list | str):
        return Cost(len(owner) if isinstance(call.get(1), slice) else 0)
    operands = [v for v in walk([*args, kwargs]) if isinstance(v, torch.Tensor)]
    if name in _PRODUCTS:
        cells, products = _PRODUCTS[name](operands)
        return Cost(cells, 1 + len(operands), products)
    if name in _VIEWS:
        total = sum(tensor.numel() for tensor in operands)
        return Cost(total, len(operands) + _VIEWS[name](call))
    rule = _CELLS.get(name)
    cells = _broadcast_size(operands) if rule is None else rule(call)
    products = _spectral_products(name, call)
    return Cost(cells * (2 if name in _PAIRS else 1), 1 + len(operands), products)


def _number(value: object) -> int:
    """Return a size, which is a number or a tensor with one number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        shown = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"a size is given as {shown}; use a whole number")
    return math.ceil(value)


def _real(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError("a bound of the range is not a finite number")
    return float(value)


def _product_of(sizes: Sequence[object]) -> int:
    return math.prod(abs(_number(size)) for size in sizes)


def _broadcast_size(operands: Sequence[torch.Tensor]) -> int:
    total = sum(tensor.numel() for tensor in operands)
    return max(total, math.prod(_broadcast([tensor.shape for tensor in operands])))


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return the largest size of each axis, aligned at the last axis.

    Shapes that do not broadcast are refused when the operation runs.
    """
    rank = max(map(len, shapes), default=0)
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [max(sizes) for sizes in zip(*padded, strict=True)]


# --- operations that make new values ------------------------------------------------------------


def _created(call: _Call) -> int:
    return _product_of(call.rest(0, "size"))


def _created_full(call: _Call) -> int:
    size = call.get(0, "size", default=())
    return _product_of(size if isinstance(size, list | tuple) else [size])


def _created_by(call: _Call) -> int:
    return _product_of(call.rest(1, "size"))


def _created_full_by(call: _Call) -> int:
    size = call.get(1, "size", default=())
    return _product_of(size if isinstance(size, list | tuple) else [size])


def _counted(call: _Call) -> int:
    """Bound `arange(end)`, `arange(start, end)` and `arange(start, end, step)`."""
    names = ("start", "end", "step")
    if len(call.args) == 1 and "end" not in call.kwargs:
        given: dict[str, object] = {"end": call.args[0]}
    else:
        given = dict(zip(names, call.args, strict=False))
    given |= {name: call.kwargs[name] for name in names if name in call.kwargs}
    start, end, step = (_real(given.get(n, d)) for n, d in zip(names, (0.0, 0.0, 1.0), strict=True))
    return math.ceil(min(abs(end - start) / max(abs(step), 1e-300), 1e300)) + 1


# --- operations that repeat or choose ----------------------------------------------------------


def _repeated(call: _Call) -> int:
    return call.owner.numel() * _product_of(call.rest(1, "repeats", "dims", "sizes"))


def _expanded(call: _Call) -> int:
    sizes = [_number(size) for size in call.rest(1, "size", "shape")]
    shape = list(call.owner.shape)
    own = [1] * (len(sizes) - len(shape)) + shape
    pairs = zip(sizes, own[len(own) - len(sizes) :], strict=True)
    return math.prod(old if size == -1 else abs(size) for size, old in pairs)


def _selected(call: _Call) -> int:
    dim = _number(call.get(1, "dim"))
    owner, index = call.owner, call.tensor(2, "index")
    return owner.numel() // max(owner.shape[dim], 1) * index.numel()


def _taken(call: _Call) -> int:
    return call.owner.numel() + call.tensor(1, "index").numel()


def _taken_along(call: _Call) -> int:
    owner, index, dim = call.owner, call.tensor(1, "indices"), call.get(2, "dim")
    if dim is None:
        return owner.numel() + index.numel()
    along, shapes = index.shape[_number(dim)], [list(owner.shape), list(index.shape)]
    for shape in shapes:
        shape[_number(dim)] = 1
    return owner.numel() + along * math.prod(_broadcast(shapes))


def _chosen(call: _Call) -> int:
    """Bound `where`; with a condition alone it returns one index per axis where that holds."""
    operands = [v for v in walk([call.args, call.kwargs]) if isinstance(v, torch.Tensor)]
    alone = len(call.args) + len(call.kwargs) == 1
    return _broadcast_size(operands) * (max(operands[0].ndim, 1) if alone and operands else 1)


def _padded(call: _Call) -> int:
    given = call.get(1, "pad")
    pads = [abs(_number(side)) for side in (given if isinstance(given, list | tuple) else ())]
    shape = list(call.owner.shape)
    for axis in range(min(len(pads) // 2, len(shape))):
        shape[-1 - axis] += pads[2 * axis] + pads[2 * axis + 1]
    return math.prod(shape)


def _one_hot(call: _Call) -> int:
    owner = call.owner
    classes = _number(call.get(1, "num_classes", default=-1))
    if classes < 0:
        classes = int(owner.max()) + 1 if owner.numel() else 0
    return owner.numel() * classes


def _indexed(call: _Call) -> int:
    """Bound `x[index]`: lists and tensors of numbers may name a row many times, and broadcast."""
    owner, index = call.owner, call.get(1)
    items = list(index) if isinstance(index, tuple) else [index]
    num_axes = sum(_num_axes(item) for item in items)
    axes = list(owner.shape)
    kept, picked = 1, []
    for item in items:
        if item is Ellipsis:
            skipped = max(len(axes) - num_axes, 0)
            kept *= math.prod(axes[:skipped])
            axes = axes[skipped:]
            continue
        consumed, axes = axes[: _num_axes(item)], axes[_num_axes(item) :]
        num_axes -= len(consumed)
        if isinstance(item, slice):
            kept *= math.prod(consumed)
        elif isinstance(item, torch.Tensor | list | tuple):
            picked.append(_picked_shape(item))
    chosen = math.prod(_broadcast(picked))
    return max(owner.numel(), kept * chosen * math.prod(axes))


def _num_axes(item: object) -> int:
    """Return how many axes of the owner an item of an index takes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.ndim
    return 1


def _picked_shape(item: torch.Tensor | list | tuple) -> list[int]:
    """Return what an index of numbers, or a mask, adds to the result's shape at most."""
    if isinstance(item, torch.Tensor):
        is_mask = item.dtype in (torch.bool, torch.uint8)
        return [int(item.count_nonzero())] if is_mask else list(item.shape)
    leaves = list(walk(item))
    if any(not isinstance(leaf, int) for leaf in leaves):
        raise UserError("a list as an index holds a value that is not a whole number")
    return [len(leaves)]


# --- views, matrices ----------------------------------------------------------------------------


def _axis(call: _Call, position: int) -> int:
    """Return the size of the axis that `dim` names; the first axis by default."""
    owner = call.owner
    dim = _number(call.get(position, "dim", default=0))
    return owner.shape[dim] if owner.ndim else 1


def _num_unbound(call: _Call) -> int:
    return _axis(call, 1)


def _num_split(call: _Call) -> int:
    size = call.get(1, "split_size_or_sections", "split_size", "split_sizes")
    if isinstance(size, list | tuple):
        return len(size)
    return -(-_axis(call, 2) // max(_number(size), 1))


def _num_chunks(call: _Call) -> int:
    return min(max(_number(call.get(1, "chunks")), 0), _axis(call, 2))


def _matmul(operands: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Return the number of values, including those of broadcast operands, and multiplications."""
    if len(operands) != 2:
        return _broadcast_size(operands), 0
    a, b = (list(tensor.shape) or [1] for tensor in operands)
    rows, inner = (a[-2], a[-1]) if len(a) > 1 else (1, a[-1])
    columns = b[-1] if len(b) > 1 else 1
    batch = math.prod(_broadcast([a[:-2], b[:-2]]))
    copied = batch * inner * (rows + columns) if len(a) != 2 or len(b) != 2 else 0
    return batch * rows * columns + copied, batch * rows * columns * inner


def _outer(operands: Sequence[torch.Tensor]) -> tuple[int, int]:
    cells = math.prod(tensor.numel() for tensor in operands)
    return cells, cells


def _spectral_products(name: str, call: _Call) -> int:
    """Bound matrix norms by singular values: `norm` with "nuc", `linalg_norm` with 2 or -2."""
    orders = {"norm": ("nuc",), "linalg_norm": ("nuc", 2, -2)}.get(name, ())
    if call.get(1, "p", "ord") not in orders or isinstance(call.get(2, "dim"), int):
        return 0
    # Any two axes may form the matrix, so the longest one counts.
    owner = call.owner
    return _PRODUCTS_PER_SINGULAR_VALUE * owner.numel() * max(owner.shape, default=1)


_CELLS: dict[str, Callable[[_Call], int]] = {
    "zeros": _created,
    "ones": _created,
    "full": _created_full,
    "arange": _counted,
    "new_zeros": _created_by,
    "new_ones": _created_by,
    "new_full": _created_full_by,
    "repeat": _repeated,
    "tile": _repeated,
    "expand": _expanded,
    "broadcast_to": _expanded,
    "getitem": _indexed,
    "index_select": _selected,
    "take": _taken,
    "take_along_dim": _taken_along,
    "where": _chosen,
    "pad": _padded,
    "one_hot": _one_hot,
}
_VIEWS: dict[str, Callable[[_Call], int]] = {
    "unbind": _num_unbound,
    "split": _num_split,
    "chunk": _num_chunks,
}
_PRODUCTS: dict[str, Callable[[Sequence[torch.Tensor]], tuple[int, int]]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "dot": _matmul,
    "vdot": _matmul,
    "outer": _outer,
}
