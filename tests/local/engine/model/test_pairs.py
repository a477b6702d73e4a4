"""Products of bfloat16 pairs: against float64, and the same bits on all processors."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.local.engine.model.test_products import SHAPES, adapter, assert_near, draw
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, PackedMatrix
from tinker_cookbook.local.engine.native.build import load_kernels, load_kernels_for
from tinker_cookbook.local.engine.native.instructions import (
    InstructionSet,
    compared_sets,
    twin_of,
)
from tinker_cookbook.local.engine.native.operands import LoraPair
from tinker_cookbook.local.engine.native.products import Products


def packed(
    matrix: torch.Tensor, outs: tuple[int, ...], products: Products | None = None
) -> PackedMatrix:
    if products is None:
        kernels = load_kernels()
        if kernels is None:
            pytest.skip("no C compiler here")
        products = Products(kernels)
    return MatrixBlocks(products, paired=True).pack(matrix, outs)


@functools.cache
def products_of(instructions: InstructionSet) -> Products:
    kernels = load_kernels_for(instructions, ("products.c", "pair_products.c"))
    if kernels is None:
        pytest.skip("no C compiler here")
    return Products(kernels)


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().double()


@pytest.mark.parametrize(("tokens", "outs", "inputs", "rank"), SHAPES)
def test_operands_are_rounded_and_summed_in_float32(
    tokens: int, outs: tuple[int, ...], inputs: int, rank: int
) -> None:
    torch.manual_seed(tokens)
    weight = draw(sum(outs), inputs)
    matrix, lora = packed(weight, outs), adapter(outs, inputs, rank)
    x, grad = draw(tokens, inputs), draw(tokens, sum(outs))
    add_to, bias = draw(tokens, sum(outs)), draw(sum(outs))

    result, low = matrix.forward(x, lora, bias=bias, add_to=add_to)
    x_grad, low_grad = matrix.backward(grad, lora)

    expected = rounded(x) @ rounded(weight).t() + bias + add_to
    expected_grad = rounded(grad) @ rounded(weight)
    if lora is not None:
        assert_near(low, lora.scale * (rounded(x) @ rounded(lora.a).t()))
        parts = zip(low.split(rank, 1), lora.b, strict=True)
        expected += torch.cat([rounded(values) @ rounded(b).t() for values, b in parts], 1)
        grads = zip(grad.split(list(outs), 1), lora.b, strict=True)
        expected_low_grad = torch.cat([rounded(g) @ rounded(b) for g, b in grads], 1)
        assert_near(low_grad, lora.scale * expected_low_grad)
        expected_grad += rounded(low_grad) @ rounded(lora.a)
    assert_near(result, expected)
    assert_near(x_grad, expected_grad)


@pytest.mark.parametrize("instructions", compared_sets()[1:], ids=lambda entry: entry.name)
@pytest.mark.parametrize(("tokens", "outs", "inputs", "rank"), SHAPES)
def test_every_instruction_set_gives_the_bits_of_generic_c(
    tokens: int, outs: tuple[int, ...], inputs: int, rank: int, instructions: InstructionSet
) -> None:
    torch.manual_seed(tokens)
    weight, lora = draw(sum(outs), inputs), adapter(outs, inputs, rank)
    x, grad, add_to = draw(tokens, inputs), draw(tokens, sum(outs)), draw(tokens, sum(outs))
    results = []
    for entry in (twin_of(instructions), instructions):
        matrix = packed(weight, outs, products_of(entry))
        forward = matrix.forward(x, lora, add_to=add_to)
        results.append((*forward, *matrix.backward(grad, lora)))
    for generic, fast in zip(*results, strict=True):
        assert torch.equal(generic, fast)


@pytest.mark.parametrize("rank", [0, 7])
def test_a_row_is_the_same_bits_in_any_batch(rank: int) -> None:
    torch.manual_seed(0)
    outs, inputs = (40, 24), 601
    matrix, lora = packed(draw(64, inputs), outs), adapter(outs, inputs, rank)
    x = draw(23, inputs)
    together, _ = matrix.forward(x, lora)
    for rows in (slice(0, 1), slice(3, 10), slice(20, 23)):
        assert torch.equal(matrix.forward(x[rows], lora)[0], together[rows])


def test_packing_rounds_to_the_nearest_and_loses_no_input() -> None:
    weight = draw(37, 13)
    matrix = packed(weight, (21, 16))
    assert torch.equal(matrix.forward(torch.eye(13))[0].t(), weight.bfloat16().float())
    indices = torch.tensor([0, 20, 7, 7])
    assert torch.equal(matrix.rows(indices), weight[indices].bfloat16().float())
    assert (matrix.in_features, matrix.out_features) == (13, 37)


def test_a_small_adapter_on_large_weights_is_not_lost() -> None:
    """One accumulated sum keeps an update far below the spacing of bfloat16 at the product."""
    torch.manual_seed(1)
    weight, x = draw(32, 64) * 100, draw(8, 64)
    lora = LoraPair(draw(4, 64), (draw(32, 4) * 1e-3,), 1.0)
    matrix = packed(weight, (32,))
    update = matrix.forward(x, lora)[0] - matrix.forward(x)[0]
    expected = rounded(x) @ rounded(lora.a).t() @ rounded(lora.b[0]).t()
    assert float((update.double() - expected).norm() / expected.norm()) < 0.02
