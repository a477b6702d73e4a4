"""The checks of `tinker-cookbook doctor`: what this machine has, and what a recipe would lack.

No check prints a key; only whether it is set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinker_cookbook import service
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.model_files import (
    DEFAULT_MODEL,
    cookbook_home,
    find_on_this_machine,
    hub_cache,
)
from tinker_cookbook.runs.directory import runs_path
from tinker_cookbook.service.choice import ServiceKind
from tinker_cookbook.service.connection import check_reachable
from tinker_cookbook.service.embedded import NEEDED_MODULES
from tinker_cookbook.utils.byte_sizes import format_bytes

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Check", "State", "check_machine", "check_self_test"]

State = Literal["ok", "note", "missing"]
"""`missing`: a recipe could not run. `note`: it runs, but slower or with less."""
PACKAGE = "tinker-cookbook"
PROCESSOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")
KEYS = ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "HF_TOKEN", "WANDB_API_KEY")
EXTRAS = ("local", "fast", "vision", "math", "search", "wandb")
LOW_DISK_BYTES = 2 * 2**30
LOW_MEMORY_BYTES = 2 * 2**30
SLOW_SELF_TEST_SECONDS = 60


@dataclass(frozen=True)
class Check:
    """What was found, and the command that fixes or improves it."""

    name: str
    state: State
    text: str
    fix: str | None = None


def check_machine() -> Iterator[Check]:
    """Yield all checks that take little time."""
    yield _python()
    yield from _packages()
    kind, chosen = _service()
    yield chosen
    yield from _local_service(is_needed=kind == "local")
    yield from _folders()
    yield _default_model()
    yield Check("keys", "ok", ", ".join(f"{name} {_is_set(name)}" for name in KEYS))


def check_self_test() -> Check:
    """Train a tiny model one step through a local service, and sample from it."""
    from tinker_cookbook.commands.parts.self_test import run_self_test

    found = run_self_test()
    if "problem" in found:
        return Check("self-test", "missing", f"{found['problem']}", "tinker-cookbook serve")
    before, after = found["losses"]  # type: ignore[misc]
    return Check(
        "self-test",
        "ok",
        f"a tiny model was trained and sampled in {found['seconds']:.1f} s "
        f"(loss {before:.1f} -> {after:.1f})",
    )


def _python() -> Check:
    text = (
        f"{platform.python_version()}, {sys.executable}, {platform.system()} {platform.machine()}"
    )
    return Check("python", "ok", text)


def _packages() -> Iterator[Check]:
    """Compare the installed packages with those that this package asks for."""
    try:
        version = importlib.metadata.version(PACKAGE)
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "packages", "note", "the package is not installed; its code is read from a folder"
        )
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check("packages", "missing", "packaging is not installed", f"pip install {PACKAGE}")
        return
    wanted = [Requirement(line) for line in lines]
    problems = [text for each in wanted if (text := _problem(each, ""))]
    fix = f"pip install --upgrade {PACKAGE}"
    if problems:
        yield Check("packages", "missing", "; ".join(problems), fix)
    else:
        sdk = importlib.metadata.version("tinker")
        yield Check("packages", "ok", f"{PACKAGE} {version}, tinker {sdk}")
    lacking = {e: [t for r in wanted if (t := _problem(r, e))] for e in EXTRAS}
    missing = [name for name, texts in lacking.items() if texts]
    present = ", ".join(name for name in EXTRAS if name not in missing) or "none"
    if missing:
        text = f"installed: {present}; not installed: {', '.join(missing)}"
        yield Check("extras", "note", text, f"pip install '{PACKAGE}[{','.join(missing)}]'")
    else:
        yield Check("extras", "ok", present)


def _problem(requirement: Requirement, extra: str) -> str | None:
    """Return what is wrong with a package that is needed, for an extra or always; None if fine."""
    marker = requirement.marker
    if marker is None and extra:
        return None
    if marker is not None and (not marker.evaluate({"extra": extra}) or marker.evaluate()):
        return None
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is installed; {requirement.specifier} is needed"


def _service() -> tuple[ServiceKind | None, Check]:
    """Tell which kind of service a recipe would use, and whether it answers."""
    from tinker_cookbook.commands.status import read_notes

    running = len(read_notes(cookbook_home() / "service"))
    others = f"; running services of `serve`: {running}" if running else ""
    try:
        choice = service.choose_service()
        where = choice.base_url or "local, started by each recipe"
        if choice.kind != "local":
            check_reachable(choice, service.find_api_key())
    except TinkerCookbookError as error:
        fix = "unset TINKER_BASE_URL TINKER_API_KEY"
        return None, Check("service", "missing", str(error), fix)
    return choice.kind, Check("service", "ok", f"{where} ({choice.reason}){others}")


def _local_service(*, is_needed: bool) -> Iterator[Check]:
    if not all(map(importlib.util.find_spec, NEEDED_MODULES)):
        state: State = "missing" if is_needed else "note"
        text = "the extra `local` is not installed, so no model can be trained on this machine"
        yield Check("torch", state, text, f"pip install '{PACKAGE}[local]'")
        return
    try:
        yield from _torch()
        yield _compiler()
        yield _memory()
    except (ImportError, OSError) as error:
        fix = f"pip install --force-reinstall '{PACKAGE}[local]'"
        yield Check("torch", "missing", f"torch cannot be used: {error}", fix)
    except ConfigurationError as error:
        yield Check("numbers", "missing", str(error), "unset TINKER_COOKBOOK_DTYPE")


def _torch() -> Iterator[Check]:
    from tinker_cookbook.local.engine.model.devices import choose_device, choose_dtype
    from tinker_cookbook.local.engine.model.number_formats import dtype_from_environment

    device = choose_device(None)
    yield Check(
        "torch", "ok", f"{importlib.metadata.version('torch')}, device {device}, {_threads()}"
    )
    flags = _processor_flags()
    found = [name for name in PROCESSOR_FEATURES if name in flags] or ["no known vector features"]
    yield Check("processor", "ok", f"{_processor_name()}: {', '.join(found)}")
    name = str(choose_dtype(None, device)).removeprefix("torch.")
    fast = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    if dtype_from_environment() is not None:
        reason = "TINKER_COOKBOOK_DTYPE is set"
    elif device.type != "cpu":
        reason = f"the fastest format of {device}"
    elif name == "bfloat16":
        reason = f"the processor multiplies it faster ({', '.join(fast)})"
    else:
        reason = "the processor does not multiply bfloat16 faster (avx512_bf16, amx_bf16)"
    yield Check("numbers", "ok", f"{name}: {reason}")


def _compiler() -> Check:
    from tinker_cookbook.local.engine.native.build import describe_missing_compiler, find_compiler

    problem = describe_missing_compiler()
    if problem is not None:
        return Check("compiler", "note", problem, "apt-get install gcc")
    path = find_compiler()
    return Check("compiler", "ok", path or "not used: TINKER_COOKBOOK_NATIVE=0, or not Linux")


def _memory() -> Check:
    from tinker_cookbook.local.engine.memory import available_bytes

    free = available_bytes()
    if free is None:
        return Check("memory", "ok", "free memory is not known")
    if free < LOW_MEMORY_BYTES:
        text = f"only {format_bytes(free)} is free; the default model needs about 2 GiB"
        return Check("memory", "note", text, "end other programs")
    return Check("memory", "ok", f"{format_bytes(free)} free")


def _folders() -> Iterator[Check]:
    """Check that runs and the state of the service can be written, and the room for them."""
    for name, folder in (("runs", Path(runs_path())), ("home", cookbook_home())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        variable = "TINKER_COOKBOOK_RUNS_DIR" if name == "runs" else "TINKER_COOKBOOK_HOME"
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            text = f"{folder} cannot be written"
            yield Check(name, "missing", text, f"export {variable}=FOLDER")
            continue
        free = shutil.disk_usage(existing).free
        is_low = free < LOW_DISK_BYTES
        text = f"{folder}, {format_bytes(free)} free"
        fix = "tinker-cookbook clean" if is_low else None
        yield Check(name, "note" if is_low else "ok", text, fix)
    caches = {"models": hub_cache(), "cookbook": cookbook_home()}
    sizes = [f"{name} {format_bytes(_count(path))} in {path}" for name, path in caches.items()]
    yield Check("caches", "ok", "; ".join(sizes))


def _default_model() -> Check:
    folder = find_on_this_machine(DEFAULT_MODEL)
    if folder is None:
        text = f"{DEFAULT_MODEL} is not here yet; the first recipe downloads it (about 270 MB)"
        return Check("model", "note", text, "tinker-cookbook serve")
    return Check("model", "ok", f"{DEFAULT_MODEL} in {folder}")


def _is_set(name: str) -> str:
    return "is set" if os.environ.get(name) else "is not set"


def _threads() -> str:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count()
    return f"{count} processor cores"


def _processor_flags() -> set[str]:
    return set(_processor_info().split())


def _processor_name() -> str:
    lines = _processor_info().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _processor_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _count(folder: Path) -> int:
    """Return the size of the files below a folder; links are not followed."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
