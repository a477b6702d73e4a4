"""The instruction sets that the kernels can be compiled for, and the choice among them. No torch.

Each is a set of compiler flags; the C sources choose their vectors by what the compiler then
defines (`vectors.h`). The best one that the processor has is used. `TINKER_COOKBOOK_ISA` names a
lower one, to compare them or to work around a faulty machine.

Products of bfloat16 pairs give the same bits in all of them. AMX sums in another order and is not
used: it would be one more entry here and one more `add_pair` in `pairs.h`.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["InstructionSet", "available_sets", "choose_set"]

_VARIABLE = "TINKER_COOKBOOK_ISA"


@dataclass(frozen=True)
class InstructionSet:
    """One way to compile the kernels."""

    name: str
    needs: frozenset[str]
    """Features of the processor, as /proc/cpuinfo names them."""
    flags: tuple[str, ...]
    """Compiler flags that allow these instructions and no later ones."""


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_NEEDS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
_X86 = (
    InstructionSet("generic", frozenset(), ("-DGENERIC",)),
    InstructionSet("avx2", frozenset({"avx2", "fma"}), _AVX2),
    InstructionSet("avx512", _AVX512_NEEDS, _AVX512),
    InstructionSet("avx512_bf16", _AVX512_NEEDS | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
)
_ARM = (
    InstructionSet("generic", frozenset(), ("-DGENERIC",)),
    InstructionSet("neon", frozenset({"asimd"}), ()),
    InstructionSet("neon_bf16", frozenset({"asimd", "bf16"}), ("-march=armv8.2-a+bf16",)),
)
_OTHER = (InstructionSet("generic", frozenset(), ("-DGENERIC",)),)
_SETS = {"x86_64": _X86, "aarch64": _ARM}
_ALL_NAMES = tuple(dict.fromkeys(entry.name for sets in _SETS.values() for entry in sets))


def available_sets() -> tuple[InstructionSet, ...]:
    """Return the sets that this processor has, the lowest first."""
    features = _processor_features()
    return tuple(
        entry for entry in _SETS.get(platform.machine(), _OTHER) if entry.needs <= features
    )


def choose_set() -> tuple[InstructionSet, bool]:
    """Return the set to compile for, and whether `TINKER_COOKBOOK_ISA` asked for it.

    Raises:
        ConfigurationError: if the variable names an unknown set, or one that the processor lacks.
    """
    available = available_sets()
    name = os.environ.get(_VARIABLE) or None
    if name is None:
        return available[-1], False
    names = ", ".join(entry.name for entry in available)
    if name not in _ALL_NAMES:
        raise ConfigurationError(f"{_VARIABLE}={name!r} is unknown; this processor has: {names}")
    for entry in available:
        if entry.name == name:
            return entry, True
    raise ConfigurationError(
        f"{_VARIABLE}={name!r} needs instructions that this processor lacks; it has: {names}"
    )


@lru_cache(maxsize=1)
def _processor_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
