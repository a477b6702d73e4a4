"""The interface of all sandboxes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import chz

from tinker_cookbook.exceptions import SandboxError

__all__ = ["SandboxInterface", "SandboxResource", "SandboxResult", "SandboxTerminatedError"]


@chz.chz
class SandboxResult:
    """The outcome of one command."""

    stdout: str
    stderr: str
    exit_code: int
    metrics: dict[str, Any] = chz.field(default_factory=dict)


class SandboxTerminatedError(SandboxError):
    """The sandbox is gone; a new one is needed."""


@runtime_checkable
class SandboxInterface(Protocol):
    """A place to run untrusted programs."""

    @property
    def sandbox_id(self) -> str:
        """A name for logs."""
        ...

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """Keep the sandbox alive."""
        ...

    async def run_command(
        self,
        command: str,
        workdir: str | None = None,
        timeout: int = 60,
        max_output_bytes: int | None = None,
    ) -> SandboxResult:
        """Run a shell command; after a timeout it is killed and has exit code 124."""
        ...

    async def read_file(
        self, path: str, max_bytes: int | None = None, timeout: int = 60
    ) -> SandboxResult:
        """Return the text of a file as `stdout`; the exit code is not 0 if it cannot be read."""
        ...

    async def write_file(
        self, path: str, content: str | bytes, executable: bool = False, timeout: int = 60
    ) -> SandboxResult:
        """Write a file and create its parent folders."""
        ...

    async def cleanup(self) -> None:
        """Stop and remove everything; may be called twice."""
        ...


class SandboxResource:
    """A sandbox made elsewhere, to be kept alive and cleaned up."""

    def __init__(self, sandbox: SandboxInterface) -> None:
        self.sandbox = sandbox

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """Keep the sandbox alive."""
        await self.sandbox.send_heartbeat(timeout)

    async def cleanup(self) -> None:
        """Remove the sandbox."""
        await self.sandbox.cleanup()
