"""Gradients of LoRA matrices in bfloat16 equal rounded products of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tinker_cookbook.local.engine.native.build import load_kernels_for
from tinker_cookbook.local.engine.native.instructions import (
    InstructionSet,
    available_sets,
    compared_sets,
    twin_of,
)
from tinker_cookbook.local.engine.native.low_rank import LowRankGradients, LowRankJob

SIZES = [(1, 1, 1), (7, 5, 33), (600, 96, 64), (1301, 32, 200)]
"""Tokens, rank and outputs; the last two need several strips."""
SOURCE = ("pair_gradients.c",)


def kernels(instructions: InstructionSet) -> LowRankGradients:
    library = load_kernels_for(instructions, SOURCE)
    if library is None:
        pytest.skip("there is no C compiler")
    return LowRankGradients(library)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(
    found: LowRankGradients, tokens: int, rank: int, outs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return both gradients, added to ones, and the expected sum in float64."""
    generator = torch.Generator().manual_seed(0)
    # The operands are columns of wider tensors, as those of stacked modules are.
    left = torch.randn(tokens, rank + 3, generator=generator)[:, 3:]
    right = torch.randn(tokens, outs + 5, generator=generator)[:, :outs]
    straight, turned = torch.ones(rank, outs), torch.ones(outs, rank)
    jobs = [
        LowRankJob(straight, left, right, turned=False),
        LowRankJob(turned, left, right, turned=True),
    ]
    found.add(jobs)
    rounded = [operand.bfloat16().double() for operand in (left, right)]
    return straight, turned, rounded[0].t() @ rounded[1] + 1


@pytest.mark.parametrize("instructions", compared_sets(), ids=lambda entry: entry.name)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_products_of_rounded_operands(
    sizes: tuple[int, int, int], instructions: InstructionSet
) -> None:
    straight, turned, expected = gradients(kernels(instructions), *sizes)
    torch.testing.assert_close(straight.double(), expected, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(turned.t().double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("instructions", compared_sets()[1:], ids=lambda entry: entry.name)
@pytest.mark.parametrize("sizes", SIZES[1:3])
def test_instruction_sets_give_the_bits_of_generic_c(
    sizes: tuple[int, int, int], instructions: InstructionSet
) -> None:
    generic = gradients(kernels(twin_of(instructions)), *sizes)
    fast = gradients(kernels(instructions), *sizes)
    assert torch.equal(fast[0], generic[0])
    assert torch.equal(fast[1], generic[1])


def test_threads_do_not_change_the_bits(two_threads: None) -> None:
    found = kernels(available_sets()[-1])
    together = gradients(found, *SIZES[2])
    torch.set_num_threads(1)
    alone = gradients(found, *SIZES[2])
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
