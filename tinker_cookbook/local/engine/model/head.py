"""From hidden states to logprobs of targets and back, in chunks of rows.

No [tokens, vocabulary] tensor is kept: two reused buffers hold the logits and the probabilities of
one chunk, and the probabilities become the gradient in place. All of it is float32.

Legend: M rows (positions with targets), C rows of a chunk, K targets per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch

from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.lora import HEAD_PATH, Adapter
from tinker_cookbook.local.engine.model.matrices import Matrix
from tinker_cookbook.local.engine.model.packed_matrix import PackedMatrix
from tinker_cookbook.local.engine.native.low_rank import low_rank_gradients
from tinker_cookbook.local.engine.native.operands import LoraPair

__all__ = ["Head", "LogprobGradient"]

LogprobGradient = Callable[[slice, torch.Tensor], torch.Tensor]
"""Maps a slice of rows and their logprobs [C, K] to the gradient of the loss [C, K]."""

_CHUNK_BYTES = 48 * 2**20
_CHUNK_BYTES_ACCELERATOR = 256 * 2**20
"""A GPU needs some hundred rows at once, and each chunk makes it wait for the processor."""
_SMALLEST_EXACT = -80.0
"""Below this logprob, its exponential is close to the smallest normal float32."""


def _chunk_rows(vocab_size: int, num_rows: int, chunk_bytes: int) -> int:
    """Return the rows of a chunk: chunks have about equal sizes, so that no last one is small."""
    size = max(16, chunk_bytes // (4 * vocab_size))
    count = max(1, -(-num_rows // size))
    return max(1, -(-num_rows // count))


class Head:
    """The unembedding of one base model."""

    def __init__(
        self, matrix: Matrix, *, chunk_bytes: int | None = None, on_cpu: bool = True
    ) -> None:
        """
        Args:
            matrix: [V, H], frozen.
            chunk_bytes: maximum memory of the logits; None chooses by device.
            on_cpu: whether a CPU computes.
        """
        self._matrix = matrix
        self._vocab = matrix.out_features
        self._chunk_bytes = chunk_bytes or (_CHUNK_BYTES if on_cpu else _CHUNK_BYTES_ACCELERATOR)
        self._buffers = torch.empty(2, 0, 0)

    def logprobs(
        self, adapter: Adapter, hidden: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the logprobs, float32 [M, K], of the int64 targets [M, K] after states [M, H]."""
        logprobs = torch.empty(targets.shape, device=hidden.device)
        for rows in self._chunks(hidden.shape[0]):
            logits, _ = self._logits(adapter, hidden[rows])
            logprobs[rows], _ = self._softmax(logits, targets[rows])
        return logprobs

    def logprobs_and_gradient(
        self,
        adapter: Adapter,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        gradient_of: LogprobGradient,
        sink: GradientSink,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logprobs and the states' gradient [M, H]; add LoRA's gradient to `sink`."""
        hidden_grad = torch.empty_like(hidden)
        logprobs = torch.empty(targets.shape, device=hidden.device)
        for rows in self._chunks(hidden.shape[0]):
            logits, low = self._logits(adapter, hidden[rows])
            logprobs[rows], probabilities = self._softmax(logits, targets[rows])
            gradient = gradient_of(rows, logprobs[rows])
            # d logprob_k / d logits = onehot_k - softmax; summed over k, weighted by `gradient`.
            logits_grad = probabilities.mul_(-gradient.sum(1, keepdim=True))
            logits_grad.scatter_add_(1, targets[rows], gradient)
            states_grad, low_grad = self._gradients(adapter, logits_grad, hidden.dtype)
            hidden_grad[rows] = states_grad
            if low is not None:
                sink.add(
                    HEAD_PATH,
                    x=hidden[rows].float(),
                    low=low,
                    low_grad=low_grad,
                    out_grad=logits_grad,
                    kernels=low_rank_gradients() if _is_paired(self._matrix) else None,
                )
        return logprobs, hidden_grad

    def buffer_bytes(self, num_rows: int) -> int:
        """Return the memory of the two buffers for `num_rows` rows."""
        rows = min(_chunk_rows(self._vocab, num_rows, self._chunk_bytes), num_rows)
        return 2 * 4 * rows * self._vocab

    def _chunks(self, num_rows: int) -> list[slice]:
        size = _chunk_rows(self._vocab, num_rows, self._chunk_bytes)
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    def _logits(
        self, adapter: Adapter, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits in a reused buffer, [C, V], and `low` [C, r] of a trained head."""
        num_rows = hidden.shape[0]
        if self._buffers.shape[1] < num_rows or self._buffers.device != hidden.device:
            self._buffers = torch.empty(2, num_rows, self._vocab, device=hidden.device)
        logits = self._buffers[0, :num_rows]
        lora = _lora_of(adapter)
        if lora is not None and _is_paired(self._matrix):
            return logits, self._matrix.products.forward(self._matrix, hidden, lora, out=logits)[1]
        self._matrix.multiply_into(logits, hidden)
        if lora is None:
            return logits, None
        low = (hidden.float() @ lora.a.t()).mul_(lora.scale)
        logits.addmm_(low, lora.b[0].t())
        return logits, low

    def _gradients(
        self, adapter: Adapter, logits_grad: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of the states [C, H] and of `states A'`: [C, r], or [C, 0]."""
        lora = _lora_of(adapter)
        if lora is None or _is_paired(self._matrix):
            return self._matrix.backward(logits_grad.to(dtype), lora)
        states_grad, _ = self._matrix.backward(logits_grad.to(dtype))
        low_grad = (logits_grad @ lora.b[0]).mul_(lora.scale)
        return states_grad.add_(low_grad @ lora.a), low_grad

    def _softmax(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logprobs of the targets, and all probabilities in the other buffer.

        The logarithm of a softmax saves one pass over the vocabulary compared with a log-softmax
        and its exponential. It is as exact until a probability leaves the range of float32; those
        rows are computed again. To find them, a GPU would have to wait, so it takes the other pass.
        """
        probabilities = self._buffers[1, : len(logits)]
        torch.softmax(logits, dim=-1, out=probabilities)
        if logits.device.type != "cpu":
            lse = torch.logsumexp(logits, dim=-1, keepdim=True)
            return logits.gather(1, targets) - lse, probabilities
        logprobs = probabilities.gather(1, targets).log_()
        unlikely = (logprobs < _SMALLEST_EXACT).any(dim=1).nonzero()[:, 0]
        if len(unlikely):
            exact = torch.log_softmax(logits[unlikely], dim=-1)
            logprobs[unlikely] = exact.gather(1, targets[unlikely])
        return logprobs, probabilities


def _lora_of(adapter: Adapter) -> LoraPair | None:
    """Return the adapter of the unembedding, float32; None if it is not trained."""
    if not adapter.group(HEAD_PATH):
        return None
    return LoraPair(adapter.a(HEAD_PATH), (adapter.b(HEAD_PATH),), adapter.scale)


def _is_paired(matrix: Matrix) -> TypeGuard[PackedMatrix]:
    return isinstance(matrix, PackedMatrix) and matrix.paired
