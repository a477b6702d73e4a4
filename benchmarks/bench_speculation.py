"""Decode one request in this process, with and without speculative decoding."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

_NEW_TOKENS = 160
_LIST = """def area(width, height):
    return width * height

def perimeter(width, height):
    return 2 * (width + height)

def describe(width, height):
    print("area", area(width, height))
    print("perimeter", perimeter(width, height))
"""
CHATS = {
    "quote": (f"Write out this program again, unchanged:\n\n{_LIST}", 0.0),
    "story": ("Tell me a short story about a lighthouse keeper and a storm.", 1.0),
}
"""User message and temperature of each chat."""


class SpeculatingModel:
    """A base model and its scheduler."""

    def __init__(self, folder: str) -> None:
        import torch
        from tokenizers import Tokenizer

        from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
        from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
        from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
        from tinker_cookbook.local.engine.sampling.native_decoder import native_decoder
        from tinker_cookbook.local.engine.sampling.scheduler import Scheduler

        base = load_base_model(Path(folder), dtype=torch.float32)
        assert isinstance(base, NativeModel), "the default model is native"
        decoder = native_decoder(base.arch, base.weights)
        if decoder is None:
            raise SystemExit("speculative decoding needs compiled kernels; install a C compiler")
        self._decoder = decoder
        cache = KvCache(decoder.cache_shape, 2**30)
        self._scheduler = Scheduler(decoder, cache, SchedulerLimits())
        self._tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))

    def reply(self, text: str, temperature: float, *, speculates: bool) -> dict[str, Any]:
        """Sample a reply of fixed length."""
        from tinker_cookbook.local.engine.sampling.sequence import Request
        from tinker_cookbook.local.engine.sampling.stops import StopRule
        from tinker_cookbook.local.engine.types import SampleSpec

        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        prompt = np.array(self._tokenizer.encode(chat).ids, np.int32)
        spec = SampleSpec(prompt, max_tokens=_NEW_TOKENS, temperature=temperature, seed=1)
        self._decoder.exact = speculates
        request = Request(spec, None, Future(), StopRule(frozenset(), ()), _NEW_TOKENS)
        self._scheduler.add(request)
        self._scheduler.step()  # the prompt
        wall, cpu = time.perf_counter(), time.process_time()
        while self._scheduler.has_work:
            self._scheduler.step()
        result = request.future.result(timeout=0)
        return {
            "tokens": len(result.sequences[0].tokens) - 1,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
