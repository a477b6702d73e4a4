"""bfloat16 base weights: training follows float32, since LoRA is folded into one product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.local.engine.training_data import make_run
from tests.tiny_models import build_tiny_model
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, TrainDatum


def _bf16_model(folder: Path) -> Path:
    """A tiny model whose weights are bfloat16 numbers, so both precisions start from the same."""
    from safetensors.torch import load_file, save_file

    build_tiny_model(folder, "llama", num_layers=3)
    path = folder / "model.safetensors"
    rounded = {name: t.bfloat16().float() for name, t in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    return folder


def _losses(folder: Path, dtype: torch.dtype, num_steps: int) -> list[float]:
    run = make_run(folder, LoraSpec(rank=8, seed=3), dtype=dtype, random_b=False)
    rng = np.random.default_rng(0)
    data = []
    for length in (40, 100, 60):
        tokens = rng.integers(0, run.model.vocab_size, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
        data.append(TrainDatum(tokens[:-1].astype(np.int32), inputs))
    losses = []
    for _ in range(num_steps + 1):
        losses.append(run.forward_backward(data, LossSpec("cross_entropy")).metrics["loss:sum"])
        run.optim_step(AdamSpec(learning_rate=2e-4))
    return losses


def test_bf16_follows_float32(tmp_path: Path) -> None:
    folder = _bf16_model(tmp_path)
    exact = _losses(folder, torch.float32, 10)
    rounded = _losses(folder, torch.bfloat16, 10)
    drop, rounded_drop = exact[0] - exact[-1], rounded[0] - rounded[-1]
    assert drop > 0
    # Two products added in bfloat16 lose more than half of the first steps' drop.
    assert abs(rounded_drop - drop) / drop < 0.01
    assert abs(rounded[-1] - exact[-1]) / exact[-1] < 2e-3
