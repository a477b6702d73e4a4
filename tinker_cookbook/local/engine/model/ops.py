"""The elementwise parts of a decoder block: norms, rotary positions, SwiGLU, with their gradients.

Norms and rotations compute in float32 whatever the dtype of their input. `native/train_kernels.c`
has the same formulas, compiled; the functions here choose between both.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tinker_cookbook.local.engine.model.architecture import RopeConfig
from tinker_cookbook.local.engine.native.train_ops import TrainKernels, train_kernels

__all__ = [
    "RopeTable",
    "apply_rope",
    "inverse_rms",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_into",
    "rope_into",
    "swiglu_backward",
    "swiglu_into",
]


class RopeTable:
    """Cosines and sines by position, float32 [P, D]; they grow when a longer sequence arrives.

    NumPy computes them, on every device: torch's cosine gives other last bits in about one process
    in 40, where threads call MKL for the first time at once. Then a run that resumes, or the
    trainer and the sampler, would differ.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device | str) -> None:
        self._inverse_frequencies = _inverse_frequencies(rope, head_dim)
        self._device = device
        self._cos = self._sin = torch.empty(0, head_dim, device=device)

    def up_to(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tables (cosines, sines) with at least `num_positions` rows."""
        if self._cos.shape[0] < num_positions:
            size = max(256, 1 << (num_positions - 1).bit_length())
            positions = torch.arange(size, dtype=torch.float32)
            angles = torch.outer(positions, self._inverse_frequencies).double().numpy()
            self._cos, self._sin = (self._table(f(angles)) for f in (np.cos, np.sin))
        return self._cos, self._sin

    def _table(self, values: np.ndarray) -> torch.Tensor:
        half = torch.from_numpy(values).float()
        return torch.cat([half, half], dim=-1).to(self._device)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Keep high frequencies, divide low ones by `factor`, and blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [..., heads, D] by tables that broadcast against it.

    The gradient of a rotation is the rotation back, which is this function with `-sin`.
    """
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def rope_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Write the rotation of `x` into `out`, which may be strided.

    The tables hold the first half of each row, [..., D / 2]; the second half is the same.
    """
    first, second = x.float().chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    if out.dtype == torch.float32:
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        return
    out_first.copy_((first * cos).addcmul_(second, sin, value=-1))
    out_second.copy_((second * cos).addcmul_(first, sin))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the root-mean-square norm over the last axis, in the dtype of `weight`."""
    if x.device.type == "cuda":  # one kernel
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(weight.dtype)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.mul_(weight).to(weight.dtype)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, float32 [..., 1]."""
    wide = x.float()
    return torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def rms_norm_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor
) -> None:
    """Write the norm of `x` into `out`, which may be strided; `inverse` is its `inverse_rms`."""
    kernels = _kernels_for(out, x)
    if kernels is not None:
        kernels.norm(out, x, weight, inverse)
        return
    if out.dtype == torch.float32:
        torch.mul(x, inverse, out=out).mul_(weight)
    else:
        out.copy_((x.float() * inverse).mul_(weight))


def rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    *,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the norm's input, in the dtype of `x`, plus `add`.

    With i = inverse and y = x i w, grad_x = g w i - x i^3 mean(g w x): i depends on x too. The
    weight is frozen and gets no gradient.
    """
    kernels = _kernels_for(grad, x)
    if kernels is not None:
        return kernels.norm_gradient(grad, x, weight, inverse, add)
    scaled = grad.float() * weight
    wide = x.float()
    mean = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).div_(x.shape[-1])
    scaled.mul_(inverse)
    result = scaled.addcmul_(wide, mean * inverse.pow(3), value=-1).to(x.dtype)
    return result if add is None else add + result


def swiglu_into(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Write `silu(gate) * up` of [T, 2 I] into `out` [T, I], which may be strided."""
    kernels = _kernels_for(out, gate_up)
    if kernels is not None:
        kernels.swiglu(out, gate_up)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def swiglu_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: torch.Tensor
) -> torch.Tensor:
    """Return the gradient [T, 2 I]; also write the forward value into `activation` [T, I]."""
    kernels = _kernels_for(grad, gate_up, activation)
    if kernels is not None:
        return kernels.swiglu_gradient(grad, gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    gate_grad, up_grad = result.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    torch.mul(silu, up, out=activation)
    torch.mul(grad, silu, out=up_grad)
    # silu'(g) = s + g s (1 - s) = s + silu - silu s
    slope = torch.addcmul(silu, silu, sigmoid, value=-1).add_(sigmoid)
    torch.mul(grad, up, out=gate_grad)
    gate_grad.mul_(slope)
    return result


def _kernels_for(*tensors: torch.Tensor) -> TrainKernels | None:
    """Return the compiled kernels if they exist and take these tensors."""
    return train_kernels() if TrainKernels.fits(*tensors) else None
