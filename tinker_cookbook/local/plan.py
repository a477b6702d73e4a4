"""What a model will take and give on this machine, from its config.json, before it is loaded.

Sizes are the engine's own (`plan_shapes`). Speeds are this machine's measured matrix-product and
memory rates times the share of them that the engine reaches; the shares were measured with the
default model and a 0.6B one (docs/performance.md). Models that run through transformers have none.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.engine.model.architecture import dtype_from_environment, read_config_json
from tinker_cookbook.local.engine.native.build import find_compiler
from tinker_cookbook.local.engine.types import LoraSpec
from tinker_cookbook.local.plan_shapes import ModelShape, read_shape

__all__ = ["MachineRates", "ModelPlan", "build_plan", "describe_plan", "measure_rates"]

GIB = 2**30
_SPARE_BYTES = GIB // 2
"""Python, torch and what allocators hold back."""
_MAX_CACHE_BYTES = 4 * GIB
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
    shape: ModelShape
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
    def num_parameters(self) -> int:
        return self.shape.num_parameters

    @property
    def adapter_parameters(self) -> int:
        return self.shape.adapter_parameters

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
    train_unembed: bool = True,
    dtype: str | None = None,
    free_bytes: int | None = None,
    rates: MachineRates | None = None,
) -> ModelPlan:
    """Plan a model from `folder`/config.json; weights need not be there.

    Args:
        rank: LoRA rank of the runs, on attention and MLP.
        train_unembed: whether they train the output embedding too, as the service does if a client
            says nothing.
        dtype: `float32` or `bfloat16`; None is what the environment asks for, or else what the
            engine would choose on a CPU.
        free_bytes: memory that may be taken; None asks the system.
        rates: of the machine; None measures them, in half a second.

    Raises:
        WeightsError: in one line, if the engine could not run the model.
    """
    from tinker_cookbook.local.engine.model.base_model import PACK_TOKENS_CPU

    shape = read_shape(folder, LoraSpec(rank=rank, train_unembed=train_unembed))
    chosen, reason = _choose_dtype(dtype or dtype_from_environment())
    size = 2 if chosen == "bfloat16" else 4
    free = available_bytes() if free_bytes is None else free_bytes
    stored = str(_stored_dtype(folder))
    packed = 2 if "bfloat16" in (stored, chosen) else 4
    compiled = shape.arch is not None and find_compiler() is not None
    adapter = shape.adapter_parameters
    per_token = shape.cached_numbers * (4 if compiled else size)

    def activations(num_tokens: int) -> int:
        return shape.pass_bytes(num_tokens, size)

    memory = {
        **_weight_bytes(shape, size, packed, compiled=compiled),
        "gradient, shared by the runs": adapter * 4,
        "activations of a pack": activations(PACK_TOKENS_CPU),
        "python and torch": _SPARE_BYTES,
    }
    run, sampler = adapter * 12, adapter * 8
    left = None if free is None else free - sum(memory.values()) - run - sampler
    cache = _MAX_CACHE_BYTES if left is None else max(0, min(left // 4, _MAX_CACHE_BYTES))
    room = None if left is None else left - cache + memory["activations of a pack"]
    rates = rates or measure_rates()
    return ModelPlan(
        model=model,
        shape=shape,
        rank=rank,
        dtype=chosen,
        dtype_reason=reason,
        free_bytes=free,
        memory=memory,
        bytes_per_run=run,
        bytes_per_sampler=sampler,
        bytes_per_cached_token=per_token,
        max_train_tokens=_longest(shape.max_positions, activations, room),
        max_sample_tokens=min(shape.max_positions, cache // per_token),
        speeds=_speeds(shape, (chosen, packed if compiled else size), rates),
    )


def _stored_dtype(folder: Path) -> object:
    config = read_config_json(folder)
    return config.get("dtype", config.get("torch_dtype"))


def _weight_bytes(shape: ModelShape, size: int, packed: int, *, compiled: bool) -> dict[str, int]:
    """The weights as they are held: in numbers of `size` bytes, for the kernels of `packed`."""
    if compiled and size == 4:
        return {"weights, packed for training and sampling": shape.num_parameters * packed}
    weights = {"weights": (shape.num_parameters + shape.spare_parameters) * size}
    if compiled:
        copied = shape.block_parameters + shape.embedding
        weights["packed copy for sampling"] = copied * packed
    return weights


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


def _speeds(shape: ModelShape, formats: tuple[str, int], rates: MachineRates) -> dict[str, float]:
    if shape.arch is None:
        return {}
    dtype, packed = formats
    blocks, head, adapter = shape.block_parameters, shape.embedding, shape.adapter_parameters
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


_PARTS = {"attn": "attention", "mlp": "MLP", "unembed": "output embedding"}


def describe_plan(plan: ModelPlan) -> str:
    """The plan as the text that `serve --plan` prints."""
    shape = plan.shape
    parts = ", ".join(f"{_PARTS[part]}" for part in shape.adapter_parts)
    through = "" if shape.arch is not None else ", runs through transformers (slower)"
    lines = [
        f"plan for {plan.model}, nothing is loaded",
        f"  model     {shape.model_type}{through}, {plan.num_parameters / 1e6:,.1f} million "
        f"parameters, {shape.num_layers} blocks, vocabulary {shape.vocab_size:,}",
        f"  adapter   rank {plan.rank} on {parts}: "
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
        f"  longest sequence (the model's own limit is {shape.max_positions:,} tokens)",
        f"    {plan.max_train_tokens:>10,}  tokens in training",
        f"    {plan.max_sample_tokens:>10,}  tokens in sampling, prompt and completion",
    ]
    if plan.speeds:
        lines.append("  expected tokens per second (from a short measurement of this machine)")
        lines += [f"    {rate:>10.1f}  {work}" for work, rate in plan.speeds.items()]
    if not plan.fits:
        lines.append("  It does not fit: choose a smaller model, or free memory.")
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"
