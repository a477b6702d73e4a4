"""Attention inside segments, on torch and on compiled kernels, against torch's own in float64."""

# pyright: reportCallIssue=false

from __future__ import annotations

import pytest
import torch

from tinker_cookbook.local.engine.model import attention
from tinker_cookbook.local.engine.model.attention import (
    attention_backward,
    attention_forward,
    paired_attention_backward,
    paired_attention_forward,
)

SHAPES = [
    # key heads, query heads of each, head size, lengths
    (1, 1, 8, (1,)),
    (2, 3, 64, (5, 33, 1)),
    (3, 3, 64, (300, 129)),
    (1, 8, 12, (40, 257)),
    (2, 5, 80, (31, 32, 256)),
    (1, 1, 128, (1300, 7)),
]
"""Segments shorter and longer than a block of keys; the longest goes back in several ranges."""


@pytest.fixture(params=["torch", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(attention, "_kernels", lambda: None)
    elif attention._kernels() is None:
        pytest.skip("no C compiler here")
    return request.param


def draw(kv_heads: int, group: int, dim: int, tokens: int) -> list[torch.Tensor]:
    """Queries, keys, values and a gradient of the output."""
    torch.manual_seed(tokens)
    queries, keys = (kv_heads, tokens * group, dim), (kv_heads, tokens, dim)
    q, k, v, grad = (torch.randn(size) for size in (queries, keys, keys, queries))
    return [q * dim**-0.5, k, v, grad]


def merge(values: torch.Tensor, group: int) -> torch.Tensor:
    """From [K, T G, D] to [T, K G D], the layout of the paired functions."""
    return values.unflatten(1, (-1, group)).transpose(0, 1).flatten(1).contiguous()


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]
) -> torch.Tensor:
    group, parts, start = q.shape[1] // k.shape[1], [], 0
    for length in lengths:
        keys = slice(start, start + length)
        rows = slice(start * group, (start + length) * group)
        scores = q[:, rows] @ k[:, keys].transpose(1, 2)
        later = torch.ones(length, length, dtype=torch.bool).triu(1).repeat_interleave(group, 0)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        parts.append(weights @ v[:, keys])
        start += length
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("kv_heads", "group", "dim", "lengths"), SHAPES)
@pytest.mark.usefixtures("path")
def test_values_and_gradients(
    kv_heads: int, group: int, dim: int, lengths: tuple[int, ...]
) -> None:
    *inputs, grad = draw(kv_heads, group, dim, sum(lengths))
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference(*exact, lengths)
    expected.backward(grad.double())

    out, lse = attention_forward(*inputs, lengths)
    found = attention_backward(grad, *inputs, out, lse, lengths)
    assert (out - expected).abs().max() < 2e-5
    for ours, tensor in zip(found, exact, strict=True):
        assert tensor.grad is not None
        error = (ours - tensor.grad).norm() / tensor.grad.norm().clamp(min=1)
        assert error < 5e-6


@pytest.mark.parametrize(("kv_heads", "group", "dim", "lengths"), SHAPES)
def test_gradients_from_rounded_operands(
    kv_heads: int, group: int, dim: int, lengths: tuple[int, ...]
) -> None:
    if attention._kernels() is None:
        pytest.skip("no C compiler here")
    *inputs, grad = draw(kv_heads, group, dim, sum(lengths))
    expected = attention_backward(grad, *inputs, *attention_forward(*inputs, lengths), lengths)
    out, lse = paired_attention_forward(*inputs, lengths)
    found = paired_attention_backward(merge(grad, group), *inputs, out, lse, lengths)
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm().clamp(min=1)


@pytest.mark.usefixtures("path")
def test_large_scores_overflow_nothing() -> None:
    q, k, v, grad = draw(1, 2, 16, 300)
    q *= 1e4
    out, lse = attention_forward(q, k, v, (300,))
    found = attention_backward(grad, q, k, v, out, lse, (300,))
    assert all(tensor.isfinite().all() for tensor in (out, *found))


def test_large_scores_overflow_nothing_in_pairs() -> None:
    if attention._kernels() is None:
        pytest.skip("no C compiler here")
    q, k, v, grad = draw(1, 2, 16, 300)
    q *= 1e4
    out, lse = paired_attention_forward(q, k, v, (300,))
    found = paired_attention_backward(merge(grad, 2), q, k, v, out, lse, (300,))
    assert all(tensor.isfinite().all() for tensor in (out, *found))


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    if attention._kernels() is None:
        pytest.skip("no C compiler here")
    *inputs, grad = draw(1, 2, 16, 1400)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            out, lse = attention_forward(*inputs, (1100, 300))
            exact = attention_backward(grad, *inputs, out, lse, (1100, 300))
            merged, sums = paired_attention_forward(*inputs, (1100, 300))
            paired = paired_attention_backward(merge(grad, 2), *inputs, merged, sums, (1100, 300))
            results.append((out, *exact, merged, *paired))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_segments_in_order_equal_the_blocks():
    """The list of tasks, one per block of a segment, must live as long as the call reads it."""
    generator = torch.Generator().manual_seed(0)
    group, kv_heads, dim = 3, 3, 64
    for round_number in range(8):
        lengths = [int(n) for n in torch.randint(20, 300, (40,), generator=generator)]
        total = sum(lengths)
        q = torch.randn(kv_heads, total * group, dim, generator=generator) / dim**0.5
        k, v = torch.randn(2, kv_heads, total, dim, generator=generator)
        found, _ = paired_attention_forward(q, k, v, lengths)
        expected = merge(attention_forward(q, k, v, lengths)[0], group)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, msg=f"{round_number}")
