"""What a model will take and give on this machine, from its config.json, before it is loaded.

Counts are exact where the engine runs the architecture itself. Speeds are this machine's measured
matrix-product and memory rates times the share of them that the engine reaches; the shares were
measured with the default model and a 0.6B one (docs/performance.md).
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.config import (
    ArchConfig,
    dtype_from_environment,
    read_arch,
    read_config_json,
)
from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.engine.native.build import find_compiler

__all__ = ["MachineRates", "ModelPlan", "build_plan", "describe_plan", "measure_rates"]

GIB = 2**30
_PACK_TOKENS = 1024
_LEAST_ROOM = 32
"""Rank for which a loaded model has room from the start."""
_ACTIVATION_BYTES = 2 * GIB
_HEAD_BUFFERS = 96 * 2**20
_SPARE_BYTES = GIB // 2
"""Python, torch and what allocators hold back."""
_MAX_CACHE_BYTES = 4 * GIB
_BLOCK_TOKENS = 128
"""Queries of which attention holds the scores at the same time."""
_TRAIN_SHARE = 0.7
_DECODE_SHARE = 0.75
_BANDWIDTH_SHARE = 0.8
_BFLOAT16_GAIN = 2.2
"""bfloat16 products against float32 ones where the processor has them."""


@dataclass(frozen=True)
class MachineRates:
    """What the processor does in a second."""

    flops: float
    """float32 matrix products."""
    bandwidth: float
    """Bytes read."""


@dataclass(frozen=True)
class ModelPlan:
    """Sizes in bytes, speeds in tokens per second."""

    model: str
    arch: ArchConfig
    num_parameters: int
    adapter_parameters: int
    rank: int
    dtype: str
    dtype_reason: str
    free_bytes: int | None
    memory: dict[str, int]
    """Part -> bytes held from the start or by the first use, in the order of use."""
    bytes_per_run: int
    bytes_per_sampler: int
    bytes_per_cached_token: int
    max_train_tokens: int
    """Longest sequence that trains in the free memory; 0 if nothing does."""
    max_sample_tokens: int
    """Longest sequence (prompt and completion) that keys and values have room for."""
    speeds: dict[str, float]

    @property
    def total_bytes(self) -> int:
        """What one run and one sampler need together."""
        return sum(self.memory.values()) + self.bytes_per_run + self.bytes_per_sampler

    @property
    def fits(self) -> bool:
        """Whether that is free."""
        return self.free_bytes is None or self.total_bytes <= self.free_bytes


def build_plan(
    model: str,
    folder: Path,
    *,
    rank: int = 32,
    dtype: str | None = None,
    free_bytes: int | None = None,
    rates: MachineRates | None = None,
) -> ModelPlan:
    """Plan a model from `folder`/config.json; weights need not be there.

    Args:
        rank: LoRA rank of the runs, on attention and MLP.
        dtype: `float32` or `bfloat16`; None is what the environment asks for, or else what the
            engine would choose on a CPU.
        free_bytes: memory that may be taken; None asks the system.
        rates: of the machine; None measures them, in half a second.

    Raises:
        ConfigurationError: if the architecture is not one that the engine runs itself.
    """
    arch = read_arch(folder)
    config = read_config_json(folder)
    if arch is None:
        raise ConfigurationError(
            f"model={model} is of type {config.get('model_type')!r}, which runs through "
            "transformers; a plan is made for llama, mistral, qwen2 and qwen3 without sliding "
            "window. Load it, and see `resident_bytes` in the service's status"
        )
    chosen, reason = _choose_dtype(dtype or dtype_from_environment())
    size = 2 if chosen == "bfloat16" else 4
    free = available_bytes() if free_bytes is None else free_bytes
    blocks, embedding = (
        _block_parameters(arch) * arch.num_layers,
        arch.vocab_size * arch.hidden_size,
    )
    parameters = blocks + embedding * (1 if arch.tied_embeddings else 2) + arch.hidden_size
    adapter = rank * _adapter_width(arch) * arch.num_layers
    stored = str(config.get("dtype", config.get("torch_dtype")))
    packed = 2 if "bfloat16" in (stored, chosen) else 4
    compiled = find_compiler() is not None
    per_token = arch.num_layers * 2 * arch.kv_size * 4
    kernels = compiled and chosen == "float32"
    spare = _spare_columns(arch, rank) * arch.num_layers
    weights = {"weights": (parameters + spare) * size}
    if kernels:
        weights = {"weights, packed for training and sampling": parameters * packed}
    elif compiled:
        weights["packed copy for sampling"] = (blocks + embedding) * packed
    activations = functools.partial(_activation_bytes, arch, rank, size=size, kernels=kernels)
    memory = {
        **weights,
        "gradient, shared by the runs": adapter * 4,
        "activations of a pack": activations(_PACK_TOKENS),
        "python and torch": _SPARE_BYTES,
    }
    run, sampler = adapter * 12, adapter * 8
    left = None if free is None else free - sum(memory.values()) - run - sampler
    cache = _MAX_CACHE_BYTES if left is None else max(0, min(left // 4, _MAX_CACHE_BYTES))
    room = None if left is None else left - cache + memory["activations of a pack"]
    rates = rates or measure_rates()
    return ModelPlan(
        model=model,
        arch=arch,
        num_parameters=parameters,
        adapter_parameters=adapter,
        rank=rank,
        dtype=chosen,
        dtype_reason=reason,
        free_bytes=free,
        memory=memory,
        bytes_per_run=run,
        bytes_per_sampler=sampler,
        bytes_per_cached_token=per_token,
        max_train_tokens=_longest(arch.max_positions, activations, room),
        max_sample_tokens=min(arch.max_positions, cache // per_token),
        speeds=_speeds(arch, blocks, adapter, (chosen, packed if compiled else size), rates),
    )


def _choose_dtype(wanted: str | None) -> tuple[str, str]:
    if wanted is not None:
        return wanted, "as asked for"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    found = sorted({"avx512_bf16", "amx_bf16"} & flags)
    if found:
        return "bfloat16", f"the processor multiplies it fast ({found[0]})"
    return "float32", "the processor has no bfloat16 products (avx512_bf16, amx_bf16)"


def _block_parameters(arch: ArchConfig) -> int:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    norms = 2 * hidden + (2 * arch.head_dim if arch.qk_norm else 0)
    bias = arch.q_size + 2 * arch.kv_size if arch.qkv_bias else 0
    attention = hidden * (2 * arch.q_size + 2 * arch.kv_size)
    return attention + 3 * hidden * inner + norms + bias


def _adapter_width(arch: ArchConfig) -> int:
    """Parameters of one block's adapter per unit of rank."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    attention = 4 * hidden + 2 * arch.q_size + 2 * arch.kv_size
    return attention + 3 * (hidden + inner)


def _spare_columns(arch: ArchConfig, rank: int) -> int:
    """Columns beside the matrices of a block, where training puts the adapter in use."""
    rank = max(rank, _LEAST_ROOM)
    rows = {3: arch.q_size + 2 * arch.kv_size, 1: 2 * arch.hidden_size}
    rows[2] = 2 * arch.intermediate_size
    return sum(-(-rank * modules // 32) * 32 * count for modules, count in rows.items())


def _block_activations(arch: ArchConfig, rank: int) -> int:
    """Numbers a block keeps for the backward pass, per token."""
    width = 2 * (arch.hidden_size + arch.q_size + arch.kv_size) + 2 * arch.intermediate_size
    return width + 7 * rank + (arch.q_size + 2 * arch.kv_size if arch.qk_norm else 0)


def _activation_bytes(
    arch: ArchConfig, rank: int, num_tokens: int, *, size: int, kernels: bool
) -> int:
    """Of a forward and backward pass: what is kept, within bounds, and what is at hand."""
    block = _block_activations(arch, rank) * num_tokens * size
    inputs = arch.num_layers * arch.hidden_size * num_tokens * size
    kept = inputs + max(block, min(arch.num_layers * block, _ACTIVATION_BYTES - inputs))
    scores = 0  # compiled kernels keep none
    if not kernels:
        group = arch.num_heads // arch.num_kv_heads
        scores = 3 * arch.num_kv_heads * group * min(_BLOCK_TOKENS, num_tokens) * num_tokens * size
    at_hand = 6 * arch.intermediate_size * num_tokens * size
    return kept + scores + at_hand + _HEAD_BUFFERS


def _longest(limit: int, activations: Callable[[int], int], room: int | None) -> int:
    """Longest sequence up to `limit` whose activations fit, to 64 tokens."""
    if room is None or activations(limit) <= room:
        return limit
    low, high = 0, limit // 64
    while low < high:
        middle = (low + high + 1) // 2
        if activations(64 * middle) <= room:
            low = middle
        else:
            high = middle - 1
    return 64 * low


def _speeds(
    arch: ArchConfig, blocks: int, adapter: int, formats: tuple[str, int], rates: MachineRates
) -> dict[str, float]:
    dtype, packed = formats
    head = arch.vocab_size * arch.hidden_size
    train_flops = rates.flops * (_BFLOAT16_GAIN if dtype == "bfloat16" else 1)
    # Forward and backward to activations; LoRA's own gradients; the head back for 2 of 3 tokens.
    per_token = 4 * blocks + 6 * adapter + 2 * head * (1 + 2 / 3)
    read = (blocks + head) * packed + adapter * 4
    products = 2 * (blocks + head + adapter)

    def decode(batch: int) -> float:
        reading = read / (rates.bandwidth * _BANDWIDTH_SHARE)
        computing = batch * products / (rates.flops * _DECODE_SHARE)
        return batch / (reading + computing)

    return {
        "training (forward, backward, step)": _TRAIN_SHARE * train_flops / per_token,
        "sampling, 1 sequence": decode(1),
        "sampling, 8 at once": decode(8),
        "sampling, 32 at once": decode(32),
    }


def measure_rates() -> MachineRates:
    """Measure the machine in about half a second, with numpy."""
    import numpy as np

    left, right = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    product = np.empty((1024, 1024), np.float32)
    flops = 2 * 1024**3 / _best_seconds(lambda: np.matmul(left, right, out=product))
    block = np.ones(24 * 2**20, np.float32)  # 96 MiB: more than caches hold
    return MachineRates(flops, block.nbytes / _best_seconds(lambda: float(block.sum())))


def _best_seconds(work: Callable[[], object]) -> float:
    """Of some repetitions within a quarter of a second; other programs only ever slow one down."""
    seconds, started = [], time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def describe_plan(plan: ModelPlan) -> str:
    """The plan as the text that `serve --plan` prints."""
    arch = plan.arch
    lines = [
        f"plan for {plan.model}, nothing is loaded",
        f"  model     {arch.model_type}, {plan.num_parameters / 1e6:,.1f} million parameters, "
        f"{arch.num_layers} blocks, vocabulary {arch.vocab_size:,}",
        f"  adapter   rank {plan.rank} on attention and MLP: "
        f"{plan.adapter_parameters / 1e6:.1f} million parameters",
        f"  dtype     {plan.dtype}: {plan.dtype_reason}",
        f"  machine   {platform.machine()}, {_gib(plan.free_bytes)} of memory free",
        "  memory",
        *(f"    {_gib(size):>10}  {part}" for part, size in plan.memory.items()),
        f"    {_gib(plan.bytes_per_run):>10}  each training run",
        f"    {_gib(plan.bytes_per_sampler):>10}  each sampler with an adapter",
        f"    {plan.bytes_per_cached_token / 2**10:>6.0f} KiB  each token of a sampled sequence",
        f"    {_gib(plan.total_bytes):>10}  together, with one run and one sampler"
        + ("" if plan.fits else ": MORE THAN IS FREE"),
        f"  longest sequence (the model's own limit is {arch.max_positions:,} tokens)",
        f"    {plan.max_train_tokens:>10,}  tokens in training",
        f"    {plan.max_sample_tokens:>10,}  tokens in sampling, prompt and completion",
        "  expected tokens per second (from a short measurement of this machine)",
        *(f"    {rate:>10.1f}  {work}" for work, rate in plan.speeds.items()),
    ]
    if not plan.fits:
        lines.append("  It does not fit: choose a smaller model, or free memory.")
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"
