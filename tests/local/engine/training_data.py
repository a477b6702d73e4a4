"""Random training data and reference models for the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinker_cookbook.local.engine.model.base_model import load_base_model
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import LoraSpec, TrainDatum

__all__ = [
    "FORMATS",
    "make_run",
    "peft_model",
    "random_datum",
    "reference_logprobs",
    "set_random_b",
]

FORMATS = (torch.float32, torch.bfloat16)
"""What the engine computes in; tests name theirs, since the default depends on the processor."""


def random_datum(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> TrainDatum:
    """A cross-entropy datum with signed weights, some of them 0."""
    weights = rng.standard_normal(num_tokens) * (rng.random(num_tokens) > 0.3)
    return TrainDatum(
        tokens=rng.integers(0, vocab_size, num_tokens).astype(np.int32),
        loss_inputs={
            "target_tokens": rng.integers(0, vocab_size, num_tokens),
            "weights": weights.astype(np.float32),
        },
    )


def make_run(
    folder: Path,
    spec: LoraSpec | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    random_b: bool = True,
    compiled: bool = True,
) -> TrainingRun:
    """A run on a model folder; B is random unless told otherwise, so every gradient is non-zero."""
    base = load_base_model(folder, dtype=dtype, compiled=compiled)
    run = TrainingRun(base, spec or LoraSpec(rank=4, seed=1))
    if random_b:
        set_random_b(run.adapter)
    return run


def set_random_b(adapter: Adapter, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for target in adapter.targets:
        b = adapter.b(target.path)
        b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    adapter.version += 1


def peft_model(folder: Path, adapter: Adapter) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """transformers + PEFT with the same adapter, and its parameters by `PATH.A` and `PATH.B`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = sorted({target.path.rsplit(".", 1)[-1] for target in adapter.targets})
    config = LoraConfig(r=adapter.rank, lora_alpha=int(adapter.spec.alpha), target_modules=modules)
    model = get_peft_model(base, config).eval()
    named = dict(model.named_parameters())
    parameters = {}
    for target in adapter.targets:
        for side, values in (("A", adapter.a(target.path)), ("B", adapter.b(target.path))):
            name = f"base_model.model.{target.path}.lora_{side}.default.weight"
            named[name].data.copy_(values)
            parameters[f"{target.path}.{side}"] = named[name]
    return model, parameters


def reference_logprobs(model: Any, datum: TrainDatum) -> torch.Tensor:
    """Logprobs of the targets from a transformers model, with a graph."""
    tokens = torch.from_numpy(datum.tokens).long()[None]
    targets = datum.loss_inputs["target_tokens"]
    assert isinstance(targets, np.ndarray)
    log_softmax = torch.log_softmax(model(tokens).logits[0].float(), dim=-1)
    return log_softmax.gather(1, torch.from_numpy(targets)[:, None])[:, 0]
