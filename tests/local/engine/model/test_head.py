"""The head in chunks: the same logprobs and gradients whatever the size of a chunk."""

from __future__ import annotations

import pytest
import torch

from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.head import Head
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.model.matrices import DenseMatrix
from tinker_cookbook.local.engine.training.built_in_loss import BuiltInPackLoss
from tinker_cookbook.local.engine.training.losses import LOSSES
from tinker_cookbook.local.engine.types import LoraSpec

VOCAB, HIDDEN, CHUNK_ROWS = 20, 6, 16


@pytest.mark.parametrize("num_trained", [1, 16, 17, 33, 47])
def test_chunks_agree_with_autograd_on_all_rows(num_trained: int) -> None:
    torch.manual_seed(num_trained)
    num_rows = num_trained + 5  # rows without a gradient follow those with one
    weight = torch.randn(VOCAB, HIDDEN)
    hidden = torch.randn(num_rows, HIDDEN, requires_grad=True)
    targets = torch.randint(0, VOCAB, (num_rows, 1))
    weights = torch.rand(num_rows, 1)
    weights[num_trained:] = 0

    expected = (hidden @ weight.t()).log_softmax(-1).gather(1, targets)
    loss = -(weights * expected).sum()
    loss.backward()
    assert hidden.grad is not None

    head = Head(DenseMatrix(weight), chunk_bytes=CHUNK_ROWS * 4 * VOCAB)
    adapter = Adapter(LoraSpec(rank=1, seed=0), [])
    sink = GradientSink(adapter.layout, adapter.parameters)
    pack_loss = BuiltInPackLoss(LOSSES["cross_entropy"], {}, {"weights": weights})
    logprobs, gradient = head.logprobs_and_gradient(
        adapter,
        hidden.detach()[:num_trained],
        targets[:num_trained],
        pack_loss.gradient,
        sink,
    )
    torch.testing.assert_close(logprobs, expected.detach()[:num_trained])
    torch.testing.assert_close(gradient, hidden.grad[:num_trained])
    torch.testing.assert_close(head.logprobs(adapter, hidden.detach(), targets), expected.detach())
    assert pack_loss.total == pytest.approx(float(loss.detach()), rel=1e-5)
