"""Delete old checkpoints of runs: training states that no run will resume from.

For each run, the newest training state, the final and best checkpoints and every named checkpoint
are kept. Nothing is deleted before you agree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.byte_sizes import format_bytes

if TYPE_CHECKING:
    from tinker_cookbook.checkpoint_utils import CheckpointRecord
    from tinker_cookbook.commands.parts.saved_checkpoints import CheckpointStore

__all__ = ["add_arguments", "run"]

PERIODIC = re.compile(r"\d+")
BEST = re.compile(r"best_\d+")


@dataclass(frozen=True)
class OldCheckpoint:
    """A checkpoint that can be deleted."""

    log_path: Path
    path: str
    size_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "log_paths",
        nargs="*",
        type=Path,
        metavar="LOG_PATH",
        help="run directories, or folders that contain them (default: the folder of all runs)",
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=1,
        metavar="N",
        help="number of newest training states to keep per run (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="also delete the sampler weights of old checkpoints and of earlier best checkpoints",
    )
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="address of a Tinker service (default: the service of each run)",
    )


def run(args: argparse.Namespace) -> int:
    """List the checkpoints that can be deleted, and delete them if the user agrees."""
    if args.keep < 1:
        raise ConfigurationError(f"keep={args.keep} is too small; use 1 or more.")
    from tinker_cookbook.runs.directory import runs_path

    everywhere = _find_runs([Path(runs_path())])
    chosen = _find_runs(args.log_paths) if args.log_paths else everywhere
    if not chosen:
        where = ", ".join(map(str, args.log_paths or [runs_path()]))
        raise ConfigurationError(
            f"LOG_PATH={where} contains no run with checkpoints; give a run directory."
        )
    kept = {path for folder in {*chosen, *everywhere} for path in _kept_paths(folder, args)}
    with contextlib.ExitStack() as stack:
        freed = 0
        for base_url, folders in _by_service(chosen, args.base_url).items():
            from tinker_cookbook.commands.parts.saved_checkpoints import open_checkpoint_store

            store = open_checkpoint_store(base_url)
            stack.callback(store.close)
            freed += _clean(store, folders, kept, args)
    if args.yes and freed:
        print(f"{format_bytes(freed)} freed.")
    return 0


def _find_runs(folders: Iterable[Path]) -> list[Path]:
    from tinker_cookbook.checkpoint_utils import CHECKPOINTS_BASE_NAME

    found = [path for each in folders for path in each.expanduser().rglob(CHECKPOINTS_BASE_NAME)]
    return sorted({path.resolve().parent for path in found})


def _by_service(folders: list[Path], base_url: str | None) -> dict[str | None, list[Path]]:
    grouped: dict[str | None, list[Path]] = {}
    for folder in folders:
        grouped.setdefault(base_url or _base_url_of(folder), []).append(folder)
    return grouped


def _base_url_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("base_url")
    except (OSError, ValueError, AttributeError):
        return None


def _records(folder: Path) -> list[CheckpointRecord]:
    from tinker_cookbook.checkpoint_utils import load_checkpoints_file

    return load_checkpoints_file(str(folder))


def _kept_paths(folder: Path, args: argparse.Namespace) -> set[str]:
    """Return the paths to keep: those that a resume needs, and those that someone has named."""
    from tinker_cookbook.runs.checkpoints import get_best_checkpoint

    records = _records(folder)
    states = [record for record in records if record.state_path]
    kept = {id(record) for record in states[-args.keep :]}
    for record in records:
        replaceable = PERIODIC.fullmatch(record.name) or BEST.fullmatch(record.name)
        if record.final or not replaceable:
            kept.add(id(record))
    paths = {
        path
        for record in records
        if id(record) in kept
        for path in (record.state_path, record.sampler_path)
    }
    best = get_best_checkpoint(str(folder))
    if best is not None:
        paths.add(best.sampler_path)
    if not args.weights:
        paths |= {record.sampler_path for record in records}
    return {path for path in paths if path}


def _clean(
    store: CheckpointStore, folders: list[Path], kept: set[str], args: argparse.Namespace
) -> int:
    """List, ask and delete for the runs of one service; return the number of bytes deleted."""
    old = [item for folder in folders for item in _find_old(store, folder, kept)]
    total = sum(item.size_bytes for item in old)
    if not old:
        print("Nothing to delete: every checkpoint of these runs is needed.")
        return 0
    for item in old:
        print(f"  {format_bytes(item.size_bytes):>10}  {item.path}  of {item.log_path}")
    print(f"{len(old)} old checkpoints, {format_bytes(total)}.")
    if args.yes or _agrees():
        return _delete(store, old)
    print("Nothing was deleted. Add --yes to delete these checkpoints.")
    return 0


def _find_old(store: CheckpointStore, folder: Path, kept: set[str]) -> list[OldCheckpoint]:
    from tinker_cookbook.runs import lock

    try:
        lock.refuse_if_held(folder)
    except ConfigurationError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return []
    paths = {
        path for record in _records(folder) for path in (record.state_path, record.sampler_path)
    }
    sizes = store.sizes(path for path in paths if path and path not in kept)
    return [OldCheckpoint(folder, path, size) for path, size in sorted(sizes.items())]


def _agrees() -> bool:
    return sys.stdin.isatty() and input("Delete these? [y/N] ").strip().lower() in ("y", "yes")


def _delete(store: CheckpointStore, old: list[OldCheckpoint]) -> int:
    """Delete checkpoints; each record first, so that no record names a missing checkpoint."""
    from tinker_cookbook import checkpoint_utils
    from tinker_cookbook.runs import lock

    freed = 0
    for item in old:
        with lock.hold(item.log_path):
            checkpoint_utils.forget_path(item.log_path, item.path)
            store.delete(item.path)
        freed += item.size_bytes
    return freed
