"""Products of bfloat16 numbers on a processor that has none, and hidden states between blocks."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.local.engine.training_data import make_run
from tests.tiny_models import build_tiny_model
from tinker_cookbook.local.engine.model import precision
from tinker_cookbook.local.engine.model.attention import attention_backward, attention_forward
from tinker_cookbook.local.engine.model.precision import product
from tinker_cookbook.local.engine.types import LoraSpec


@pytest.fixture(params=[True, False], ids=["without instructions", "torch's own products"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: not request.param)


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("add", [None, torch.bfloat16, torch.float32])
def test_products_are_summed_up_in_float32_and_rounded_once(add: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(17, 600, generator=generator).bfloat16()
    w = torch.randn(600, 40, generator=generator).bfloat16()
    start = None if add is None else torch.randn(17, 40, generator=generator).to(add)
    result = product(x, w, add=start)
    exact = x.double() @ w.double() + (0 if start is None else start.double())
    assert result.dtype == (add or torch.bfloat16)
    # Half a step of bfloat16 of the product: a sum in bfloat16 would be off by many.
    bound = exact.abs() * 2**-8 + (x.double() @ w.double()).abs() * 2**-8 + 1e-4
    assert bool(((result.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("has_instructions", [True, False])
def test_the_format_of_products_follows_the_processor(
    has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: has_instructions)
    wanted = torch.bfloat16 if has_instructions else torch.float32
    assert precision.product_dtype(torch.bfloat16) == wanted
    assert precision.product_dtype(torch.float32) == torch.float32


def test_float32_products_are_torchs() -> None:
    x, w, start = torch.randn(5, 7), torch.randn(7, 3), torch.randn(5, 3)
    assert torch.equal(product(x, w), x @ w)
    assert torch.equal(product(x, w, add=start), torch.addmm(start, x, w))


@pytest.mark.usefixtures("_either_way")
def test_bfloat16_attention_follows_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 90, 32), (2, 45, 32), (2, 45, 32), (2, 90, 32)]
    q, k, v, grad = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    lengths = [30, 15]
    out, lse = attention_forward(q * 0.2, k, v, lengths)
    grads = attention_backward(grad, q * 0.2, k, v, out, lse, lengths)
    wide = [tensor.float() for tensor in (q * 0.2, k, v)]
    exact, exact_lse = attention_forward(*wide, lengths)
    exact_grads = attention_backward(grad.float(), *wide, exact, exact_lse, lengths)
    for rounded, full in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.float() - full).norm() / full.norm()) < 0.01


def test_hidden_states_between_blocks_are_float32(tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", num_layers=2)
    run = make_run(tmp_path, LoraSpec(rank=4, seed=0), dtype=torch.bfloat16)
    tokens = torch.arange(12)
    hidden, tape = run.model.transformer.forward(run.adapter, tokens, [12], keep_blocks=2)
    assert [state.dtype for state in tape.inputs] == [torch.float32] * 3
    assert hidden.dtype == run.model.weights.dtype
