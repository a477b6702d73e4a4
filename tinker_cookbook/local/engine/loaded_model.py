"""A base model in memory, with the scheduler that samples from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tinker_cookbook.local.engine.model.architecture import read_eos_token_ids
from tinker_cookbook.local.engine.model.base_model import (
    BaseModel,
    NativeModel,
    bits_per_number,
    load_base_model,
)
from tinker_cookbook.local.engine.model.hf_model import HfModel
from tinker_cookbook.local.engine.model.number_formats import FULL
from tinker_cookbook.local.engine.model.precision import lacks_products
from tinker_cookbook.local.engine.sampling.hf_decoder import HfCache, HfDecoder
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.native_decoder import native_decoder
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.static_decoder import StaticDecoder
from tinker_cookbook.local.engine.sampling.stops import load_tokenizer
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.types import ModelInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LoadedModel", "read_weight_bytes"]

_LIMITS_OF_A_GPU = SchedulerLimits(max_batch_tokens=2048)
"""A GPU is not filled by the 512 prompt tokens that are enough for a processor."""


class LoadedModel:
    """A base model in memory and what samples from it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        base_format: str = FULL,
        cache_bytes: Callable[[], int],
    ) -> None:
        """Read a model's weights.

        Args:
            name: the name that clients use.
            cache_bytes: returns the memory for keys and values; called when the weights are loaded.
        """
        self.base = load_base_model(folder, device=device, dtype=dtype, base_format=base_format)
        self.dtype = dtype
        self.info = ModelInfo(
            name=name,
            folder=str(folder),
            vocab_size=self.base.vocab_size,
            max_context_length=self.base.max_positions,
            eos_token_ids=read_eos_token_ids(folder),
            supports_images=self.base.count_image_tokens is not None,
            dtype=_product_dtype(self.base, dtype, device),
            device=str(device),
            base_format=base_format,
        )
        self.scheduler = _build_scheduler(self.base, cache_bytes())
        self.last_used = time.monotonic()
        self._tokenizer: Tokenizer | None = None

    def tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer, which the first call loads."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.info.folder)
        return self._tokenizer


def _build_scheduler(base: BaseModel, cache_bytes: int) -> Scheduler:
    if isinstance(base, NativeModel):
        decoder = native_decoder(base.arch, base.weights) or _torch_decoder(base)
        limits = SchedulerLimits() if base.weights.on_cpu else _LIMITS_OF_A_GPU
        return Scheduler(decoder, KvCache(decoder.cache_shape, cache_bytes), limits)
    assert isinstance(base, HfModel), "models are native or run through transformers"
    return Scheduler(HfDecoder(base), HfCache(base))


def _torch_decoder(base: NativeModel) -> StaticDecoder | TorchDecoder:
    """Return the decoder with static shapes where they can be recorded, on NVIDIA's GPUs."""
    kind = StaticDecoder if base.device.type == "cuda" else TorchDecoder
    return kind(base.arch, base.weights)


def _product_dtype(base: BaseModel, dtype: torch.dtype, device: torch.device) -> str:
    """Return the name of the format in which matrices are multiplied.

    It differs from the format of the weights where torch computes and the machine has no such
    products.
    """
    by_torch = isinstance(base, NativeModel) and not base.weights.paired
    if by_torch and lacks_products(torch.empty(0, dtype=dtype, device=device)):
        dtype = torch.float32
    return str(dtype).removeprefix("torch.")


def read_weight_bytes(
    folder: Path, device: torch.device, dtype: torch.dtype, base_format: str = FULL
) -> int:
    """Return the memory that a model's weights take in a format, from the headers of its files."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                count = 1
                for size in shape:
                    count *= size
                total += count
    return total * bits_per_number(folder, device, dtype, base_format) // 8
