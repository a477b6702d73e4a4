"""Uploaded losses: what the SDK traces is computed as the SDK computes it; all else is refused."""

# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tinker_cookbook.local.engine.loss_graph import MAX_NODES, LossGraph, parse_loss_graph
from tinker_cookbook.local.engine.training import graph_ops
from tinker_cookbook.local.engine.training.custom_loss import GraphPackLoss, run_graph
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.state.uploaded_losses import MAX_VALUES_PER_SESSION, LossTable

N = 7


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of one datum in float64, so that differences show the gradient."""
    rng = np.random.default_rng(seed)
    return {
        "logprobs": torch.from_numpy(-rng.exponential(1.0, N) - 0.1),
        "advantages": torch.from_numpy(rng.standard_normal(N)),
        "old": torch.from_numpy(-rng.exponential(1.0, N) - 0.1),
        "mask": torch.tensor([0.0, 1, 1, 0, 1, 1, 1], dtype=torch.float64),
        "scale": torch.tensor(0.7, dtype=torch.float64),
    }


def reinforce(logprobs, advantages):
    loss = -(logprobs * advantages).sum()
    return loss, {"custom/loss:sum": loss}


def clipped(logprobs, old, advantages, mask):
    ratio = torch.exp(logprobs - old)
    bounded = ratio.clamp(min=0.8, max=1.2)
    per_token = -torch.minimum(ratio * advantages, bounded * advantages) * mask
    inside = ((ratio > 0.8) & (ratio < 1.2)).float()
    loss = per_token.sum() / mask.sum().clamp(min=1.0)
    return loss, {"custom/inside:mean": inside.mean(), "custom/ratio:sum": ratio.sum().detach()}


def sequence_level(logprobs, old, advantages, mask):
    drift = torch.where(mask > 0, logprobs - old, torch.zeros_like(logprobs))
    ratio = torch.exp(drift.sum() / mask.sum())
    loss = -ratio * advantages[0] + 0.1 * F.mse_loss(logprobs, old, reduction="sum")
    return loss, {}


def shapes_and_numbers(logprobs, advantages, scale):
    count = logprobs.shape[0]
    tail = logprobs[1:] - logprobs[:-1]
    stacked = torch.stack([tail, advantages[1:]], dim=1)
    best = torch.max(logprobs, dim=0).values
    loss = (stacked.softmax(dim=-1)[..., 0] * scale).sum() / math.sqrt(count) + best.square()
    loss = loss + F.logsigmoid(logprobs).mean() + F.softplus(advantages).sum() * logprobs.std()
    loss = (
        loss
        + torch.logsumexp(logprobs, dim=0)
        + (logprobs**2).masked_fill(advantages > 0, float("inf")).clamp(max=3.0).sum()
    )
    zeros = logprobs.new_zeros(count, 2).reshape(-1)
    return loss + torch.cat([zeros, logprobs.flip(0)]).cumsum(0).mean(), {}


def choosing(logprobs, mask):
    picked = logprobs[mask > 0]
    order = torch.argsort(picked.detach(), descending=True)
    loss = picked[order][:3].sum() + F.huber_loss(logprobs, -mask, delta=0.5)
    return loss, {"custom/picked:sum": (mask > 0).sum()}


def with_types(logprobs, advantages):
    wide = logprobs.to(torch.float64) * logprobs.new_ones(1, dtype=torch.float64, device="cpu")
    return (wide * advantages.to(dtype=wide.dtype)).sum(), {}


LOSSES = [reinforce, clipped, sequence_level, shapes_and_numbers, choosing, with_types]


def traced(loss: Callable[..., Any]) -> tuple[Any, LossGraph]:
    """The SDK's own handle of a loss, and what becomes of its upload."""
    names = loss.__code__.co_varnames[: loss.__code__.co_argcount]
    ranks: Any = {name: values()[name].ndim for name in names}
    handle = trace_loss(loss, ranks, "session")
    return handle, parse_loss_graph(handle.name, *uploaded(handle))


def uploaded(handle: Any) -> tuple[list[Any], dict[str, Any]]:
    graph = encode_graph(handle)
    return json.loads(
        json.dumps([[entry.model_dump() for entry in handle.inputs], graph.model_dump()])
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_value_metrics_and_gradient_are_those_of_the_sdk(loss) -> None:
    handle, graph = traced(loss)
    given = values()
    inputs = {name: given[name] for name in handle.input_names}
    ours, theirs = (given["logprobs"].clone().requires_grad_() for _ in range(2))
    expected_loss, expected_metrics = handle.graph(theirs, *inputs.values())
    found_loss, found_metrics = run_graph(graph, ours, inputs)
    assert found_loss.item() == expected_loss.item()
    assert {k: float(v.detach()) for k, v in found_metrics.items()} == {
        k: float(v.detach()) for k, v in expected_metrics.items()
    }
    (expected,) = torch.autograd.grad(expected_loss, theirs)
    (found,) = torch.autograd.grad(found_loss, ours)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradient_is_the_slope_of_the_value(loss) -> None:
    _, graph = traced(loss)
    given = values(seed=3)
    inputs = {name: given[name] for name in graph.input_names}
    leaf = given["logprobs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run_graph(graph, leaf, inputs)[0], leaf)
    step = 1e-6
    for index in range(N):
        ends = []
        for sign in (1, -1):
            moved = given["logprobs"].clone()
            moved[index] += sign * step
            ends.append(run_graph(graph, moved, inputs)[0].item())
        assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_a_pack_sums_over_its_data() -> None:
    _, graph = traced(clipped)
    lengths, parts = [N, N], [values(1), values(2)]
    inputs = [{name: part[name].float() for name in graph.input_names} for part in parts]
    logprobs_M1 = torch.cat([part["logprobs"].float() for part in parts])[:, None]
    pack = GraphPackLoss(graph, inputs, lengths)
    pack.see_all(logprobs_M1)
    expected, ratios = 0.0, 0.0
    for part, given in zip(parts, inputs, strict=True):
        leaf = part["logprobs"].float().requires_grad_()
        loss, metrics = run_graph(graph, leaf, given)
        expected += loss.item()
        ratios += metrics["custom/ratio:sum"].item()
    assert pack.total == pytest.approx(expected)
    assert pack.metrics["custom/ratio:sum"] == pytest.approx(ratios)
    gradient_M1 = pack.gradient(slice(0, 2 * N), logprobs_M1)
    (last,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(gradient_M1[N:, 0], last)


def tampered(change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Parse the upload of `reinforce` after changing its nodes."""
    handle, _ = traced(reinforce)
    inputs, graph = uploaded(handle)
    change(graph["nodes"])
    parse_loss_graph("reinforce", inputs, graph)


def replace(index: int, **fields: Any) -> Callable[[list[dict[str, Any]]], Any]:
    return lambda nodes: nodes[index].update(fields)


NESTED: Any = 1
for _ in range(20):
    NESTED = [NESTED]

BAD_NODES = [
    (replace(2, target="builtins.eval"), "node 'mul'.*builtins.eval"),
    (replace(2, target="os.system"), "node 'mul'.*os.system"),
    (replace(2, target="torch.load"), "node 'mul'.*torch.load"),
    (replace(2, target="torch.rand_like"), "node 'mul'.*torch.rand_like"),
    (replace(2, target="torch.ops.aten.mul"), "node 'mul'"),
    (replace(2, target="operator.setitem"), "node 'mul'"),
    (replace(2, op="call_module"), "node 'mul'.*call_module"),
    (replace(2, op="get_attr"), "node 'mul'.*get_attr"),
    (replace(3, target="__reduce__"), "node 'sum_1'.*__reduce__"),
    (replace(3, target="backward"), "node 'sum_1'.*backward"),
    (replace(3, target="add_"), "node 'sum_1'.*add_"),
    (replace(3, target="numpy"), "node 'sum_1'.*numpy"),
    (replace(2, target="getattr", args=[{"ref": "logprobs"}, "__class__"]), "'mul'.*attributes"),
    (replace(2, target="getattr", args=[{"ref": "logprobs"}, "grad_fn"]), "node 'mul'.*attributes"),
    (replace(2, kwargs={"out": {"ref": "logprobs"}}), "node 'mul'.*'out'"),
    (replace(2, args=[{"ref": "neg"}, 1]), "node 'mul'.*'neg', no earlier node"),
    (replace(2, args=[{"ref": "logprobs"}, 10**30]), "node 'mul'.*64 bits"),
    (replace(2, args=[{"code": "x"}]), "node 'mul'.*'code'"),
    (replace(2, args=[{"dtype": "object"}]), "node 'mul'.*object"),
    (replace(2, args=[{"device": "cuda:9"}]), "node 'mul'.*cuda:9"),
    (replace(2, args=[NESTED]), "node 'mul'.*nested"),
    (replace(2, args=[[0] * 5000]), "node 'mul'.*4096"),
    (replace(2, name="logprobs"), "node 'logprobs'.*earlier"),
    (replace(2, name="a b"), "identifier"),
    (replace(2, name=7), "node '2'"),
    (replace(0, target="weights"), r"placeholders are \['weights'"),
    (lambda nodes: nodes.pop(), "output node at its end"),
    (lambda nodes: nodes[-1].update(args=[{"ref": "mul"}]), r"node 'output'.*\(loss, metrics\)"),
    (
        lambda nodes: nodes[-1].update(
            args=[{"tuple": [{"ref": "neg"}, {"dict": {"loss:sum": {"ref": "neg"}}}]}]
        ),
        "node 'output'.*'loss:sum'",
    ),
    (lambda nodes: nodes.extend(copy.deepcopy(nodes[2:3]) * MAX_NODES), f"at most {MAX_NODES}"),
    (lambda nodes: nodes.clear(), "not a list of nodes"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), BAD_NODES)
def test_anything_off_the_list_is_refused_by_node(change, match: str) -> None:
    with pytest.raises(UserError, match=match):
        tampered(change)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([], "logprobs first"),
        ([{"name": "advantages", "rank": 1}], r"inputs\[0\]"),
        ([{"name": "logprobs", "rank": 0}], r"inputs\[0\]"),
        ([{"name": "logprobs", "rank": 1}, {"name": "../x", "rank": 1}], r"inputs\[1\].name"),
        ([{"name": "logprobs", "rank": 1}, {"name": "a", "rank": 3}], r"inputs\[1\].rank"),
        ([{"name": "logprobs", "rank": 1}, {"name": "logprobs", "rank": 1}], "twice"),
    ],
)
def test_bad_inputs_are_refused(inputs, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_loss_graph("x", inputs, {"format": 1, "nodes": [{}]})


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="format='2'"):
        parse_loss_graph("x", [{"name": "logprobs", "rank": 1}], {"format": 2, "nodes": []})


def huge_zeros(logprobs):
    return logprobs.sum() + torch.zeros(logprobs.shape[0] * 10**11).sum(), {}


def huge_repeat(logprobs):
    return logprobs.repeat(10**6, 10**6).sum(), {}


def huge_expand(logprobs):
    return (logprobs[:, None].expand(-1, 10**11) + 1).sum(), {}


def huge_pad(logprobs):
    return F.pad(logprobs, (10**11, 0)).sum(), {}


def huge_classes(logprobs):
    return logprobs.sum() + F.one_hot(logprobs.abs().long(), 10**12).sum(), {}


def huge_outer(logprobs):
    wide = logprobs.repeat(10**6)
    return torch.outer(wide, wide).sum(), {}


def huge_broadcast(logprobs):
    wide = logprobs.repeat(10**6)
    return (wide[:, None] * wide[None, :]).sum(), {}


def huge_index(logprobs):
    wide = logprobs.repeat(10**6)[:, None].expand(-1, 10)
    return wide[torch.zeros(logprobs.shape[0] * 10**7, dtype=torch.int64)].sum(), {}


def huge_count(logprobs):
    return logprobs.sum() + torch.arange(0, logprobs.shape[0], 1e-12).sum(), {}


def huge_power(logprobs):
    return logprobs.sum() * (logprobs.shape[0] ** 1_000_000_000), {}


def number(logprobs, value):
    """A tensor of one whole number, which torch takes for a size."""
    return logprobs.new_full((), value, dtype=torch.int64)


def huge_range_by_tensor(logprobs):
    return logprobs.sum() + torch.arange(number(logprobs, 2**28)).sum(), {}


def huge_zeros_by_tensor(logprobs):
    side = (logprobs.detach() * 0 + 2**15).long()[0]
    return logprobs.sum() + torch.zeros((side, side)).sum() + logprobs.new_ones(
        side, side
    ).sum(), {}


def huge_repeat_by_tensor(logprobs):
    return logprobs.repeat(number(logprobs, 2**26)).sum(), {}


def huge_expand_by_tensor(logprobs):
    count = number(logprobs, 2**26)
    return (logprobs[:, None].expand(-1, count) + 1).sum(), {}


def huge_pad_by_tensor(logprobs):
    return F.pad(logprobs, (number(logprobs, 2**27), 0)).sum(), {}


def huge_classes_by_tensor(logprobs):
    classes = number(logprobs, 2**27)
    return logprobs.sum() + F.one_hot(logprobs.abs().long(), classes).sum(), {}


def huge_list_index(logprobs):
    wide = logprobs.repeat(2**14)[None, :]
    return wide[[0] * 2000].sum(), {}


def huge_list_in_tuple(logprobs):
    wide = logprobs.repeat(2**14)[:, None]
    return wide[:, [0] * 2000].sum(), {}


def huge_crossed_index(logprobs):
    first = logprobs.new_zeros(2**13, dtype=torch.int64)
    return logprobs[None, :].expand(7, 7)[first[:, None], first].sum(), {}


def huge_second_axis(logprobs):
    tall = logprobs.repeat(2**14)[:, None]
    return tall[:, logprobs.new_zeros(2000, dtype=torch.int64)].sum(), {}


def huge_take_along(logprobs):
    tall = logprobs.repeat(2**14)[:, None]
    return torch.take_along_dim(
        tall, logprobs.new_zeros(1, 2000, dtype=torch.int64), dim=1
    ).sum(), {}


def huge_where(logprobs):
    wide = logprobs.repeat(2**20).reshape([1] * 60 + [-1])
    return logprobs.sum() + torch.where(wide < 0)[0].sum(), {}


def many_unbound(logprobs):
    return logprobs.repeat(2**17).unbind()[0], {}


def many_split(logprobs):
    return logprobs.repeat(2**17).split(1)[0].sum(), {}


def many_chunks(logprobs):
    return torch.chunk(logprobs.repeat(2**17), 2**17)[0].sum(), {}


def many_unbound_again(logprobs):
    """Each is allowed; all together are not."""
    wide = logprobs.repeat(2**11)
    total = logprobs.sum()
    for _ in range(20):
        total = total + wide.unbind()[0]
    return total, {}


def many_results(logprobs):
    """No single one is large."""
    wide = logprobs.repeat(2**20)
    for _ in range(20):
        wide = wide + 1
    return wide.sum(), {}


def huge_matmul(logprobs):
    square = logprobs[0].expand(2**11, 2**11)
    return (square @ square).sum(), {}


def huge_singular_values(logprobs):
    return logprobs[0].expand(2**10, 2**10).norm("nuc"), {}


HUGE_BY_TENSOR = [huge_range_by_tensor, huge_zeros_by_tensor, huge_repeat_by_tensor]
HUGE_BY_TENSOR += [huge_expand_by_tensor, huge_pad_by_tensor, huge_classes_by_tensor]
HUGE = [huge_zeros, huge_repeat, huge_expand, huge_pad, huge_classes, huge_outer, huge_broadcast]
HUGE += [huge_index, huge_count, huge_power, huge_list_index, huge_list_in_tuple, huge_take_along]
HUGE += [huge_crossed_index, huge_second_axis, huge_where, huge_matmul, huge_singular_values]
HUGE += [many_unbound, many_split, many_chunks, many_unbound_again, many_results, *HUGE_BY_TENSOR]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("loss", HUGE, ids=lambda loss: loss.__name__)
def test_results_beyond_the_limit_are_refused_before_they_are_made(loss) -> None:
    _, graph = traced(loss)
    with pytest.raises(UserError, match=r"node '\w+' .*(goes beyond|too large|64 bits)"):
        run_graph(graph, values()["logprobs"], {})


def ordinary_uses(logprobs, advantages):
    """What the bounds must let pass: pairs of long index lists, views, sizes of all kinds."""
    rows = torch.arange(logprobs.shape[0])
    square = (logprobs[:, None] - logprobs[None, :]).square()
    first = square.unbind()[0]
    halves = logprobs.split(4)
    side = number(logprobs, 3)
    picked = (
        square[rows, [1] * 7] + square[:, 0] + square[..., 1:3].sum(-1) + square[square > -1][:7]
    )
    padded = F.pad(logprobs, (1, 0), "constant", 0.0)[1:]
    norms = torch.linalg.vector_norm(square, dim=1) + square.norm(p=2, dim=1)
    product = square @ advantages[:, None] + (square[None] @ square)[0, :, :1]
    total = picked.sum() + first.sum() + halves[1].sum() + padded.sum() + norms.sum()
    total = total + product.sum() + logprobs.new_ones(side, 2).sum() + torch.arange(side).sum()
    return total + torch.take_along_dim(square, rows[:, None], 1).sum(), {}


def test_ordinary_operations_are_within_the_bounds() -> None:
    handle, graph = traced(ordinary_uses)
    given = values()
    expected, _ = handle.graph(given["logprobs"], given["advantages"])
    found, _ = run_graph(graph, given["logprobs"], {"advantages": given["advantages"]})
    assert found.item() == expected.item()


def test_an_index_of_many_tokens_by_many_is_within_the_bounds() -> None:
    """`x[rows, columns]` picks as many values as there are rows, not rows times columns."""

    def choose(logprobs, targets):
        rows = torch.arange(logprobs.shape[0])
        return logprobs[rows, targets].sum(), {}

    handle = trace_loss(choose, {"logprobs": 2, "targets": 1}, "session")
    graph = parse_loss_graph("choose", *uploaded(handle))
    logprobs = torch.ones(50_000, 4)
    found, _ = run_graph(graph, logprobs, {"targets": torch.zeros(50_000, dtype=torch.int64)})
    assert found == 50_000


def test_the_time_of_a_loss_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(graph_ops, "_MAX_SECONDS", 0.0)
    _, graph = traced(reinforce)
    inputs = {"advantages": values()["advantages"]}
    with pytest.raises(UserError, match=r"node '\w+' .*takes longer than 0 s"):
        run_graph(graph, values()["logprobs"], inputs)


def wrong_shapes(logprobs, advantages):
    return (logprobs[1:] * advantages).sum(), {}


def not_scalar(logprobs):
    return logprobs * 2, {}


def constant(logprobs):
    return torch.zeros_like(logprobs).sum(), {}


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (wrong_shapes, r"'wrong_shapes': node 'mul' \(operator.mul\): The size of tensor"),
        (not_scalar, r"node 'output'.*scalar tensor, got \[7\]"),
        (constant, "does not depend on logprobs"),
    ],
)
def test_a_loss_that_cannot_be_computed_names_the_node(loss, match: str) -> None:
    _, graph = traced(loss)
    inputs = [{name: values()[name] for name in graph.input_names}]
    with pytest.raises(UserError, match=match):
        GraphPackLoss(graph, inputs, [N]).see_all(values()["logprobs"][:, None])


def test_what_uploaded_losses_hold_is_bounded() -> None:
    """For a session, and for all of them together."""
    handle, _ = traced(reinforce)
    inputs, graph = uploaded(handle)
    graph["nodes"][2]["args"].append([[]] * 4000)
    large = parse_loss_graph("large", inputs, graph)
    assert large.num_values > 4000
    table = LossTable()

    def fill(sessions: int, losses: int) -> None:
        for session, seq in itertools.product(range(sessions), range(losses)):
            table.add(str(session), seq, large, request_id="x")

    fits = MAX_VALUES_PER_SESSION // large.num_values
    fill(1, fits)
    with pytest.raises(UserError, match="custom losses of this session would hold"):
        fill(1, 1)
    with pytest.raises(UserError, match="in all sessions"):
        fill(20, fits)
    table.drop_session("0")
    table.add("new", 0, large, request_id="x")
