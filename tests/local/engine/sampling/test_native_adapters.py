"""Adapters in 12 bits: packing loses nothing, and decoding has the bits of adapters in 16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import random_adapter
from tests.local.engine.test_native import load, prefill
from tinker_cookbook.local.engine.model.base_model import NativeModel
from tinker_cookbook.local.engine.model.compact import CompactBlocks
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, pack_pairs
from tinker_cookbook.local.engine.model.weights import load_weights
from tinker_cookbook.local.engine.native.build import load_kernels_for
from tinker_cookbook.local.engine.native.compact import (
    COMPACT_BITS,
    CompactKernels,
    expands_adapters,
)
from tinker_cookbook.local.engine.native.instructions import InstructionSet, compared_sets
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.native_adapters import PackedLora, PairPacker
from tinker_cookbook.local.engine.sampling.native_decoder import NativeDecoder

SETS = pytest.mark.parametrize("entry", compared_sets(), ids=lambda entry: entry.name)
DECODER = ("compact.c", "decode_kernels.c", "pair_decode.c", "products.c", "pair_products.c")
SPECIAL = torch.tensor([3e-38, 1e-42, -7e-20, 1e12, -3e38, -0.0, torch.inf, -torch.inf])


def with_special_numbers(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """Return a copy in which some numbers have rare exponents."""
    matrix = matrix.clone()
    places = torch.randperm(matrix.numel())[: int(matrix.numel() * share) + 1]
    matrix.view(-1)[places] = SPECIAL[torch.arange(len(places)) % len(SPECIAL)]
    return matrix


def awkward_matrices() -> dict[str, tuple[torch.Tensor, bool]]:
    """Return matrices, and whether they fit into 12 bits."""
    torch.manual_seed(0)
    normal, uniform = torch.randn(70, 36) * 1e-3, torch.rand(96, 577) - 0.5
    signs = torch.randint(0, 2, (64, 32)) * 2.0 - 1
    return {
        "zero": (torch.zeros(64, 32), True),
        "one step of Adam": (signs * 1e-4, True),
        "new A": (uniform, True),
        "trained": (normal, True),
        "few special": (with_special_numbers(uniform, 0.002), True),
        "NaN": (torch.full((64, 32), torch.nan), True),
        "denormal": (torch.rand(64, 32) * 1e-38, True),
        "all exponents": (torch.exp2(torch.randint(-120, 120, (64, 64)).float()), False),
        "rank 1": (torch.randn(64, 1), False),
        "one row": (torch.randn(1, 200), True),
        "three ranks": (torch.randn(37, 100), True),
    }


def numbers_of(packed: PackedLora, shape: torch.Size, kernels: CompactKernels) -> torch.Tensor:
    """Return the matrix that kernels read, in float32."""
    rows, inputs = shape
    if packed.bits:
        return kernels.rows(packed.panels, inputs, torch.arange(rows))
    steps = (inputs + 1) // 2
    count = -(-rows // kernels_panel(kernels))
    panels = packed.panels.view(torch.bfloat16).view(count, steps, -1, 2)
    return panels.transpose(1, 2).flatten(0, 1)[:rows].flatten(1)[:, :inputs].float()


def kernels_panel(kernels: CompactKernels) -> int:
    """Return the outputs of a panel."""
    return (kernels.panel_bytes(4) - kernels.panel_bytes(0)) // 6


@SETS
@pytest.mark.parametrize("compact", [True, False])
def test_packed_matrices_lose_nothing(entry: InstructionSet, compact: bool) -> None:
    library = load_kernels_for(entry, ("compact.c",))
    if library is None:
        pytest.skip("no C compiler here")
    kernels, cases = CompactKernels(library), awkward_matrices()
    matrices = [matrix for matrix, _ in cases.values()]
    packed = PairPacker(library, compact=compact).pack(matrices, [True] * len(matrices))
    for (name, (matrix, fits)), found in zip(cases.items(), packed, strict=True):
        numbers, expected = numbers_of(found, matrix.shape, kernels), matrix.bfloat16().float()
        assert torch.equal(numbers.isnan(), expected.isnan()), name
        is_number = ~expected.isnan()
        bits = [values[is_number].view(torch.int32) for values in (numbers, expected)]
        assert torch.equal(*bits), name  # -0.0 is not 0.0
        assert found.bits in (0, COMPACT_BITS)
        if not compact or kernels_panel(kernels) == 32:  # narrow panels have larger headers
            assert (found.bits == COMPACT_BITS) == (compact and fits), name
        plain = pack_pairs(matrix, [len(matrix)], kernels_panel(kernels))
        assert found.panels.nbytes <= plain.nbytes


def mixed_adapters(base: NativeModel) -> list[StackedLora | None]:
    """Return adapters that differ in rank and in how their matrices are packed."""
    adapters = [random_adapter(base, n, rank=r, train_unembed=True) for n, r in enumerate((32, 70))]
    torch.manual_seed(0)
    for target in adapters[0].adapter.targets[::2]:
        a = adapters[0].adapter.a(target.path)
        a.copy_(with_special_numbers(a, 0.002).clamp(-1, 1))
    zero, spread = random_adapter(base, 3, rank=33), random_adapter(base, 4, rank=35)
    for target in zero.adapter.targets:
        zero.adapter.b(target.path).zero_()
    for target in spread.adapter.targets[1::2]:
        a = spread.adapter.a(target.path)
        a.copy_(torch.exp2(torch.randint(-40, -4, a.shape).float()))
    return [*adapters, None, zero, spread, random_adapter(base, 5, rank=3)]


def unpacked(adapters: list[StackedLora | None]) -> list[StackedLora | None]:
    """Forget how adapters were packed."""
    for adapter in adapters:
        if adapter is not None:
            adapter.native_table = None
    return adapters


@SETS
@pytest.mark.parametrize("base_in_12_bits", [False, True])
def test_decoding_has_the_bits_of_adapters_in_16_bits(
    tmp_path: Path, entry: InstructionSet, base_in_12_bits: bool
) -> None:
    packing = load_kernels_for(entry, ("compact.c",))
    if packing is None or not expands_adapters(packing):
        pytest.skip("no C compiler here, or kernels that read adapters in 16 bits only")
    library = load_kernels_for(entry, DECODER)
    assert library is not None
    base = load(tmp_path, rounded=False, dtype=torch.bfloat16)
    products = Products(library)
    blocks = (
        CompactBlocks(products, CompactKernels(library))
        if base_in_12_bits
        else MatrixBlocks(products, paired=True)
    )
    weights = load_weights(tmp_path, base.arch, device="cpu", dtype=torch.float32, blocks=blocks)
    compact, plain = (NativeDecoder(base.arch, weights, library) for _ in range(2))
    compact.packer = PairPacker(library, compact=True)
    plain.packer = PairPacker(library, compact=False)
    adapters, rng = mixed_adapters(base), np.random.default_rng(0)
    for lengths in ([1], [7], [8], [17], [40], [1] * 6, [2, 1, 1, 3, 1, 4], [9, 1, 12, 1, 11, 7]):
        prompts = [rng.integers(0, base.vocab_size, n).astype(np.int32) for n in lengths]
        for first in range(len(adapters)):
            chosen = [adapters[(first + n) % len(adapters)] for n in range(len(lengths))]
            found = prefill(compact, prompts, unpacked(chosen))
            assert torch.equal(found, prefill(plain, prompts, unpacked(chosen))), lengths
    assert adapters[0] is not None
    target = adapters[0].adapter.targets[0]
    assert compact.packer.pack([adapters[0].adapter.a(target.path)], [True])[0].bits == COMPACT_BITS
