"""Tiny models with their schedulers, for the tests of sampling."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch

from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.native_decoder import native_decoder
from tinker_cookbook.local.engine.sampling.request_checks import check_sample_spec
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.static_decoder import StaticDecoder
from tinker_cookbook.local.engine.sampling.stops import build_stop_rule, load_tokenizer
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.types import LoraSpec, ModelInfo, SampleResult, SampleSpec

DECODERS = ("torch", "static", "compiled")
ON_TORCH = {"torch": TorchDecoder, "static": StaticDecoder}
PAIRS = "compiled, bfloat16"
"""Decoder whose products, keys and values are in bfloat16."""
EOS = 2


@dataclass
class Sampled:
    """A tiny model and its scheduler."""

    info: ModelInfo
    base: NativeModel
    scheduler: Scheduler
    cache: KvCache

    def start(self, spec: SampleSpec, adapter: StackedLora | None = None, **options) -> Request:
        """Queue a request."""
        rule = build_stop_rule(
            spec.stop,
            eos_token_ids=self.info.eos_token_ids,
            vocab_size=self.info.vocab_size,
            get_tokenizer=lambda: load_tokenizer(self.info.folder),
        )
        max_new = check_sample_spec(spec, self.info)
        request = Request(spec, adapter, Future(), rule, max_new, **options)
        self.scheduler.add(request)
        return request

    def run(self, *requests: Request, max_steps: int = 5000) -> list[SampleResult]:
        """Step until no work is left, and return the results of some requests."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.scheduler.step()
        return [request.future.result(timeout=0) for request in requests]

    def sample(self, *specs: SampleSpec, adapter: StackedLora | None = None) -> list[SampleResult]:
        """Serve requests together and return their results."""
        return self.run(*[self.start(spec, adapter) for spec in specs])


def sampled(
    architecture: str = "llama",
    decoder: str = "torch",
    *,
    cache_bytes: int = 64 * 2**20,
    limits: SchedulerLimits | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Sampled:
    """Build a tiny model with a decoder; skip the test where kernels cannot be compiled.

    `static` is the decoder for GPUs, without records of its steps.
    """
    folder = tiny_model(architecture)
    dtype = torch.bfloat16 if decoder == PAIRS else dtype
    base = load_base_model(folder, device=device, dtype=dtype, compiled=decoder not in ON_TORCH)
    assert isinstance(base, NativeModel), "tiny models have native architectures"
    if decoder in ON_TORCH:
        chosen = ON_TORCH[decoder](base.arch, base.weights)
    else:
        compiled = native_decoder(base.arch, base.weights)
        if compiled is None:
            import pytest

            pytest.skip("no C compiler here")
        chosen = compiled
    cache = KvCache(chosen.cache_shape, cache_bytes)
    scheduler = Scheduler(chosen, cache, limits or SchedulerLimits())
    info = ModelInfo(str(folder), str(folder), base.vocab_size, base.max_positions, (EOS,))
    return Sampled(info, base, scheduler, cache)


def random_adapter(base: NativeModel, seed: int, *, rank: int = 4, **parts: bool) -> StackedLora:
    """Return an adapter whose B matrices are not zero."""
    spec = LoraSpec(rank=rank, seed=seed, **parts)
    adapter = Adapter(spec, base.lora_targets(spec), device=base.device)
    generator = torch.Generator().manual_seed(seed)
    for target in adapter.targets:
        b = adapter.b(target.path)
        b.copy_(torch.empty(b.shape).normal_(std=0.02, generator=generator))
    return StackedLora(adapter, base.weights.dtype)
