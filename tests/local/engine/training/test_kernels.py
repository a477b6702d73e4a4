"""The compiled elementwise kernels of training against torch and its automatic gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tinker_cookbook.local.engine.model import ops
from tinker_cookbook.local.engine.model.architecture import RopeConfig
from tinker_cookbook.local.engine.native.build import load_kernels_for
from tinker_cookbook.local.engine.native.instructions import InstructionSet, available_sets
from tinker_cookbook.local.engine.native.train_ops import HeadLayout, TrainKernels, train_kernels

ROWS = (1, 5, 130)
SIZES = (24, 45)
"""The second fills no vector; 130 rows are shared by threads."""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if train_kernels() is None:
        pytest.skip("no C compiler here")


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def wide_view(values: torch.Tensor) -> torch.Tensor:
    """The same values as part of wider rows."""
    return torch.cat([values, torch.full((len(values), 7), 9.0)], dim=1)[:, : values.shape[1]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_and_its_gradient(rows: int, size: int) -> None:
    gate_up = draw(rows, 2 * size).mul_(4).requires_grad_()
    grad = draw(rows, size, seed=1)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (expected_grad,) = torch.autograd.grad(expected, gate_up, grad)
    out, again = wide_view(torch.zeros(rows, size)), torch.zeros(rows, size)
    ops.swiglu_into(out, gate_up.detach())
    result = ops.swiglu_backward(wide_view(grad), gate_up.detach(), again)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(result, expected_grad, rtol=1e-5, atol=1e-4)


def test_swiglu_is_finite_at_extremes() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4] * 4 + [1.0] * 16])
    out = torch.zeros(1, 16)
    ops.swiglu_into(out, gate_up)
    torch.testing.assert_close(out[0, :4], torch.tensor([0.0, 0.0, 90.0, 1e4]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_norm_and_its_gradient(rows: int, size: int) -> None:
    x = draw(rows, size).requires_grad_()
    weight, grad, add = draw(size, seed=1), draw(rows, size, seed=2), draw(rows, size, seed=3)
    expected = F.rms_norm(x, (size,), weight, 1e-5)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    inverse = ops.inverse_rms(x.detach(), 1e-5)
    out = wide_view(torch.zeros(rows, size))
    ops.rms_norm_into(out, x.detach(), weight, inverse)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-5)
    for other, plus in ((None, torch.zeros(())), (add, add)):
        result = ops.rms_norm_backward(wide_view(grad), x.detach(), weight, inverse, add=other)
        torch.testing.assert_close(result, expected_grad + plus, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", [8, 20])
def test_heads_are_split_and_joined(rows: int, dim: int) -> None:
    kernels = train_kernels()
    assert kernels is not None
    kv_heads, group = 2, 3
    positions = torch.arange(rows).remainder(11)
    cos, sin = ops.RopeTable(RopeConfig(), dim, "cpu").up_to(11)
    layout = HeadLayout(kv_heads, group, dim, positions, cos, sin)
    qkv = draw(rows, (group + 2) * kv_heads * dim).requires_grad_()
    heads = qkv.unflatten(1, (-1, dim))
    tables = (cos[positions][:, None], sin[positions][:, None])
    q = ops.apply_rope(heads[:, : kv_heads * group], *tables) * dim**-0.5
    k = ops.apply_rope(heads[:, kv_heads * group : kv_heads * (group + 1)], *tables)
    v = heads[:, kv_heads * (group + 1) :]
    q = q.unflatten(1, (kv_heads, group)).transpose(0, 1).flatten(1, 2)
    expected = (q, k.transpose(0, 1), v.transpose(0, 1))
    result = kernels.split_heads(layout, qkv.detach())
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-5, atol=1e-5)
    grads = [draw(*part.shape, seed=index) for index, part in enumerate(result)]
    (expected_grad,) = torch.autograd.grad(expected, qkv, grads)
    torch.testing.assert_close(kernels.join_heads(layout, *grads), expected_grad)


@pytest.mark.parametrize("instructions", available_sets(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("dim", [12, 64])
def test_keys_and_values_are_rounded_to_the_nearest_bfloat16(
    dim: int, instructions: InstructionSet
) -> None:
    library = load_kernels_for(instructions, ("train_kernels.c",))
    assert library is not None
    kernels, rows = TrainKernels(library), 11
    cos, sin = ops.RopeTable(RopeConfig(), dim, "cpu").up_to(rows)
    layout = HeadLayout(2, 3, dim, torch.arange(rows), cos, sin)
    qkv = draw(rows, 10 * dim)
    qkv[0, -4:] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3e38])  # two ties
    q, k, v = kernels.split_heads(layout, qkv)
    rounded = kernels.split_heads(replace(layout, rounded=True), qkv)
    for got, expected in zip(rounded, (q, k.bfloat16().float(), v.bfloat16().float()), strict=True):
        assert torch.equal(got, expected)
