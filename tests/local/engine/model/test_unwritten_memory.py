"""Results do not depend on what memory held before: fresh tensors are full of NaN here.

Tiled kernels read past the rows of their left operand, up to the next multiple of 32, and multiply
what they find by zeros. `_TiledProducts` checks that on every processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.local.engine.sampling_models import sampled
from tests.local.engine.training_data import FORMATS, make_run, random_datum
from tinker_cookbook.local.engine.model import precision
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, SampleSpec

_TILE = 32
_LEFT_OPERAND = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mm.out: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.bmm.out: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.addmm.out: 1,
    torch.ops.aten.addmm_.default: 1,
    torch.ops.aten.baddbmm_.default: 1,
}


class _TiledProducts(TorchDispatchMode):
    """Refuses products of bfloat16 whose left operand has NaN behind a row, inside a tile."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = _LEFT_OPERAND.get(func)
        if place is not None and args[place].dtype == torch.bfloat16:
            self.num_products += 1
            behind = _behind_the_rows(args[place])
            assert not bool(behind.isnan().any()), f"{func}: NaN behind {list(args[place].shape)}"
        return func(*args, **(kwargs or {}))


def _behind_the_rows(left: torch.Tensor) -> torch.Tensor:
    """What a tile reads behind all rows but the last ones, which kernels copy first."""
    count, missing = left.shape[-1], -left.shape[-1] % _TILE
    if left.stride(-1) != 1 or not missing or count < _TILE or left.shape[-2] < 2:
        return torch.zeros(0)
    step = int(left.stride(-2))
    start = int(left.storage_offset()) + count
    whole = left.untyped_storage().nbytes() // left.element_size()
    rows = min(left.shape[-2] - 1, (whole - start - missing) // step + 1)
    return left.as_strided((max(rows, 0), missing), (step, 1), start)


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """Memory from the allocator is NaN (the largest number where there is none)."""
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    settings.fill_uninitialized_memory = fill


@pytest.fixture
def _with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 goes to torch's products whatever the processor has."""
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: True)


def _model(folder: Path, hidden_size: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=136,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _losses(folder: Path, dtype: torch.dtype, *, compiled: bool = True) -> list[float]:
    run = make_run(folder, LoraSpec(rank=8, seed=1), dtype=dtype, compiled=compiled)
    rng = np.random.default_rng(0)
    losses = []
    for length in (65, 150, 65):
        data = [random_datum(rng, length, 256), random_datum(rng, 40, 256)]
        result = run.forward_backward(data, LossSpec("cross_entropy"))
        assert run.gradient is not None
        losses += [result.metrics["loss:sum"], float(run.gradient.norm())]
    return losses


@pytest.mark.usefixtures("_poisoned")
def test_fresh_memory_is_poisoned() -> None:
    assert bool(torch.empty(3).isnan().all()), "otherwise the tests below say nothing"
    assert bool(torch.zeros(2).new_empty(3, 5).isnan().all())


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(FORMATS[0], True), (FORMATS[1], True), (FORMATS[1], False)], ids=str
)
@pytest.mark.parametrize("hidden_size", [80, 144, 208, 264, 272, 304, 592])
@pytest.mark.usefixtures("_with_instructions")
def test_training_reads_no_unwritten_memory(
    tmp_path: Path,
    hidden_size: int,
    dtype: torch.dtype,
    compiled: bool,
    request: pytest.FixtureRequest,
) -> None:
    folder = _model(tmp_path, hidden_size)
    expected = _losses(folder, dtype, compiled=compiled)
    request.getfixturevalue("_poisoned")
    with _TiledProducts() as products:
        found = _losses(folder, dtype, compiled=compiled)
    assert found == expected
    assert compiled or bool(products.num_products)
    # bfloat16 keeps 8 bits: a sum over hundreds of signed logprobs is off by less than a percent.
    np.testing.assert_allclose(found, _losses(folder, torch.float32), rtol=2e-2, atol=0.5)


@pytest.mark.parametrize(
    ("decoder", "dtype"),
    [(decoder, dtype) for decoder in ("torch", "compiled") for dtype in FORMATS],
    ids=str,
)
def test_sampling_reads_no_unwritten_memory(
    decoder: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    prompt = np.arange(10, 47, dtype=np.int32)
    spec = SampleSpec(prompt, 2, 20, seed=3, prompt_logprobs=True)

    def tokens_and_logprobs() -> list[list[float]]:
        result = sampled("llama", decoder, dtype=dtype).sample(spec)[0]
        values = [part.tolist() for s in result.sequences for part in (s.tokens, s.logprobs)]
        assert result.prompt_logprobs is not None
        return [*values, result.prompt_logprobs[1:].tolist()]

    expected = tokens_and_logprobs()
    request.getfixturevalue("_poisoned")
    with _TiledProducts():
        assert tokens_and_logprobs() == expected
