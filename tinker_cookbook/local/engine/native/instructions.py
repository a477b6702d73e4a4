"""The instruction sets that the kernels can be compiled for, and the choice among them. No torch.

Each is a set of compiler flags; the C sources choose their vectors by what the compiler then
defines (`vectors.h`). The best one that the processor has is used. `TINKER_COOKBOOK_ISA` names a
lower one, to compare them or to work around a faulty machine.

Products of bfloat16 pairs give the same bits in all of them but those with AMX, whose instructions
sum in another order (`blocks.h`). For each of both orders there is a twin in generic C, with which
tests compare the others.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["InstructionSet", "available_sets", "choose_set", "compared_sets", "twin_of"]

_VARIABLE = "TINKER_COOKBOOK_ISA"


@dataclass(frozen=True)
class InstructionSet:
    """One way to compile the kernels."""

    name: str
    needs: frozenset[str]
    """Features of the processor, as /proc/cpuinfo names them."""
    flags: tuple[str, ...]
    """Compiler flags that allow these instructions and no later ones."""

    @property
    def sums_blocks(self) -> bool:
        """Whether products of pairs are summed in AMX's order."""
        return _BLOCKS in self.flags

    @property
    def whole_processor_flags(self) -> tuple[str, ...]:
        """Compiler flags for a processor whose best set this is.

        They also allow small extensions that no set names.
        """
        return ("-march=native", *(_AMX if self.name == "amx" else ()))


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_AVX512_NEEDS = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
_BF16 = (*_AVX512, "-mavx512bf16")
_BF16_NEEDS = _AVX512_NEEDS | {"avx512_bf16"}
_BLOCKS = "-DBLOCKS"
_AMX = ("-mamx-tile", "-mamx-bf16", _BLOCKS)
_AMX_NEEDS = _BF16_NEEDS | {"amx_tile", "amx_bf16"}
_GENERIC = InstructionSet("generic", frozenset(), ("-DGENERIC",))
_GENERIC_BLOCKS = InstructionSet("generic_blocks", frozenset(), ("-DGENERIC", _BLOCKS))
_X86 = (
    _GENERIC,
    InstructionSet("avx2", frozenset({"avx2", "fma"}), _AVX2),
    InstructionSet("avx512", _AVX512_NEEDS, _AVX512),
    InstructionSet("avx512_bf16", _BF16_NEEDS, _BF16),
    InstructionSet("amx", _AMX_NEEDS, (*_BF16, *_AMX)),
)
_ARM = (
    _GENERIC,
    InstructionSet("neon", frozenset({"asimd"}), ()),
    InstructionSet("neon_bf16", frozenset({"asimd", "bf16"}), ("-march=armv8.2-a+bf16",)),
)
_OTHER = (_GENERIC,)
_SETS = {"x86_64": _X86, "aarch64": _ARM}
_SLOW = (
    _GENERIC_BLOCKS,
    InstructionSet("avx512_blocks", _AVX512_NEEDS, (*_AVX512, _BLOCKS)),
)
"""Sets that compute AMX's sums without AMX. They are slower than the processor's other sets, so
they are used only on request."""
_ALL_NAMES = tuple(dict.fromkeys(entry.name for sets in (*_SETS.values(), _SLOW) for entry in sets))


def available_sets() -> tuple[InstructionSet, ...]:
    """Return the sets that this processor has, the lowest first."""
    return _usable(_SETS.get(platform.machine(), _OTHER))


def compared_sets() -> tuple[InstructionSet, ...]:
    """Return the sets that this processor has, and those that compute AMX's sums without AMX."""
    return (*available_sets(), *_usable(_SLOW))


def twin_of(entry: InstructionSet) -> InstructionSet:
    """Return the set in generic C whose products of pairs have the same bits."""
    return _GENERIC_BLOCKS if entry.sums_blocks else _GENERIC


def choose_set() -> tuple[InstructionSet, bool]:
    """Return the set to compile for, and whether `TINKER_COOKBOOK_ISA` asked for it.

    Raises:
        ConfigurationError: if the variable names an unknown set, or one that the processor lacks.
    """
    name = os.environ.get(_VARIABLE) or None
    if name is None:
        return available_sets()[-1], False
    available = compared_sets()
    names = ", ".join(entry.name for entry in available)
    if name not in _ALL_NAMES:
        raise ConfigurationError(f"{_VARIABLE}={name!r} is unknown; this processor has: {names}")
    for entry in available:
        if entry.name == name:
            return entry, True
    raise ConfigurationError(
        f"{_VARIABLE}={name!r} needs instructions that this processor lacks; it has: {names}"
    )


def _usable(entries: tuple[InstructionSet, ...]) -> tuple[InstructionSet, ...]:
    features = _processor_features()
    return tuple(
        entry
        for entry in entries
        if entry.needs <= features and (entry.name != "amx" or _may_use_tiles())
    )


@lru_cache(maxsize=1)
def _may_use_tiles() -> bool:
    """Ask Linux to let this process use AMX's tile registers; return whether it does.

    They are large, so the kernel saves them only for processes that ask ("Using XSTATE features in
    user space applications", Linux kernel documentation). Threads that start later inherit it.
    """
    arch_prctl, request, tile_data = 158, 0x1023, 18
    try:
        return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0
    except (OSError, AttributeError):
        return False


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
