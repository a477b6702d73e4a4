"""Start a service: arguments -> settings -> a running process. Both ways to start one use this."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.model.number_formats import (
    FULL,
    base_format_from_environment,
    dtype_from_environment,
    format_bits,
)
from tinker_cookbook.local.engine.native.build import describe_missing_compiler
from tinker_cookbook.local.engine.native.instructions import choose_set
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.errors import OTHER_STATE_DIR
from tinker_cookbook.local.process.lifecycle import (
    bind,
    is_loopback,
    serve,
    write_ready_file,
)
from tinker_cookbook.local.service.protocol.auth import KEY_PREFIX, key_path, load_or_make_key
from tinker_cookbook.local.service.settings import Limits, RetentionSettings, ServiceSettings
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.store import SPARE_BYTES
from tinker_cookbook.model_files import DEFAULT_MODEL, cookbook_home
from tinker_cookbook.utils.byte_sizes import format_bytes

__all__ = ["build_settings", "check_arguments", "run_service"]

KEY_VARIABLE = "TINKER_API_KEY"
MIN_KEY_LENGTH = 16
MIN_REMOTE_KEY_LENGTH = 32


def build_settings(args: argparse.Namespace) -> ServiceSettings:
    """Check the arguments and return the settings.

    Raises:
        ConfigurationError: an argument, the state folder or the key cannot be used.
    """
    check_arguments(args)
    state_dir = (args.state_dir or cookbook_home() / "service").expanduser().resolve()
    _check_state_folder(state_dir)
    return ServiceSettings(
        state_dir=state_dir,
        models=tuple(dict.fromkeys(args.models or [DEFAULT_MODEL])),
        api_key=_find_key(state_dir, args.host),
        host=args.host,
        port=args.port,
        engine=EngineSettings(
            device=args.device,
            dtype=args.dtype or dtype_from_environment(),
            base_format=args.base_format or base_format_from_environment(),
            num_threads=args.num_threads,
            memory_bytes=_memory_bytes(args.memory_gib),
        ),
        assets_dir=args.assets_dir and args.assets_dir.expanduser().resolve(),
        allowed_hosts=tuple(args.allowed_hosts or ()),
        log_format=args.log_format,
        model_dirs=tuple(path.expanduser().resolve() for path in args.model_dirs or ()),
        limits=Limits() if args.spill_after is None else Limits(spill_seconds=args.spill_after),
        retention=RetentionSettings(args.keep_days, int(args.log_mib * 2**20)),
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Check what can be checked without creating, downloading or starting anything.

    Raises:
        ConfigurationError: the message names the argument.
    """
    format_bits(args.base_format or base_format_from_environment() or FULL)
    choose_set()  # refuses a wrong TINKER_COOKBOOK_ISA
    if not 0 <= args.port <= 65535:
        raise ConfigurationError(
            f"port={args.port} is not a port; use 1 to 65535, or 0 for any free port"
        )
    bind(args.host, args.port).close()
    _check_key(os.environ.get(KEY_VARIABLE, ""), args.host)
    _check_numbers(args)
    given = [("models_dir", path) for path in args.model_dirs or ()]
    given += [("assets_dir", args.assets_dir)] if args.assets_dir else []
    for name, path in given:
        if not path.expanduser().is_dir():
            raise ConfigurationError(f"{name}={path} is not a folder; use one that exists")


def _check_numbers(args: argparse.Namespace) -> None:
    if args.num_threads is not None and args.num_threads < 1:
        raise ConfigurationError(f"num_threads={args.num_threads} is too small; use 1 or more")
    if args.spill_after is not None and not 0 <= args.spill_after < math.inf:
        raise ConfigurationError(f"spill_after={args.spill_after} must be 0 seconds or more")
    if not 1 <= args.log_mib < math.inf:
        raise ConfigurationError(f"log_mib={args.log_mib} must be 1 MiB or more")
    if not 1 <= args.keep_days < math.inf:
        raise ConfigurationError(f"keep_days={args.keep_days} must be 1 day or more")


def _check_state_folder(state_dir: Path) -> None:
    if state_dir.exists() and not state_dir.is_dir():
        raise ConfigurationError(f"state_dir={state_dir} is a file; use a folder")
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_shared = bool(state_dir.stat().st_mode & stat.S_ISVTX)
        free = shutil.disk_usage(state_dir).free
    except OSError as error:
        raise ConfigurationError(
            f"state_dir={state_dir} cannot be written: {error}; {OTHER_STATE_DIR}"
        ) from error
    if free < SPARE_BYTES:
        raise ConfigurationError(
            f"state_dir={state_dir} is on a full disk, with {format_bytes(free)} free; free some "
            f"space, or {OTHER_STATE_DIR}"
        )
    # the service makes its folder private, which must not happen to /tmp or a home folder
    if is_shared or state_dir in (Path.home().resolve(), Path("/")):
        raise ConfigurationError(
            f"state_dir={state_dir} is also used for other things; choose a separate folder, such "
            f"as {state_dir / 'service'}"
        )


def _memory_bytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < 2**20:
        raise ConfigurationError(f"memory_gib={gib} must be above 0 GiB")
    return int(gib * 2**30)


def _check_key(key: str, host: str) -> None:
    """Refuse a key that is too weak; without one, only this machine may connect."""
    if not key and not is_loopback(host):
        raise ConfigurationError(
            f"host={host!r} can be reached from other machines, and {KEY_VARIABLE} is not set; "
            f"set it to a secret of at least {MIN_REMOTE_KEY_LENGTH} characters that starts with "
            f"{KEY_PREFIX!r}"
        )
    needed = MIN_KEY_LENGTH if is_loopback(host) else MIN_REMOTE_KEY_LENGTH
    if key and not (key.startswith(KEY_PREFIX) and len(key) >= needed and key.isascii()):
        raise ConfigurationError(
            f"{KEY_VARIABLE} cannot be used by a service on {host}; it must start with "
            f"{KEY_PREFIX!r} and have at least {needed} ASCII characters"
        )


def _find_key(state_dir: Path, host: str) -> str:
    key = os.environ.get(KEY_VARIABLE, "")
    _check_key(key, host)
    if key:
        return key
    try:
        return load_or_make_key(state_dir)
    except OSError as error:
        raise ConfigurationError(
            f"state_dir={state_dir} cannot be written: {error}; {OTHER_STATE_DIR}"
        ) from error


def run_service(
    settings: ServiceSettings,
    *,
    ready_file: Path | None = None,
    parent_pid: int | None = None,
    verbose: bool = False,
) -> int:
    """Serve until told to stop; returns the exit status."""

    def announce(service: Service, base_url: str) -> None:
        service.store.announce(
            {
                "pid": os.getpid(),
                "base_url": base_url,
                "models": list(settings.models),
                "started_at": service.started_at,
                "status_token": service.auth.status_token,
            }
        )
        if ready_file is not None:
            values = {"base_url": base_url, "pid": os.getpid(), "model": settings.models[0]}
            about = {"ticket": service.auth.tickets.make(), "notes": _notes(settings)}
            write_ready_file(ready_file, values | about)
        if verbose:
            print(_how_to_use(settings, base_url, service.auth.tickets.make()), flush=True)
            for note in _notes(settings):
                say(f"note: {note}")

    def say(text: str) -> None:
        if verbose:
            print(text, file=sys.stderr, flush=True)

    return serve(settings, announce=announce, say=say, parent_pid=parent_pid)


def _notes(settings: ServiceSettings) -> list[str]:
    """Return hints about the speed of the service, for its operator."""
    if settings.engine.device not in (None, "cpu") or Path("/dev/nvidia0").exists():
        return []
    missing = describe_missing_compiler()
    return [] if missing is None else [missing]


_REACH = """
From other machines: http://ADDRESS:{port}, with an ADDRESS of this machine. Traffic is not
encrypted. To use a name instead of an address, add --allowed-host NAME"""


def _how_to_use(settings: ServiceSettings, base_url: str, ticket: str) -> str:
    """Return what `serve` prints. It leaves out the key: terminals are logged and shared."""
    if os.environ.get(KEY_VARIABLE):
        key = f"the value of {KEY_VARIABLE}, which clients need too"
        export_key = f"# set {KEY_VARIABLE} as for this service"
    else:
        path = key_path(settings.state_dir)
        key = f"in {path}, readable by you only"
        export_key = f'export {KEY_VARIABLE}="$(cat {shlex.quote(str(path))})"'
    reach = "" if is_loopback(settings.host) else _REACH.format(port=base_url.rpartition(":")[2])
    return f"""\
Serving {", ".join(settings.models)} on {base_url}{reach}
State and logs: {settings.state_dir}
Key: {key}

Use it from another terminal:
  export TINKER_BASE_URL={base_url}
  {export_key}
  export NO_PROXY=127.0.0.1,localhost

OpenAI clients: base_url={base_url}/oai/api/v1 and the same key
Dashboard: {base_url}/#ticket={ticket}
  (this link signs in once, within an hour; later the page asks for the key)

Stop with Ctrl-C. Running work is finished first; a second Ctrl-C stops at once."""
