"""Matrices in 12 bits per number: they lose nothing, and products have the bits of 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.model.test_products import SHAPES, adapter, draw
from tests.local.engine.test_native import (
    assert_chunks_have_the_bits_of_the_whole,
    compiled,
    load,
)
from tinker_cookbook.local.engine.model import base_model
from tinker_cookbook.local.engine.model.compact import CompactBlocks, CompactMatrix, CompactShapes
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, PackedMatrix
from tinker_cookbook.local.engine.native.build import load_kernels, load_kernels_for
from tinker_cookbook.local.engine.native.compact import CompactKernels
from tinker_cookbook.local.engine.native.instructions import (
    InstructionSet,
    available_sets,
    compared_sets,
)
from tinker_cookbook.local.engine.native.products import Products

SETS = pytest.mark.parametrize("entry", compared_sets(), ids=lambda entry: entry.name)


def pack_both(
    entry: InstructionSet, weight: torch.Tensor, outs: tuple[int, ...]
) -> tuple[PackedMatrix, PackedMatrix]:
    """Return a matrix in 12 and in 16 bits."""
    library = load_kernels_for(entry, ("compact.c", "products.c", "pair_products.c"))
    if library is None:
        pytest.skip("no C compiler here")
    products = Products(library)
    blocks = CompactBlocks(products, CompactKernels(library))
    return blocks.pack(weight, outs), MatrixBlocks(products, paired=True).pack(weight, outs)


def draw_with_exceptions(rows: int, columns: int) -> torch.Tensor:
    """Draw numbers of which a few in a thousand have rare exponents."""
    weight = draw(rows, columns)
    rare = torch.tensor([3e-38, 1e-42, -7e-20, 1e12, -3e38, -0.0])
    places = torch.randperm(weight.numel())[: weight.numel() // 400 + 1]
    weight.view(-1)[places] = rare[torch.arange(len(places)) % len(rare)]
    return weight


@SETS
@pytest.mark.parametrize("inputs", [1, 2, 3, 4, 5, 31, 66, 577])
def test_all_numbers_come_back(entry: InstructionSet, inputs: int) -> None:
    torch.manual_seed(inputs)
    outs = (37, 70)
    weight = draw_with_exceptions(sum(outs), inputs)
    matrix, _ = pack_both(entry, weight, outs)
    found = matrix.rows(torch.arange(outs[0]))
    expected = weight[: outs[0]].bfloat16().float()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # -0.0 is not 0.0
    assert found.shape == (outs[0], inputs)


@SETS
def test_products_have_the_bits_of_sixteen_bits(entry: InstructionSet) -> None:
    for tokens, outs, inputs, rank in SHAPES:
        torch.manual_seed(tokens)
        weight = draw_with_exceptions(sum(outs), inputs).clamp(-1e3, 1e3)
        lora = adapter(outs, inputs, rank)
        x, grad = draw(tokens, inputs), draw(tokens, sum(outs))
        results = [
            (*matrix.forward(x, lora), *matrix.backward(grad, lora))
            for matrix in pack_both(entry, weight, outs)
        ]
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


@SETS
def test_many_different_exponents_are_kept_in_sixteen_bits(entry: InstructionSet) -> None:
    torch.manual_seed(0)
    spread = torch.exp2(torch.randint(-60, 60, (64, 64)).float())
    assert not isinstance(pack_both(entry, spread, (64,))[0], CompactMatrix)
    matrix, plain = pack_both(entry, draw(256, 576), (256,))
    assert isinstance(matrix, CompactMatrix)
    assert matrix.num_bytes < 0.77 * plain.num_bytes or matrix.panel < 32


def test_shapes_and_sizes_are_known_without_numbers() -> None:
    weight, outs = draw(100, 75), (60, 40)
    matrix, _ = pack_both(available_sets()[-1], weight, outs)
    if matrix.panel != 32:
        pytest.skip("plans assume the widest panel")
    assert isinstance(matrix, CompactMatrix)
    planned = CompactShapes().pack(weight.to("meta"), outs)
    assert (planned.panels.shape, planned.panel) == (matrix.panels.shape, matrix.panel)
    assert planned.bytes_per_number == matrix.bytes_per_number == 1.5
    exceptions = matrix.num_bytes - planned.num_bytes
    assert 0 <= exceptions < 0.01 * planned.num_bytes


def test_few_tokens_have_the_bits_that_they_have_among_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few tokens are multiplied with panels expanded in registers, more with panels in memory.
    if load_kernels() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(base_model, "expands_fast", lambda: True)  # on every processor
    base = load(tmp_path, rounded=False, dtype=torch.bfloat16)
    assert isinstance(base.weights.head, CompactMatrix)
    decoder = compiled(base)
    prompt = np.random.default_rng(1).integers(0, base.vocab_size, 40).astype(np.int32)
    sizes = (1, 2, 3, 4, 5, 6, 7, 12)
    assert_chunks_have_the_bits_of_the_whole(decoder, prompt, None, sizes)
