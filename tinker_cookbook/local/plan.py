"""Memory, context lengths and speeds of a model on this machine, from its config.json alone.

Sizes come from the engine's own functions (`plan_shapes`, `engine.budget`). Speeds are this
machine's measured matrix-product and memory rates, times the share of them that the engine reaches.
The shares were measured with the default model and a 0.6B model (docs/performance.md). Models that
run through transformers have no speeds.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.local.engine.budget import (
    RECENT_SAMPLERS_PER_RUN,
    SMALLEST_ROW,
    cache_budget,
    has_short_moments,
    run_bytes,
    sampler_bytes,
)
from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.engine.model.number_formats import (
    FULL,
    base_format_from_environment,
    dtype_from_environment,
)
from tinker_cookbook.local.engine.native.build import find_compiler
from tinker_cookbook.local.engine.types import LoraSpec

if TYPE_CHECKING:
    from tinker_cookbook.local.plan_shapes import ModelSizes

__all__ = [
    "MachineRates",
    "ModelPlan",
    "StepWork",
    "build_plan",
    "describe_plan",
    "measure_rates",
]

GIB = 2**30
_SPARE_BYTES = GIB // 2
"""Memory of Python and torch, and what their allocators hold back."""
_TRAIN_SHARE = 0.7
_DECODE_SHARE = 0.75
_BANDWIDTH_SHARE = 0.8
_BFLOAT16_GAIN = 2.2
"""Speed of bfloat16 products relative to float32 products, where the processor has them."""


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of the processor, per second."""

    flops: float
    """Floating-point operations of float32 matrix products."""
    bandwidth: float
    """Bytes read from memory."""


@dataclass(frozen=True)
class StepWork:
    """What a step of a train loop computes together, where it is known."""

    trained_tokens: int | None = None
    """Tokens that are trained together; None: as many as the engine computes at once."""
    sequences: int = 0
    """Sequences that are sampled for a step."""
    held_out_sequences: int = 0
    """Sequences that are sampled for an evaluation."""
    reply_tokens: int = 0
    """Maximum tokens that are sampled for a sequence."""
    overlaps: bool = False
    """Whether the loop samples while it trains; otherwise the two use the same memory in turns."""

    def pack_tokens(self, most: int) -> int:
        """Return the tokens of a pack; a step of more than `most` tokens has packs of one size."""
        if self.trained_tokens is None:
            return most
        return self.trained_tokens // -(-self.trained_tokens // most)

    def running_tokens(self) -> int:
        """Return the tokens of the KV cache's rows, of which each running sequence has one."""
        return self._row * max(self.sequences, self.held_out_sequences)

    def stored_tokens(self) -> int:
        """Return the tokens that are stored for prompts that begin alike.

        They are those of the newest samplers and of the last evaluation.
        """
        stored = RECENT_SAMPLERS_PER_RUN * self.sequences + self.held_out_sequences
        return self._row * stored // 2

    @property
    def _row(self) -> int:
        """Tokens of a row, if prompts are about as long as replies."""
        return max(SMALLEST_ROW, 1 << (2 * self.reply_tokens - 1).bit_length())


@dataclass(frozen=True)
class ModelPlan:
    """What a model needs and does on this machine; sizes in bytes, speeds in tokens per second."""

    model: str
    sizes: ModelSizes
    rank: int
    dtype: str
    dtype_reason: str
    base_format: str
    """`full`, `int8` or `int4`."""
    free_bytes: int | None
    """None: unknown."""
    memory: dict[str, int]
    """Description of a part -> its memory, in the order in which the parts are allocated."""
    bytes_per_run: int
    bytes_per_sampler: int
    max_train_tokens: int
    """Longest sequence that can be trained in the free memory; 0 if none can."""
    max_sample_tokens: int
    """Longest sequence (prompt and completion) that fits into the KV cache."""
    speeds: dict[str, float]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model."""
        return self.sizes.num_parameters

    @property
    def adapter_parameters(self) -> int:
        """Number of parameters of one adapter."""
        return self.sizes.adapter_parameters

    @property
    def bytes_per_cached_token(self) -> int:
        """Memory of one token in the KV cache."""
        return self.sizes.bytes_per_cached_token

    @property
    def total_bytes(self) -> int:
        """Memory for one run and one sampler."""
        return sum(self.memory.values()) + self.bytes_per_run + self.bytes_per_sampler

    @property
    def fits(self) -> bool:
        """Whether one run and one sampler fit into the free memory."""
        return self.free_bytes is None or self.total_bytes <= self.free_bytes


def build_plan(
    model: str,
    folder: Path,
    *,
    rank: int = 32,
    train_unembed: bool = True,
    dtype: str | None = None,
    base_format: str | None = None,
    free_bytes: int | None = None,
    rates: MachineRates | None = None,
    step: StepWork = StepWork(),
) -> ModelPlan:
    """Plan a model from `folder`/config.json; the weights are not needed.

    Args:
        rank: LoRA rank of the runs, on attention and MLP.
        train_unembed: whether the runs also train the output embedding, which is the service's
            default.
        dtype: `float32` or `bfloat16`; None takes the environment's setting, or what the engine
            would choose on a CPU.
        base_format: `full`, `int8` or `int4`; None takes the environment's setting, or `full`.
        free_bytes: memory that may be used; None asks the system.
        rates: rates of the machine; None measures them, which takes half a second.
        step: the work of a step. A loop that samples keeps the adapters of the newest samplers.

    Raises:
        WeightsError: in one line, if the engine cannot run the model.
    """
    import torch

    from tinker_cookbook.local.engine.model.base_model import PACK_TOKENS_CPU, check_base_format
    from tinker_cookbook.local.plan_shapes import read_sizes

    chosen, reason = _choose_dtype(dtype or dtype_from_environment())
    spec = LoraSpec(rank=rank, train_unembed=train_unembed)
    compiled = find_compiler() is not None
    stored = base_format or base_format_from_environment() or FULL
    check_base_format(folder, stored)
    sizes = read_sizes(folder, spec, getattr(torch, chosen), compiled=compiled, base_format=stored)
    free = available_bytes() if free_bytes is None else free_bytes
    run, run_in_backward = (
        run_bytes(
            sizes.adapter_bytes,
            short_moments=has_short_moments(chosen),
            with_gradient=with_gradient,
        )
        for with_gradient in (False, True)
    )
    memory = {
        **sizes.weights,
        "gradient, shared by the runs": run_in_backward - run,
        "activations of a pack": sizes.pass_bytes(step.pack_tokens(PACK_TOKENS_CPU)),
        "python and torch": _SPARE_BYTES,
    }
    sampler = sampler_bytes(sizes.adapter_bytes)
    if step.sequences:
        running = step.running_tokens() * sizes.bytes_per_cached_token
        if not step.overlaps:
            running = max(0, running - memory["activations of a pack"])
        cached = running + step.stored_tokens() * sizes.bytes_per_cached_token
        memory["keys and values of sampled sequences"] = min(cached, cache_budget(free))
        memory["samplers of earlier steps"] = (RECENT_SAMPLERS_PER_RUN - 1) * sampler
    # The engine sets the cache's limit once the weights are loaded, before runs and samplers exist.
    loaded = sum(sizes.weights.values()) + _SPARE_BYTES
    cache = cache_budget(None if free is None else free - loaded)
    others = run + sampler + memory["gradient, shared by the runs"] + cache
    room = None if free is None else free - loaded - others
    return ModelPlan(
        model=model,
        sizes=sizes,
        rank=rank,
        dtype=chosen,
        dtype_reason=reason,
        base_format=stored,
        free_bytes=free,
        memory=memory,
        bytes_per_run=run,
        bytes_per_sampler=sampler,
        max_train_tokens=_longest(sizes.max_positions, sizes.pass_bytes, room),
        max_sample_tokens=min(sizes.max_positions, cache // sizes.bytes_per_cached_token),
        speeds=_speeds(sizes, chosen, rates or measure_rates()),
    )


def _choose_dtype(wanted: str | None) -> tuple[str, str]:
    """Return the number format and the reason for it."""
    if wanted is not None:
        return wanted, "as asked for"
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        flags = set()
    found = sorted({"avx512_bf16", "amx_bf16"} & flags)
    if found:
        return "bfloat16", f"the processor multiplies it fast ({found[0]})"
    return "float32", "the processor does not multiply bfloat16 faster (avx512_bf16, amx_bf16)"


def _longest(limit: int, activations: Callable[[int], int], room: int | None) -> int:
    """Return the longest sequence up to `limit` whose activations fit, in steps of 64 tokens."""
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


def _speeds(sizes: ModelSizes, dtype: str, rates: MachineRates) -> dict[str, float]:
    if sizes.native is None:
        return {}
    native, adapter = sizes.native, sizes.adapter_parameters
    blocks, head = native.block_parameters, native.head_parameters
    train_flops = rates.flops * (_BFLOAT16_GAIN if dtype == "bfloat16" else 1)
    # Forward and backward to activations; LoRA's own gradients; the head's backward pass for 2 of
    # 3 tokens.
    per_token = 4 * blocks + 6 * adapter + 2 * head * (1 + 2 / 3)
    read = native.read_bytes + sizes.adapter_bytes
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
    """Measure the machine with numpy, in about half a second."""
    import numpy as np

    left, right = np.ones((1024, 1024), np.float32), np.ones((1024, 1024), np.float32)
    product = np.empty((1024, 1024), np.float32)
    flops = 2 * 1024**3 / _best_seconds(lambda: np.matmul(left, right, out=product))
    block = np.ones(24 * 2**20, np.float32)  # 96 MiB: more than caches hold
    return MachineRates(flops, block.nbytes / _best_seconds(lambda: float(block.sum())))


def _best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of several repetitions within a quarter of a second.

    The shortest is the most exact, as other programs can only slow a repetition down.
    """
    seconds, started = [], time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() - started < 0.25:
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return min(seconds)


_PARTS = {"attn": "attention", "mlp": "MLP", "unembed": "output embedding"}


def describe_plan(plan: ModelPlan) -> str:
    """Return the plan as the text that `serve --plan` prints."""
    sizes = plan.sizes
    parts = ", ".join(f"{_PARTS[part]}" for part in sizes.adapter_parts)
    through = "" if sizes.native is not None else ", runs through transformers (slower)"
    lines = [
        f"plan for {plan.model}, nothing is loaded",
        f"  model     {sizes.model_type}{through}, {plan.num_parameters / 1e6:,.1f} million "
        f"parameters, {sizes.num_layers} blocks, vocabulary {sizes.vocab_size:,}",
        f"  adapter   rank {plan.rank} on {parts}: "
        f"{plan.adapter_parameters / 1e6:.1f} million parameters",
        f"  dtype     {plan.dtype}: {plan.dtype_reason}",
        *_base_lines(plan),
        f"  machine   {platform.machine()}, {_gib(plan.free_bytes)} of memory free",
        "  memory",
        *(f"    {_gib(size):>10}  {part}" for part, size in plan.memory.items()),
        f"    {_gib(plan.bytes_per_run):>10}  each training run",
        f"    {_gib(plan.bytes_per_sampler):>10}  each sampler with an adapter",
        f"    {plan.bytes_per_cached_token / 2**10:>6.0f} KiB  each token of a sampled sequence",
        f"    {_gib(plan.total_bytes):>10}  together, with one run and one sampler"
        + ("" if plan.fits else ": MORE THAN IS FREE"),
        f"  longest sequence (the model's own limit is {sizes.max_positions:,} tokens)",
        f"    {plan.max_train_tokens:>10,}  tokens in training",
        f"    {plan.max_sample_tokens:>10,}  tokens in sampling, prompt and completion",
    ]
    if plan.speeds:
        lines.append("  expected tokens per second (from a short measurement of this machine)")
        lines += [f"    {rate:>10.1f}  {work}" for work, rate in plan.speeds.items()]
    if not plan.fits:
        lines.append(f"  It does not fit: {_advice(plan)}.")
    return "\n".join(lines)


def _base_lines(plan: ModelPlan) -> list[str]:
    if plan.base_format == FULL:
        return []
    return [f"  base      {plan.base_format}: the output embedding is in int8"]


def _advice(plan: ModelPlan) -> str:
    """Return what to do about a model that does not fit."""
    smaller = {FULL: "use --base-format int8 or int4, ", "int8": "use --base-format int4, "}
    first = smaller.get(plan.base_format, "") if plan.sizes.native is not None else ""
    return f"{first}choose a smaller model, or free memory"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"
