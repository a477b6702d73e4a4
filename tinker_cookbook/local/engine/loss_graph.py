"""A loss that a client traced and uploaded: read from JSON and checked, never executed as code.

The SDK sends the nodes that torch.fx recorded. Here they become plain records, all of whose
operations are on the list of `loss_graph_names`; `training/custom_loss` computes them. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias, Union

from tinker_cookbook.local.engine.loss_graph_names import (
    ATTRIBUTES,
    FUNCTIONS,
    METHODS,
    TORCH_CONSTANTS,
)
from tinker_cookbook.local.errors import UserError

__all__ = [
    "MAX_NODES",
    "Constant",
    "GraphInput",
    "GraphNode",
    "LossGraph",
    "Ref",
    "Slice",
    "Value",
    "parse_loss_graph",
    "walk",
]

MAX_NODES = 1024
MAX_INPUTS = 16
MAX_METRICS = 64
MAX_DEPTH = 8
MAX_VALUES = 4096
"""Maximum number of values in the arguments of one node."""
MAX_TEXT = 64
MAX_INT = 2**63
_NODE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Ref:
    """A reference to the value of an earlier node."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A torch constant, such as `float32`; its kind is a key of `TORCH_CONSTANTS`."""

    kind: str
    name: str


@dataclass(frozen=True)
class Slice:
    """`start:stop:step` of an index."""

    parts: tuple[Value, Value, Value]


_Leaf: TypeAlias = bool | int | float | str | EllipsisType | None
Value: TypeAlias = Union[
    _Leaf, Ref, Constant, Slice, "list[Value]", "tuple[Value, ...]", "dict[str, Value]"
]
"""An argument of a node."""


@dataclass(frozen=True)
class GraphInput:
    """An input that a loss reads from each datum: its name and its number of axes."""

    name: str
    rank: int


@dataclass(frozen=True)
class GraphNode:
    """One operation."""

    name: str
    kind: str
    """`placeholder`, `function`, `method`, `attribute` or `output`."""
    target: str
    args: tuple[Value, ...]
    kwargs: dict[str, Value]


@dataclass(frozen=True)
class LossGraph:
    """A checked graph: placeholders first, the output last, references to earlier nodes only."""

    name: str
    inputs: tuple[GraphInput, ...]
    """`logprobs` first."""
    nodes: tuple[GraphNode, ...]
    num_values: int = 0
    """Number of nodes and of values in their arguments; memory grows with it."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """The `loss_fn_inputs` that the loss reads."""
        return tuple(entry.name for entry in self.inputs[1:])


def parse_loss_graph(name: str, inputs: object, graph: object) -> LossGraph:
    """Read the `inputs` and the `graph` of a create_custom_loss request, which are parsed JSON.

    Raises:
        UserError: naming the node and the problem; also for operations that are not on the list and
            for graphs beyond the size limits.
    """
    checked_inputs = _parse_inputs(inputs)
    if not isinstance(graph, dict) or graph.get("format") != 1:
        found = graph.get("format") if isinstance(graph, dict) else type(graph).__name__
        raise UserError(f"graph.format={str(found)[:40]!r} is not known; this service reads 1")
    raw_nodes = graph.get("nodes")
    if not isinstance(raw_nodes, list) or not raw_nodes:
        raise UserError(
            "graph.nodes is not a list of nodes; trace the loss with create_custom_loss"
        )
    if len(raw_nodes) > MAX_NODES:
        raise UserError(
            f"graph.nodes holds {len(raw_nodes)} operations; at most {MAX_NODES} are accepted"
        )
    nodes: list[GraphNode] = []
    known: set[str] = set()
    num_values = len(raw_nodes)
    for index, raw in enumerate(raw_nodes):
        parser = _NodeParser(raw, index, known)
        node = parser.parse()
        nodes.append(node)
        known.add(node.name)
        num_values += parser.num_values
    _check_placeholders(nodes, checked_inputs)
    _check_output(nodes)
    return LossGraph(name[:128], checked_inputs, tuple(nodes), num_values)


def _parse_inputs(inputs: object) -> tuple[GraphInput, ...]:
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MAX_INPUTS:
        raise UserError(f"inputs must be a list of 1 to {MAX_INPUTS} inputs, logprobs first")
    checked = []
    for index, entry in enumerate(inputs):
        name = entry.get("name") if isinstance(entry, dict) else None
        rank = entry.get("rank") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not _INPUT_NAME.fullmatch(name):
            raise UserError(f"inputs[{index}].name={str(name)[:40]!r} is not an input's name")
        if type(rank) is not int or not 0 <= rank <= 2:
            raise UserError(f"inputs[{index}].rank={str(rank)[:40]} of {name} is not 0, 1 or 2")
        checked.append(GraphInput(name, rank))
    if checked[0].name != "logprobs" or checked[0].rank == 0:
        raise UserError("inputs[0] must be logprobs with rank 1 or 2")
    if len({entry.name for entry in checked}) != len(checked):
        raise UserError("inputs names one input twice; each is named once")
    return tuple(checked)


class _NodeParser:
    """Reads one node; `known` are the names of the nodes before it."""

    def __init__(self, raw: object, index: int, known: set[str]) -> None:
        self._raw: dict[str, object] = raw if isinstance(raw, dict) else {}
        self._known = known
        self.num_values = 0
        name = self._raw.get("name")
        shown = name if isinstance(name, str) else index
        self._where = f"custom loss node {str(shown)[:80]!r}"

    def parse(self) -> GraphNode:
        name, op, target = (self._raw.get(key) for key in ("name", "op", "target"))
        if not isinstance(name, str) or not _NODE_NAME.fullmatch(name):
            raise UserError(f"{self._where}: its name is not an identifier")
        if name in self._known:
            raise UserError(f"{self._where}: an earlier node has this name")
        if not isinstance(op, str) or not isinstance(target, str) or len(target) > 128:
            raise UserError(f"{self._where}: op and target must be texts")
        args, kwargs = self._raw.get("args", []), self._raw.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise UserError(f"{self._where}: args must be a list and kwargs an object")
        kind = self._kind(op, target)
        parsed = tuple(self._value(value) for value in args)
        named = {self._keyword(key, value): self._value(value) for key, value in kwargs.items()}
        if kind == "attribute":
            self._check_attribute(parsed, named)
        return GraphNode(name, kind, target, parsed, named)

    def _kind(self, op: str, target: str) -> str:
        if op in ("placeholder", "output"):
            return op
        if op == "call_function":
            if target == "getattr":
                return "attribute"
            if target in FUNCTIONS:
                return "function"
            raise UserError(
                f"{self._where}: function {target!r} is not on the list of operations of this "
                "service; use elementwise, reducing, indexing and shaping functions of torch"
            )
        if op == "call_method":
            if target in METHODS:
                return "method"
            raise UserError(
                f"{self._where}: tensor method {target!r} is not on the list of operations of this "
                "service"
            )
        raise UserError(
            f"{self._where}: op {op[:40]!r} is not accepted; a loss has placeholder, "
            "call_function, call_method and output nodes"
        )

    def _keyword(self, key: object, value: object) -> str:
        if not isinstance(key, str) or not _NODE_NAME.fullmatch(key):
            raise UserError(f"{self._where}: {str(key)[:40]!r} is not a keyword")
        # fx also records the defaults of torch.nn.functional, so None and False are accepted.
        if key in ("out", "inplace", "generator", "pin_memory", "names") and value:
            raise UserError(f"{self._where}: the keyword {key!r} is not accepted; leave it out")
        return key

    def _check_attribute(self, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
        if len(args) != 2 or kwargs or not isinstance(args[0], Ref) or args[1] not in ATTRIBUTES:
            raise UserError(
                f"{self._where}: only the attributes {', '.join(ATTRIBUTES)} of a tensor can be "
                "read"
            )

    def _value(self, raw: object, depth: int = 0) -> Value:
        self.num_values += 1
        if depth > MAX_DEPTH or self.num_values > MAX_VALUES:
            raise UserError(
                f"{self._where}: its arguments are nested deeper than {MAX_DEPTH} or hold more "
                f"than {MAX_VALUES} values"
            )
        if raw is None or isinstance(raw, bool):
            return raw
        if isinstance(raw, int):
            if abs(raw) >= MAX_INT:
                raise UserError(f"{self._where}: a whole number does not fit 64 bits")
            return raw
        if isinstance(raw, float):
            return raw
        if isinstance(raw, str):
            if len(raw) > MAX_TEXT:
                raise UserError(f"{self._where}: a text has more than {MAX_TEXT} characters")
            return raw
        if isinstance(raw, list):
            return [self._value(item, depth + 1) for item in raw]
        if isinstance(raw, dict) and len(raw) == 1:
            ((kind, content),) = raw.items()
            return self._tagged(kind, content, depth)
        raise UserError(f"{self._where}: the argument {str(raw)[:80]} is not understood")

    def _tagged(self, kind: str, content: object, depth: int) -> Value:
        if kind == "ref" and isinstance(content, str):
            if content not in self._known:
                raise UserError(f"{self._where}: it refers to {content[:80]!r}, no earlier node")
            return Ref(content)
        if kind == "tuple" and isinstance(content, list):
            return tuple(self._value(item, depth + 1) for item in content)
        if kind == "slice" and isinstance(content, list) and len(content) == 3:
            start, stop, step = (self._value(item, depth + 1) for item in content)
            return Slice((start, stop, step))
        if kind == "dict" and isinstance(content, dict):
            return {str(key): self._value(item, depth + 1) for key, item in content.items()}
        if kind == "ellipsis" and content is True:
            return Ellipsis
        if kind == "float" and isinstance(content, str) and content in _NON_FINITE:
            return _NON_FINITE[content]
        if isinstance(content, str) and content in TORCH_CONSTANTS.get(kind, ()):
            return Constant(kind, content)
        raise UserError(
            f"{self._where}: the argument {{{kind[:40]!r}: {str(content)[:40]}}} is not accepted"
        )


def _check_placeholders(nodes: list[GraphNode], inputs: tuple[GraphInput, ...]) -> None:
    names = [node.target for node in nodes if node.kind == "placeholder"]
    if names != [entry.name for entry in inputs]:
        raise UserError(
            f"the graph's placeholders are {names[:MAX_INPUTS]} and inputs names "
            f"{[entry.name for entry in inputs]}; they must be equal"
        )


def _check_output(nodes: list[GraphNode]) -> None:
    outputs = [node for node in nodes if node.kind == "output"]
    if len(outputs) != 1 or outputs[0] is not nodes[-1]:
        raise UserError("the graph has no single output node at its end")
    where = f"custom loss node {outputs[0].name!r}"
    returned = outputs[0].args[0] if len(outputs[0].args) == 1 else None
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise UserError(f"{where}: the loss must return (loss, metrics)")
    loss, metrics = returned
    if not isinstance(loss, Ref) or not isinstance(metrics, dict) or len(metrics) > MAX_METRICS:
        raise UserError(
            f"{where}: the loss must be a tensor and metrics a dict of at most {MAX_METRICS}"
        )
    for key, value in metrics.items():
        if not _METRIC_NAME.fullmatch(key) or not isinstance(value, Ref):
            raise UserError(
                f"{where}: metric {key[:80]!r} is not accepted; expected a tensor named "
                "custom/NAME:sum or custom/NAME:mean in lowercase"
            )


def walk(value: object) -> Iterator[object]:
    """Yield every value inside nested lists, tuples, dicts and slices."""
    items: Sequence[object] | None = None
    if isinstance(value, Slice):
        items = value.parts
    elif isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = value
    if items is None:
        yield value
        return
    for item in items:
        yield from walk(item)
