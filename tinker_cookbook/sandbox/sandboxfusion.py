"""A client of a SandboxFusion container, which runs code in many languages over HTTP."""

from __future__ import annotations

import asyncio
import base64
import os
import shlex
import uuid
from typing import TYPE_CHECKING, Any

from tinker_cookbook.exceptions import SandboxError
from tinker_cookbook.sandbox.sandbox_interface import SandboxResult, SandboxTerminatedError

if TYPE_CHECKING:
    import httpx

__all__ = ["SandboxFusionClient", "SandboxFusionSandbox"]

DEFAULT_URL = "http://localhost:8080"
DEFAULT_CONCURRENCY = 4


class SandboxFusionClient:
    """Sends programs to the container's `/run_code`."""

    def __init__(self, url: str | None = None, max_concurrency: int | None = None) -> None:
        """Set the address.

        Args:
            url: Address of the container; None: $SANDBOX_URL, else port 8080 of this machine.
            max_concurrency: Maximum number of programs at once; None: $SANDBOX_MAX_CONCURRENCY,
                else 4.
        """
        self.url = (url or os.environ.get("SANDBOX_URL") or DEFAULT_URL).rstrip("/")
        from_environment = os.environ.get("SANDBOX_MAX_CONCURRENCY")
        self._slots = asyncio.Semaphore(
            max_concurrency or int(from_environment or DEFAULT_CONCURRENCY)
        )
        self._client: httpx.AsyncClient | None = None

    async def run(
        self, code: str, files: dict[str, str], timeout: float, language: str = "python"
    ) -> tuple[bool, dict[str, Any]]:
        """Run a program.

        Args:
            code: The program.
            files: Names and texts of files in the program's folder.
            timeout: Maximum run time in seconds.
            language: The language, by the container's name for it.

        Returns:
            Whether the program succeeded, and the container's answer.

        Raises:
            SandboxError: if the container does not answer.
        """
        import httpx

        body = {
            "code": code,
            "language": language,
            "run_timeout": timeout,
            "files": {name: base64.b64encode(t.encode()).decode() for name, t in files.items()},
        }
        if self._client is None:
            self._client = httpx.AsyncClient()
        try:
            async with self._slots:
                response = await self._client.post(
                    f"{self.url}/run_code", json=body, timeout=timeout + 30
                )
            response.raise_for_status()
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise SandboxError(
                f"url={self.url} does not run code ({type(error).__name__} {error}); start a "
                "SandboxFusion container, or use the local sandbox."
            ) from error
        return answer.get("status") == "Success", answer

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


class SandboxFusionSandbox:
    """The sandbox interface on a container that keeps no state between commands.

    Files written through `write_file` are sent with every command. Files that a command writes are
    lost when it ends.
    """

    def __init__(self, client: SandboxFusionClient | None = None) -> None:
        """Use this client, or by default the container at $SANDBOX_URL."""
        self._client = client or SandboxFusionClient()
        self._owns_client = client is None
        self._files: dict[str, str] = {}
        self._id = f"fusion-{uuid.uuid4().hex[:12]}"
        self._alive = True

    @property
    def sandbox_id(self) -> str:
        """A name for logs."""
        return self._id

    async def send_heartbeat(self, timeout: int = 30) -> None:
        """Do nothing but check: the container does not need a heartbeat.

        Raises:
            SandboxTerminatedError: after `cleanup`.
        """
        if not self._alive:
            raise SandboxTerminatedError(f"sandbox {self._id} was cleaned up; make a new one.")

    async def run_command(
        self,
        command: str,
        workdir: str | None = None,
        timeout: int = 60,
        max_output_bytes: int | None = None,
    ) -> SandboxResult:
        """Run a shell command in a folder with the files; the exit code is 124 after a timeout.

        Raises:
            SandboxError: if the container does not answer, or fails itself.
        """
        await self.send_heartbeat()
        code = command if workdir is None else f"cd {shlex.quote(workdir)} && {{ {command}\n}}"
        _, answer = await self._client.run(code, self._files, timeout, language="bash")
        ran = answer.get("run_result")
        if not isinstance(ran, dict):
            raise SandboxError(
                f"SandboxFusion could not run a command ({answer.get('status')}: "
                f"{answer.get('message')}); look at the container's log."
            )
        too_long = ran.get("status") == "TimeLimitExceeded"
        return_code = ran.get("return_code")
        return SandboxResult(
            stdout=(ran.get("stdout") or "")[:max_output_bytes],
            stderr=(ran.get("stderr") or "")[:max_output_bytes],
            exit_code=124 if too_long else 1 if return_code is None else return_code,
            metrics={"seconds": ran.get("execution_time") or 0.0},
        )

    async def read_file(
        self, path: str, max_bytes: int | None = None, timeout: int = 60
    ) -> SandboxResult:
        """Return the text of a file written here, or of a file of the container's image."""
        if path in self._files:
            text = self._files[path].encode()[:max_bytes].decode("utf-8", "replace")
            return SandboxResult(stdout=text, stderr="", exit_code=0)
        return await self.run_command(f"cat {shlex.quote(path)}", None, timeout, max_bytes)

    async def write_file(
        self, path: str, content: str | bytes, executable: bool = False, timeout: int = 60
    ) -> SandboxResult:
        """Keep a text file for all later commands.

        Raises:
            SandboxError: for bytes that are not UTF-8 text, or an absolute path.
        """
        await self.send_heartbeat()
        if path.startswith("/") or ".." in path.split("/"):
            raise SandboxError(f"path={path} leads out of the sandbox; use a path below it.")
        try:
            self._files[path] = content if isinstance(content, str) else content.decode()
        except UnicodeDecodeError as error:
            raise SandboxError(f"path={path}: only UTF-8 text can be sent; {error}") from error
        return SandboxResult(stdout="", stderr="", exit_code=0)

    async def cleanup(self) -> None:
        """Forget the files."""
        self._alive = False
        self._files.clear()
        if self._owns_client:
            await self._client.close()
