"""Products with packed matrices and adapters against float64, on sizes that fill no panel."""

from __future__ import annotations

import pytest
import torch

from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, PackedMatrix
from tinker_cookbook.local.engine.native.build import load_kernels
from tinker_cookbook.local.engine.native.operands import LoraPair
from tinker_cookbook.local.engine.native.products import Products

SHAPES = [
    # tokens, outputs of the modules, inputs, rank
    (1, (16,), 16, 0),
    (5, (8,), 36, 1),
    (7, (60, 20, 20), 44, 8),
    (13, (24, 24), 300, 33),
    (100, (64, 16, 16), 64, 4),
    (1030, (48, 48), 577, 32),
    (64, (7, 300), 640, 200),
    (1000, (9,), 4300, 3),
    (500, (8,), 9000, 0),
]
"""More rows than a block, more inputs than a strip, ranks larger than a panel; and rows, or inputs,
of which only some are packed at a time."""


def packed(matrix: torch.Tensor, outs: tuple[int, ...]) -> PackedMatrix:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    return MatrixBlocks(Products(kernels)).pack(matrix, outs)


def draw(*size: int, rounded: bool = False) -> torch.Tensor:
    values = torch.randn(size)
    return values.bfloat16().float() if rounded else values


def adapter(outs: tuple[int, ...], inputs: int, rank: int) -> LoraPair | None:
    if not rank:
        return None
    a = draw(rank * len(outs), inputs)
    return LoraPair(a, tuple(draw(out, rank) for out in outs), 0.5)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error < 5e-6  # of sums over up to 9,000 inputs


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize(("tokens", "outs", "inputs", "rank"), SHAPES)
def test_products_both_ways(
    tokens: int, outs: tuple[int, ...], inputs: int, rank: int, rounded: bool
) -> None:
    torch.manual_seed(tokens)
    weight = draw(sum(outs), inputs, rounded=rounded)
    matrix, lora = packed(weight, outs), adapter(outs, inputs, rank)
    assert matrix.half == rounded
    x, grad = draw(tokens, inputs), draw(tokens, sum(outs))
    add_to, bias = draw(tokens, sum(outs)), draw(sum(outs))

    result, low = matrix.forward(x, lora, bias=bias, add_to=add_to)
    x_grad, low_grad = matrix.backward(grad, lora)

    expected = x.double() @ weight.double().t() + bias + add_to
    expected_grad = grad.double() @ weight.double()
    if lora is not None:
        expected_low = lora.scale * (x.double() @ lora.a.double().t())
        parts = zip(expected_low.split(rank, 1), lora.b, strict=True)
        expected += torch.cat([values @ b.double().t() for values, b in parts], 1)
        grads = zip(grad.double().split(list(outs), 1), lora.b, strict=True)
        expected_low_grad = lora.scale * torch.cat([g @ b.double() for g, b in grads], 1)
        expected_grad += expected_low_grad @ lora.a.double()
        assert_near(low, expected_low)
        assert_near(low_grad, expected_low_grad)
    assert_near(result, expected)
    assert_near(x_grad, expected_grad)


@pytest.mark.parametrize("rank", [0, 8])
def test_a_row_is_the_same_bits_in_any_batch(rank: int) -> None:
    torch.manual_seed(0)
    outs, inputs = (40, 24), 600
    matrix, lora = packed(draw(64, inputs, rounded=True), outs), adapter(outs, inputs, rank)
    x = draw(23, inputs)
    together, _ = matrix.forward(x, lora)
    for rows in (slice(0, 1), slice(3, 10), slice(20, 23)):
        assert torch.equal(matrix.forward(x[rows], lora)[0], together[rows])


@pytest.mark.parametrize("rounded", [True, False])
def test_packing_loses_nothing(rounded: bool) -> None:
    outs = (21, 16)
    weight = draw(37, 12, rounded=rounded)
    matrix = packed(weight, outs)
    assert torch.equal(matrix.forward(torch.eye(12))[0].t(), weight)
    indices = torch.tensor([0, 20, 7, 7])
    assert torch.equal(matrix.rows(indices), weight[indices])
    assert matrix.out_features == 37


def test_a_view_of_wider_rows_is_read_in_place() -> None:
    matrix = packed(draw(20, 12), (20,))
    wide = draw(9, 30)
    assert torch.equal(matrix.forward(wide[:, 5:17])[0], matrix.forward(wide[:, 5:17].clone())[0])


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("tokens", [90, 500, 2600])
def test_threads_do_not_change_the_bits(tokens: int, paired: bool) -> None:
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    torch.manual_seed(tokens)
    matrix = MatrixBlocks(Products(kernels), paired=paired).pack(draw(48, 600), (48,))
    lora, x, grad = adapter((48,), 600, 8), draw(tokens, 600), draw(tokens, 48)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((*matrix.forward(x, lora), *matrix.backward(grad, lora)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
