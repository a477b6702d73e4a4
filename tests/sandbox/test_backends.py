"""One contract for all sandboxes: on this machine, in a SandboxFusion container, on Modal.

The two services are played by small ones that really run the commands: the container's `/run_code`
as an HTTP server, and the part of the package `modal` that is used.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tinker_cookbook.exceptions import ConfigurationError, SandboxError
from tinker_cookbook.sandbox import (
    ModalSandbox,
    SandboxBackend,
    SandboxFusionClient,
    SandboxFusionSandbox,
    SandboxInterface,
    SandboxTerminatedError,
    create_sandbox,
)

MODAL_BUFFER_BYTES = 2 * 1024 * 1024


class Container(BaseHTTPRequestHandler):
    """`/run_code` of SandboxFusion: files as base64, statuses and fields as the container's."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/run_code"
        assert body["language"] == "bash"
        with tempfile.TemporaryDirectory() as folder:
            for name, data in body["files"].items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(data))
            answer = self.run_bash(body["code"], folder, body["run_timeout"])
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def run_bash(self, code: str, folder: str, timeout: float) -> dict[str, Any]:
        if code == "container fails":
            return {"status": "SandboxError", "message": "no workers"}
        try:
            ran = subprocess.run(
                ["bash", "-c", code],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {
                "status": "Failed",
                "message": "",
                "run_result": {"status": "TimeLimitExceeded"},
            }
        result = {"status": "Finished", "return_code": ran.returncode, "execution_time": 0.1}
        result |= {"stdout": ran.stdout, "stderr": ran.stderr}
        status = "Success" if ran.returncode == 0 else "Failed"
        return {"status": status, "message": "", "run_result": result}

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Container)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("SANDBOX_URL", url)
    yield url
    server.shutdown()
    server.server_close()
    thread.join()


class Aio:
    """Modal's methods have an async twin at `.aio`."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.aio = function


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._pipe = process.stdin
        self._num_buffered = 0
        self.stdin = types.SimpleNamespace(
            write=self._write, write_eof=process.stdin.write_eof, drain=Aio(self._drain)
        )
        self.stdout = types.SimpleNamespace(read=Aio(process.stdout.read))
        self.stderr = types.SimpleNamespace(read=Aio(process.stderr.read))
        self.wait = Aio(process.wait)

    def _write(self, data: bytes) -> None:
        self._num_buffered += len(data)
        if self._num_buffered > MODAL_BUFFER_BYTES:
            raise BufferError("Buffer size exceed limit. Call drain to clear the buffer.")
        self._pipe.write(data)

    async def _drain(self) -> None:
        self._num_buffered = 0
        await self._pipe.drain()


class CloudSandbox:
    """Commands run here, with a folder for the cloud's `/workspace`."""

    object_id = "sb-test"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.exec = Aio(self._exec)
        self.command_ends_first = False
        """Return a command only when it has ended and its standard input is closed."""
        self.poll = Aio(self._poll)
        self.terminate = Aio(self._terminate)
        self.status: int | None = None

    async def _exec(self, *words: str, text: bool) -> Process:
        assert text is False
        words = tuple(word.replace("/workspace", str(self._folder)) for word in words)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe, stderr=pipe)
        if self.command_ends_first:
            await process.wait()
            assert process.stdin is not None
            while not process.stdin.is_closing():
                await asyncio.sleep(0.001)
        return Process(process)

    async def _poll(self) -> int | None:
        return self.status

    async def _terminate(self) -> None:
        self.status = 137


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    modal = types.ModuleType("modal")
    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    errors.AuthError = type("AuthError", (errors.Error,), {})

    async def lookup(name: str, *, create_if_missing: bool) -> str:
        return name

    async def create(**settings: Any) -> CloudSandbox:
        assert settings["block_network"] is True
        return CloudSandbox(tmp_path)

    names: dict[str, Any] = {
        "exception": errors,
        "App": types.SimpleNamespace(lookup=Aio(lookup)),
        "Sandbox": types.SimpleNamespace(create=Aio(create)),
        "Image": types.SimpleNamespace(debian_slim=lambda: "debian"),
    }
    for name, value in names.items():
        setattr(modal, name, value)
    monkeypatch.setitem(sys.modules, "modal", modal)
    return modal


@asynccontextmanager
async def opened(backend: str) -> AsyncIterator[SandboxInterface]:
    sandbox = await create_sandbox(backend)
    try:
        yield sandbox
    finally:
        await sandbox.cleanup()


BACKENDS = [backend.value for backend in SandboxBackend]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    service = {"sandboxfusion": "container", "modal": "cloud"}.get(request.param)
    if service is not None:
        request.getfixturevalue(service)
    return request.param


def test_commands_and_files(backend: str):
    async def use() -> None:
        async with opened(backend) as sandbox:
            assert isinstance(sandbox, SandboxInterface)
            await sandbox.send_heartbeat()
            assert sandbox.sandbox_id
            wrote = await sandbox.write_file("part/my file.txt", "grün\n")
            assert wrote.exit_code == 0
            read = await sandbox.read_file("part/my file.txt")
            assert (read.stdout, read.exit_code) == ("grün\n", 0)
            ran = await sandbox.run_command("cat 'part/my file.txt'; echo oops >&2; exit 3")
            assert (ran.stdout, ran.stderr, ran.exit_code) == ("grün\n", "oops\n", 3)
            inside = await sandbox.run_command("cat 'my file.txt'", workdir="part")
            assert inside.stdout == "grün\n"
            missing = await sandbox.read_file("nothing")
            assert missing.exit_code != 0
            assert missing.stderr
            cut = await sandbox.run_command("yes | head -c 5000", max_output_bytes=10)
            assert len(cut.stdout) == 10
            await sandbox.write_file("large", "x" * 3_000_000)
            assert (await sandbox.run_command("wc -c < large")).stdout.strip() == "3000000"

    asyncio.run(use())


def test_a_command_may_end_before_its_input_is_sent(tmp_path: Path, cloud: types.ModuleType):
    """Writing to the input of an ended command fails; the command's result still counts."""

    async def use() -> None:
        ended_first = CloudSandbox(tmp_path)
        ended_first.command_ends_first = True
        process = await ended_first._exec("true", text=False)
        with pytest.raises(ConnectionError):  # or this test would not show anything
            await process.stdin.drain.aio()
        sandbox = ModalSandbox(ended_first)
        ran = await sandbox.run_command("echo done; exit 3")
        assert (ran.stdout, ran.exit_code) == ("done\n", 3)
        (tmp_path / "file").touch()
        wrote = await sandbox.write_file("file/in/a/file", "text")
        assert wrote.exit_code != 0
        assert "mkdir" in wrote.stderr

    asyncio.run(use())


def test_modal_refuses_the_input_of_an_ended_command_with_a_value_error(
    tmp_path: Path, cloud: types.ModuleType
):
    class Refusing(CloudSandbox):
        async def _exec(self, *words: str, text: bool) -> Process:
            process = await super()._exec(*words, text=text)

            async def refuse() -> None:
                raise ValueError("stdin is closed")

            process.stdin.drain = Aio(refuse)
            return process

    ran = asyncio.run(ModalSandbox(Refusing(tmp_path)).run_command("echo done"))
    assert (ran.stdout, ran.exit_code) == ("done\n", 0)


def test_a_command_that_takes_too_long_is_killed(backend: str):
    async def use() -> int:
        async with opened(backend) as sandbox:
            return (await sandbox.run_command("sleep 30", timeout=1)).exit_code

    assert asyncio.run(use()) == 124


def test_a_removed_sandbox_says_so(backend: str):
    async def use() -> None:
        sandbox = await create_sandbox(backend)
        await sandbox.cleanup()
        await sandbox.cleanup()
        with pytest.raises(SandboxTerminatedError, match="make a new one"):
            await sandbox.run_command("true")
        with pytest.raises(SandboxTerminatedError):
            await sandbox.send_heartbeat()

    asyncio.run(use())


def test_without_the_package_or_an_account_modal_is_explained(cloud, monkeypatch):
    async def refuse(name: str, *, create_if_missing: bool) -> str:
        raise cloud.exception.AuthError("Token missing")

    cloud.App.lookup = Aio(refuse)
    with pytest.raises(ConfigurationError, match=r"needs an account \(Token missing\); run `modal"):
        asyncio.run(create_sandbox("modal"))
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tinker-cookbook\[modal\]'"):
        asyncio.run(create_sandbox("modal"))


def test_a_container_that_fails_or_is_missing_is_explained(container: str):
    async def use() -> None:
        async with opened("sandboxfusion") as sandbox:
            with pytest.raises(
                SandboxError, match=r"could not run a command .SandboxError: no wor"
            ):
                await sandbox.run_command("container fails")
            with pytest.raises(SandboxError, match=r"path=\.\./x leads out of the sandbox"):
                await sandbox.write_file("../x", "")
            with pytest.raises(SandboxError, match="only UTF-8 text can be sent"):
                await sandbox.write_file("x", b"\xff")
        unreachable = SandboxFusionSandbox(SandboxFusionClient("http://127.0.0.1:9"))
        with pytest.raises(SandboxError, match=r"does not run code .* use the local sandbox"):
            await unreachable.run_command("true")

    asyncio.run(use())
