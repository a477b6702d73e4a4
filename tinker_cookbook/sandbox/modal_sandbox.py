"""A sandbox in Modal's cloud: a separate container without a network. Needs an account."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, SandboxError
from tinker_cookbook.sandbox.sandbox_interface import SandboxResult, SandboxTerminatedError

__all__ = ["ModalSandbox"]

DEFAULT_OUTPUT_BYTES = 1024 * 1024
WORKDIR = "/workspace"
GRACE_SECONDS = 30
INPUT_CHUNK_BYTES = 1024 * 1024
"""Bytes of input per request; Modal refuses to buffer more than 2 MiB."""


class ModalSandbox:
    """Commands and files in a running Modal sandbox; start one with `await create()`."""

    def __init__(self, sandbox: Any, max_stream_output_bytes: int = DEFAULT_OUTPUT_BYTES) -> None:
        """Wrap a `modal.Sandbox` that has the tools of a plain Debian image."""
        self._sandbox = sandbox
        self._max_output_bytes = max_stream_output_bytes
        self._alive = True

    @classmethod
    async def create(
        cls,
        app_name: str = "tinker-cookbook",
        timeout: int = 600,
        image: Any = None,
        max_stream_output_bytes: int = DEFAULT_OUTPUT_BYTES,
    ) -> ModalSandbox:
        """Start a sandbox.

        Args:
            app_name: Name of the Modal app; it is created if it does not exist.
            timeout: Seconds after which Modal stops the sandbox, even while it is in use.
            image: A `modal.Image`; None: Debian with the Python version of this process.
            max_stream_output_bytes: Maximum bytes kept of stdout and of stderr of a command.

        Raises:
            ConfigurationError: without the package, or without an account.
            SandboxError: if Modal does not start a sandbox.
        """
        try:
            import modal  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                "sandbox=modal needs the package modal; run pip install 'tinker-cookbook[modal]', "
                "or use sandbox=local."
            ) from error
        try:
            app = await modal.App.lookup.aio(app_name, create_if_missing=True)
            sandbox = await modal.Sandbox.create.aio(
                app=app,
                image=image or modal.Image.debian_slim(),
                timeout=timeout,
                block_network=True,
            )
        except modal.exception.AuthError as error:
            raise ConfigurationError(
                f"sandbox=modal needs an account ({error}); run `modal token new`, set "
                "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, or use sandbox=local."
            ) from error
        except modal.exception.Error as error:
            raise SandboxError(f"Modal did not start a sandbox: {error}") from error
        return cls(sandbox, max_stream_output_bytes)

    @property
    def sandbox_id(self) -> str:
        """The id that Modal gave the sandbox."""
        return str(self._sandbox.object_id)

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """Check that the sandbox still runs.

        Raises:
            SandboxTerminatedError: if it does not.
        """
        async with asyncio.timeout(timeout):
            status = await self._sandbox.poll.aio()
        if status is not None or not self._alive:
            raise self._terminated("has ended")

    async def run_command(
        self,
        command: str,
        workdir: str | None = None,
        timeout: int = 60,
        max_output_bytes: int | None = None,
    ) -> SandboxResult:
        """Run a shell command; the exit code is 124 after a timeout.

        Raises:
            SandboxTerminatedError: if the sandbox has ended or does not answer.
        """
        return await self._execute(command, workdir or WORKDIR, timeout, limit=max_output_bytes)

    async def read_file(
        self, path: str, max_bytes: int | None = None, timeout: int = 60
    ) -> SandboxResult:
        """Return the text of a file as `stdout`; the exit code is not 0 if it cannot be read."""
        return await self._execute(f"cat {shlex.quote(path)}", WORKDIR, timeout, limit=max_bytes)

    async def write_file(
        self, path: str, content: str | bytes, executable: bool = False, timeout: int = 60
    ) -> SandboxResult:
        """Write a file and create its parent folders."""
        data = content.encode() if isinstance(content, str) else content
        name = shlex.quote(path)
        mode = "755" if executable else "644"
        command = f'mkdir -p "$(dirname {name})" && cat > {name} && chmod {mode} {name}'
        return await self._execute(command, WORKDIR, timeout, data=data)

    async def cleanup(self) -> None:
        """Stop the sandbox; may be called twice."""
        if self._alive:
            self._alive = False
            await self._sandbox.terminate.aio()

    async def _execute(
        self,
        command: str,
        workdir: str,
        timeout: int,
        *,
        data: bytes = b"",
        limit: int | None = None,
    ) -> SandboxResult:
        """Run `command` in `workdir`, which may be relative to the start folder."""
        import modal  # pyright: ignore[reportMissingImports]

        if not self._alive:
            raise self._terminated("was cleaned up")
        folder = shlex.quote(workdir)
        inner = f"mkdir -p {WORKDIR} && cd {WORKDIR} && cd {folder} && {{ {command}\n}}"
        started = time.monotonic()
        try:
            # The inner `timeout` returns 124 on every version of Modal; the outer timeout is for a
            # network that does not answer.
            async with asyncio.timeout(timeout + GRACE_SECONDS):
                process = await self._sandbox.exec.aio(
                    "timeout", "-k", "1", str(timeout), "sh", "-c", inner, text=False
                )
                await _send_input(process, data)
                stdout, stderr = await asyncio.gather(
                    process.stdout.read.aio(), process.stderr.read.aio()
                )
                exit_code = await process.wait.aio()
        except (modal.exception.Error, TimeoutError) as error:
            raise self._terminated(f"failed ({type(error).__name__}: {error})") from error
        kept = limit or self._max_output_bytes
        return SandboxResult(
            stdout=stdout[:kept].decode("utf-8", "replace"),
            stderr=stderr[:kept].decode("utf-8", "replace"),
            exit_code=exit_code,
            metrics={"seconds": time.monotonic() - started},
        )

    def _terminated(self, problem: str) -> SandboxTerminatedError:
        return SandboxTerminatedError(f"sandbox {self.sandbox_id} {problem}; make a new one.")


async def _send_input(process: Any, data: bytes) -> None:
    """Write `data` to a command's standard input and close it.

    A command may end, or close its input, before all of it is sent. That is the command's choice,
    as in a shell pipe, and not a failure: the exit code and the output say what happened.
    """
    # A pipe raises ConnectionError; Modal raises ValueError for the input of an ended command.
    with contextlib.suppress(ConnectionError, ValueError):
        for start in range(0, len(data), INPUT_CHUNK_BYTES):
            process.stdin.write(data[start : start + INPUT_CHUNK_BYTES])
            await process.stdin.drain.aio()
        process.stdin.write_eof()
        await process.stdin.drain.aio()
