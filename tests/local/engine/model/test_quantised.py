"""Matrices in 8 and 4 bits: the weights that they stand for, and products with exactly these."""

from __future__ import annotations

import pytest
import torch

from tests.local.engine.model.test_pairs import products_of
from tests.local.engine.model.test_products import SHAPES, adapter, draw
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks
from tinker_cookbook.local.engine.model.quantised import (
    GROUP,
    QuantisedBlocks,
    QuantisedShapes,
    round_to_bits,
)
from tinker_cookbook.local.engine.native.instructions import (
    InstructionSet,
    available_sets,
    compared_sets,
)

BITS = (8, 4)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_off_by_at_most_a_step_and_the_rounding(bits: int) -> None:
    torch.manual_seed(0)
    weight = draw(40, 75)
    rounded = round_to_bits(weight, bits).float()
    padded = torch.nn.functional.pad(weight, (0, -75 % GROUP)).unflatten(1, (-1, GROUP))
    step = padded.abs().amax(2, keepdim=True) / 2 ** (bits - 1)
    # One step at most: the side without the extra number is cut. A bfloat16 has 8 bits.
    bound = (step * 1.01 + padded.abs() * 2**-8).flatten(1)[:, :75]
    assert bool(((rounded - weight).abs() <= bound).all())
    # on average a quarter of a step, or a little more with the rounding to bfloat16
    mean = (rounded - weight).abs().mean() / step.expand_as(padded).flatten(1)[:, :75].mean()
    assert 0.2 < float(mean) < 0.4


@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_and_of_tiny_numbers_become_zeros(bits: int) -> None:
    weight = draw(2, 2 * GROUP)
    weight[0, :GROUP], weight[1, GROUP:] = 0, 1e-36
    rounded = round_to_bits(weight, bits)
    assert not rounded[0, :GROUP].any()
    assert not rounded[1, GROUP:].any()
    assert bool(rounded[0, GROUP:].any())


@pytest.mark.parametrize("entry", compared_sets(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("paired", [False, True], ids=["float32", "pairs"])
@pytest.mark.parametrize("bits", BITS)
def test_products_have_the_bits_of_a_bfloat16_matrix_of_these_weights(
    bits: int, paired: bool, entry: InstructionSet
) -> None:
    products = products_of(entry)
    for tokens, outs, inputs, rank in SHAPES:
        torch.manual_seed(tokens)
        weight, lora = draw(sum(outs), inputs), adapter(outs, inputs, rank)
        x, grad = draw(tokens, inputs), draw(tokens, sum(outs))
        quantised = QuantisedBlocks(products, bits, paired=paired).pack(weight, outs)
        plain = MatrixBlocks(products, paired=paired).pack(round_to_bits(weight, bits), outs)
        results = [
            (*matrix.forward(x, lora), *matrix.backward(grad, lora))
            for matrix in (quantised, plain)
        ]
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
        rows = torch.tensor([0, outs[0] - 1, outs[0] // 2])
        assert torch.equal(quantised.rows(rows), plain.rows(rows))


@pytest.mark.parametrize("bits", BITS)
def test_shapes_and_sizes_are_known_without_numbers(bits: int) -> None:
    products = products_of(available_sets()[-1])
    if products.panel != 32:
        pytest.skip("plans assume the widest panel")
    weight, outs = draw(100, 75), (60, 40)
    matrix = QuantisedBlocks(products, bits).pack(weight, outs)
    planned = QuantisedShapes(bits).pack(weight.to("meta"), outs)
    assert planned.num_bytes == matrix.num_bytes
    assert (planned.panels.shape, planned.panel) == (matrix.panels.shape, matrix.panel)


def test_the_output_embedding_has_eight_bits() -> None:
    blocks = QuantisedBlocks(products_of(available_sets()[-1]), 4)
    head = blocks.pack(draw(64, 64), (64,), head=True)
    assert (head.bits, blocks.pack(draw(64, 64), (64,)).bits) == (8, 4)
