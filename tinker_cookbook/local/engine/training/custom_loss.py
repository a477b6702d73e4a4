"""Computes an uploaded loss: one graph per datum, the losses summed, the gradient by autograd.

As the SDK defines it, each datum's graph reads the datum's logprobs and the inputs that it names,
and returns a scalar loss and scalar metrics. The suffix of a metric's name says whether it is
summed or averaged over the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from tinker_cookbook.local.engine.loss_graph import (
    Constant,
    GraphNode,
    LossGraph,
    Ref,
    Slice,
)
from tinker_cookbook.local.engine.training.graph_ops import (
    Budget,
    call_function,
    call_method,
    read_attribute,
)
from tinker_cookbook.local.errors import UserError

__all__ = ["DatumInputs", "GraphPackLoss", "run_graph"]

DatumInputs = Mapping[str, torch.Tensor]
"""The inputs of one datum's graph without logprobs: float32 or int64 with the declared rank."""


def run_graph(
    graph: LossGraph,
    logprobs: torch.Tensor,
    inputs: DatumInputs,
    *,
    deadline: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the scalar loss and the scalar metrics of one datum.

    Args:
        logprobs: float32 [N] or [N, K], as declared.
        deadline: as for `Budget`.

    Raises:
        UserError: naming the node that cannot be computed.
    """
    return _Interpreter(graph, logprobs, inputs, Budget(deadline)).run()


class _Interpreter:
    """One evaluation of a graph."""

    def __init__(
        self, graph: LossGraph, logprobs: torch.Tensor, inputs: DatumInputs, budget: Budget
    ) -> None:
        self._graph = graph
        self._given = {"logprobs": logprobs, **inputs}
        self._device = logprobs.device
        self._values: dict[str, object] = {}
        self._budget = budget

    def run(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for node in self._graph.nodes[:-1]:
            try:
                self._values[node.name] = self._compute(node)
            # Any error of torch here comes from the client's arguments.
            except Exception as error:
                raise self._refuse(node, error) from error
        output = self._graph.nodes[-1]
        # `parse_loss_graph` has checked that the output is a pair of a node and a dict of nodes.
        loss, named = cast("tuple[object, dict[str, object]]", self._value(output.args[0]))
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
            shown = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise self._refuse(output, UserError(f"the loss must be a scalar tensor, got {shown}"))
        metrics: dict[str, torch.Tensor] = {}
        for key, value in named.items():
            if not isinstance(value, torch.Tensor) or value.numel() != 1:
                raise self._refuse(output, UserError(f"metric {key!r} is not a scalar tensor"))
            metrics[key] = value
        return loss, metrics

    def _refuse(self, node: GraphNode, error: Exception) -> UserError:
        text = str(error).split("\n", 1)[0][:300] or type(error).__name__
        return UserError(
            f"custom loss {self._graph.name!r}: node {node.name!r} ({node.target}): {text}"
        )

    def _compute(self, node: GraphNode) -> object:
        if node.kind == "placeholder":
            return self._given[node.target]
        args = [self._value(value) for value in node.args]
        kwargs = {key: self._value(value) for key, value in node.kwargs.items()}
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = self._device
        if node.kind == "attribute":
            return read_attribute(args[0], str(args[1]))
        call = call_method if node.kind == "method" else call_function
        return call(node.target, args, kwargs, self._budget)

    def _value(self, value: object) -> object:
        """Replace references and constants in an argument by what they stand for."""
        if isinstance(value, Ref):
            return self._values[value.name]
        if isinstance(value, Constant):
            # A tensor that the loss makes must be on the device of its logprobs.
            return self._device if value.kind == "device" else getattr(torch, value.name)
        if isinstance(value, Slice):
            return slice(*(self._value(part) for part in value.parts))
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._value(item) for item in value)
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        return value


class GraphPackLoss:
    """The uploaded loss of one pack, a `PackLoss`; computed for all rows at once."""

    by_sequence = True

    def __init__(
        self, graph: LossGraph, inputs: Sequence[DatumInputs], lengths: Sequence[int]
    ) -> None:
        """`inputs` and `lengths` describe the pack's data, in the order of its rows."""
        self.total = 0.0
        self.metrics: dict[str, float] = {}
        """Sums over the data of the pack."""
        self._graph, self._inputs, self._lengths = graph, inputs, list(lengths)
        self._gradient: torch.Tensor | None = None

    def see_all(self, training_logprobs: torch.Tensor) -> None:
        """Compute everything from logprobs [M, K]."""
        is_flat = self._graph.inputs[0].rank == 1
        gradients = []
        deadline = Budget.deadline()
        parts = training_logprobs.split(self._lengths)
        for logprobs, inputs in zip(parts, self._inputs, strict=True):
            leaf = (logprobs[:, 0] if is_flat else logprobs).detach().clone().requires_grad_()
            with torch.enable_grad():
                loss, metrics = run_graph(self._graph, leaf, inputs, deadline=deadline)
            gradients.append(self._differentiate(loss, leaf).reshape(logprobs.shape))
            self.total += float(loss.detach().double())
            for key, value in metrics.items():
                self.metrics[key] = self.metrics.get(key, 0.0) + float(value.detach())
        self._gradient = torch.cat(gradients)

    def gradient(self, rows: slice, training_logprobs: torch.Tensor) -> torch.Tensor:
        """Return the gradient [C, K] of these rows."""
        assert self._gradient is not None, "see_all comes first"
        return self._gradient[rows]

    def _differentiate(self, loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        found = None
        if loss.requires_grad:
            try:
                (found,) = torch.autograd.grad(loss, leaf, allow_unused=True)
            except RuntimeError as error:
                raise UserError(
                    f"custom loss {self._graph.name!r} cannot be differentiated: {error}"
                ) from error
        if found is None:
            raise UserError(
                f"custom loss {self._graph.name!r} does not depend on logprobs, so nothing would "
                "be trained; did it detach them?"
            )
        return found.float()
