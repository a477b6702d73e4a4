"""Compile the C kernels once per machine and load them.

The library is kept like bytecode, in `__pycache__` next to its source, or in the cookbook's home if
that folder is not writable. Its name is made from the source, the compiler, the CPU and the
instruction set (`instructions`). Without a compiler, on other systems than Linux, or with
`TINKER_COOKBOOK_NATIVE=0`, no library exists and everything runs on torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tinker_cookbook.local.engine.native.instructions import (
    InstructionSet,
    available_sets,
    choose_set,
)
from tinker_cookbook.model_files import cookbook_home

__all__ = [
    "describe_missing_compiler",
    "find_compiler",
    "load_kernels",
    "load_kernels_for",
    "start_build",
]

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = (
    "adam.c",
    "compact.c",
    "decode_kernels.c",
    "pair_attention.c",
    "pair_attention_backward.c",
    "pair_decode.c",
    "pair_gradients.c",
    "pair_products.c",
    "products.c",
    "softmax.c",
    "train_attention.c",
    "train_kernels.c",
)
_HEADERS = (
    "block_tiles.h",
    "blocks.h",
    "compact.h",
    "decode_attention.h",
    "expanding_tiles.h",
    "float_strips.h",
    "later.h",
    "pair_strips.h",
    "pairs.h",
    "quantised.h",
    "rows.h",
    "team.h",
    "tiles.h",
    "train_attention.h",
    "vectors.h",
)
_COMPILE_FLAGS = (
    "-O3",
    "-fno-unswitch-loops",  # compiles in a fifth of the time, with the same speed
    "-fno-tree-vectorize",  # vectors and fused products are explicit, so that sums never vary
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",  # the same memory holds numbers, and pairs of them as words
    "-fopenmp",
)
_COMPILE_SECONDS = 600

_lock = threading.Lock()
_build: Future[Path | None] | None = None


def start_build() -> Future[Path | None]:
    """Begin to compile in the background on the first call; the result is the library's path.

    Raises:
        ConfigurationError: if `TINKER_COOKBOOK_ISA` cannot be used.
    """
    global _build
    with _lock:
        if _build is None:
            flags = _wanted_flags()
            _build = Future()
            thread = threading.Thread(
                target=_run_build, args=(_build, flags), name="kernel-build", daemon=True
            )
            thread.start()
        return _build


def _wanted_flags() -> list[tuple[str, ...]]:
    """Return the compiler flags to try in turn: compilers before GCC 11 do not know AMX."""
    chosen, is_forced = choose_set()
    if is_forced:
        return [chosen.flags]
    flags = [entry.whole_processor_flags for entry in reversed(available_sets())]
    return list(dict.fromkeys(flags))


def load_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, waiting for the compiler if it still runs; None: use torch."""
    return _load(start_build().result())


def load_kernels_for(
    instructions: InstructionSet, sources: tuple[str, ...] = _SOURCES
) -> ctypes.CDLL | None:
    """Return the kernels for one instruction set, for comparisons; None without a compiler.

    Args:
        sources: the C files that are needed.
    """
    result: Future[Path | None] = Future()
    _run_build(result, [instructions.flags], sources)
    return _load(result.result())


def _load(path: Path | None) -> ctypes.CDLL | None:
    if path is None:
        return None
    try:
        _load_openmp()
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("the compiled kernels cannot be loaded (%s); torch is used instead", error)
        return None


def _run_build(
    result: Future[Path | None],
    wanted: list[tuple[str, ...]],
    sources: tuple[str, ...] = _SOURCES,
) -> None:
    """Compile with the first of the wanted flags that the compiler takes."""
    for position, flags in enumerate(wanted, start=1):
        try:
            result.set_result(_build_library((*_COMPILE_FLAGS, *flags), sources))
            return
        except (OSError, subprocess.SubprocessError) as error:
            instead = "torch is used instead" if position == len(wanted) else "trying without AMX"
            logger.warning("the kernels cannot be compiled (%s); %s", error, instead)
    result.set_result(None)


def _build_library(flags: tuple[str, ...], sources: tuple[str, ...]) -> Path | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    name = f"kernels-{_fingerprint(compiler, (*flags, *sources))}.so"
    nearby, home = _FOLDER / "__pycache__", cookbook_home() / "kernels"
    for folder in (nearby, home):
        if (folder / name).exists():
            return folder / name
    folder = nearby if os.access(_FOLDER, os.W_OK) else home
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with _alone(folder):
        if not target.exists():
            _compile((compiler, *flags), sources, target)
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process compiles: several that start together need the same library."""
    import fcntl

    with (folder / "building.lock").open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(command: tuple[str, ...], sources: tuple[str, ...], target: Path) -> None:
    """Compile the sources in parallel, and put the library in its place when it is complete."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as scratch:
        library = Path(scratch, "kernels.so")
        compiled = [str(Path(scratch, source).with_suffix(".o")) for source in sources]
        commands = [
            (*command, "-fPIC", "-c", "-o", result, str(_FOLDER / source))
            for source, result in zip(sources, compiled, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda words: _call(*words), commands))
        # Linked without OpenMP: the symbols come from the runtime that torch has loaded, so that
        # both share one set of threads.
        _call(command[0], "-shared", "-o", str(library), *compiled, "-lm")
        os.replace(library, target)


def find_compiler() -> str | None:
    """Return the compiler for the kernels; None if kernels are not used here."""
    if os.environ.get("TINKER_COOKBOOK_NATIVE", "1") == "0":
        return None
    if sys.platform != "linux" or sys.byteorder != "little":
        return None
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def describe_missing_compiler() -> str | None:
    """Return one line on the cost of a missing compiler; None if none is missing or wanted."""
    unwanted = os.environ.get("TINKER_COOKBOOK_NATIVE", "1") == "0" or sys.platform != "linux"
    if unwanted or find_compiler() is not None:
        return None
    return (
        "no C compiler (cc or gcc) is found: torch replaces the compiled kernels, sampling takes "
        "about twice as long, and training takes longer too; install gcc and start again"
    )


def _call(*command: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_COMPILE_SECONDS,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise OSError(f"{command[0]} failed: {reason}")


def _fingerprint(compiler: str, words: tuple[str, ...]) -> str:
    parts = [(_FOLDER / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    parts += [" ".join(words).encode(), compiler.encode()]
    parts.append(str(os.stat(compiler).st_mtime_ns).encode())
    parts.append(platform.machine().encode())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features")
    parts.extend(line.encode() for line in lines[:64] if line.startswith(wanted))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _load_openmp() -> None:
    """Make the symbols of the OpenMP runtime visible, preferring the one that torch brings."""
    import torch

    folder = Path(torch.__file__).parent
    own = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    name = str(own[0]) if own else "libgomp.so.1"
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
