"""A sandbox on this machine: a temporary folder, resource limits, and no network.

Each command runs in a separate process group with limits on CPU time, memory, file size and the
number of processes, with an empty environment, and without a network where the kernel lets users
create namespaces. This keeps honest mistakes (endless loops, memory, forks, full disks) from doing
harm. It does not stop an attacker: a program can read everything that this user can read. Use a
container service for code of unknown origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError, SandboxError
from tinker_cookbook.sandbox.sandbox_interface import SandboxResult, SandboxTerminatedError

__all__ = ["LocalSandbox", "SandboxLimits", "network_can_be_cut"]

TIMEOUT_EXIT_CODE = 124
MEBIBYTE = 1024 * 1024
DEFAULT_OUTPUT_BYTES = MEBIBYTE
SAFE_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class SandboxLimits:
    """The resources that one command may use."""

    memory_bytes: int = 512 * MEBIBYTE
    """Maximum address space of each process, in bytes."""
    file_bytes: int = 64 * MEBIBYTE
    """Maximum size of each written file, in bytes."""
    num_processes: int = 256
    """Maximum number of processes of this user in total; not enforced for root."""
    num_open_files: int = 256
    """Maximum number of open files of each process."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigurationError(f"{name}={value} is less than 1; use 1 or more.")


class LocalSandbox:
    """A temporary folder in which commands run, one at a time or several at once."""

    def __init__(self, limits: SandboxLimits | None = None, *, cut_network: bool = True) -> None:
        """Create the folder.

        Args:
            limits: The resources that one command may use.
            cut_network: Whether to run without a network if the kernel allows it; see
                `network_can_be_cut`.
        """
        self.limits = limits or SandboxLimits()
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        self._cut_network = cut_network and network_can_be_cut()
        self._groups: set[int] = set()

    @property
    def sandbox_id(self) -> str:
        """The name of the folder."""
        return self._folder.name

    @property
    def folder(self) -> Path:
        """The folder in which commands start and to which paths are relative."""
        return self._folder

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """Do nothing but check: a local sandbox stays alive by itself.

        Raises:
            SandboxTerminatedError: if the sandbox has been removed.
        """
        self._check_alive()

    async def run_command(
        self,
        command: str,
        workdir: str | None = None,
        timeout: int = 60,
        max_output_bytes: int | None = None,
    ) -> SandboxResult:
        """Run a shell command.

        Args:
            command: The command, for `sh -c`.
            workdir: The working directory, absolute or relative to the sandbox's folder.
            timeout: Limit of wall clock time and of CPU time, each in seconds.
            max_output_bytes: Maximum bytes of stdout and of stderr; the rest is discarded.

        Returns:
            The result. Its exit code is 124 after a timeout, and `-N` if signal N ended it.
        """
        self._check_alive()
        folder = self._folder if workdir is None else self._resolve(workdir)
        if not folder.is_dir():
            return SandboxResult(stdout="", stderr=f"{workdir}: no such folder", exit_code=1)
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *self._command_line(command),
            cwd=folder,
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=functools.partial(_set_limits, self.limits, timeout),
        )
        self._groups.add(process.pid)
        limit = max_output_bytes or DEFAULT_OUTPUT_BYTES
        exit_code = TIMEOUT_EXIT_CODE
        reading = asyncio.gather(_read(process.stdout, limit), _read(process.stderr, limit))
        try:
            async with asyncio.timeout(timeout):
                exit_code = await process.wait()
        except TimeoutError:
            pass
        finally:
            # Also kill what the command left in the background: it would keep the pipes open.
            self._kill(process.pid)
            await process.wait()
            stdout, stderr = await reading
        seconds = time.monotonic() - started
        return SandboxResult(
            stdout=stdout, stderr=stderr, exit_code=exit_code, metrics={"seconds": seconds}
        )

    async def read_file(
        self, path: str, max_bytes: int | None = None, timeout: int = 60
    ) -> SandboxResult:
        """Return the text of a file as `stdout`, or exit code 1 and a reason as `stderr`."""
        self._check_alive()
        try:
            with self._resolve(path).open("rb") as file:
                data = file.read(-1 if max_bytes is None else max_bytes)
        except OSError as error:
            return SandboxResult(stdout="", stderr=str(error), exit_code=1)
        return SandboxResult(stdout=data.decode("utf-8", "replace"), stderr="", exit_code=0)

    async def write_file(
        self, path: str, content: str | bytes, executable: bool = False, timeout: int = 60
    ) -> SandboxResult:
        """Write a file in the folder of the sandbox.

        Raises:
            SandboxError: if the path leads out of the folder.
        """
        self._check_alive()
        target = self._resolve(path)
        if not target.is_relative_to(self._folder.resolve()):
            raise SandboxError(f"path={path} leads out of the sandbox; use a path below it.")
        data = content.encode() if isinstance(content, str) else content
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            target.chmod(0o755 if executable else 0o644)
        except OSError as error:
            return SandboxResult(stdout="", stderr=str(error), exit_code=1)
        return SandboxResult(stdout="", stderr="", exit_code=0)

    async def cleanup(self) -> None:
        """Kill all running commands and remove the folder."""
        for group in list(self._groups):
            self._kill(group)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _resolve(self, path: str) -> Path:
        return (self._folder.resolve() / path).resolve()

    def _check_alive(self) -> None:
        if not self._folder.is_dir():
            raise SandboxTerminatedError(
                f"sandbox {self.sandbox_id} has been removed; make a new one."
            )

    def _command_line(self, command: str) -> list[str]:
        shell = ["/bin/sh", "-c", command]
        return (
            ["unshare", "--user", "--map-current-user", "--net", *shell]
            if (self._cut_network)
            else shell
        )

    def _environment(self) -> dict[str, str]:
        """Return the environment of a command; keys and tokens of this process are left out."""
        python = str(Path(sys.executable).parent)
        return {
            "PATH": f"{python}:{SAFE_PATH}",
            "HOME": str(self._folder),
            "TMPDIR": str(self._folder),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _kill(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        self._groups.discard(group)


@functools.cache
def network_can_be_cut() -> bool:
    """Return whether this kernel lets us start a process without a network."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "--user", "--map-current-user", "--net", "true"]
    return subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode == 0


def _set_limits(limits: SandboxLimits, timeout: int) -> None:
    """Set the limits in the child process, before the command starts."""
    import resource

    wanted = {
        resource.RLIMIT_CPU: max(int(timeout), 1),
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NPROC: limits.num_processes,
        resource.RLIMIT_NOFILE: limits.num_open_files,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (allowed, allowed))


async def _read(stream: asyncio.StreamReader | None, limit: int) -> str:
    """Return the first `limit` bytes. The rest is read too, so that the writer never blocks."""
    assert stream is not None, "both outputs are pipes"
    kept = bytearray()
    while chunk := await stream.read(65536):
        kept += chunk[: limit - len(kept)]
    return kept.decode("utf-8", "replace")
