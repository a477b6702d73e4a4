"""Start an agent as a subprocess that finds its model in environment variables."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.capture.rollout import Address
from tinker_cookbook.exceptions import SandboxError, TrainingError

if TYPE_CHECKING:
    from tinker_cookbook.sandbox import SandboxInterface

__all__ = ["ProgramOutcome", "run_in_sandbox", "run_program"]

_HIDDEN = ("TINKER_", "OPENAI_", "ANTHROPIC_")
"""Beginnings of the names of variables that an agent does not inherit."""
_READ_AT_ONCE = 2**16
_OUTPUT_SECONDS = 5.0
"""How long to wait for output after the program has ended."""
_SANDBOX_TIMEOUT_CODE = 124
_VARIABLES_FILE, _INPUT_FILE = ".agent-environment", ".agent-input"


@dataclass(frozen=True)
class ProgramOutcome:
    """How a program ended, and what it wrote."""

    return_code: int
    """The exit status; minus the signal's number if a signal ended the program."""
    stdout: str
    stderr: str
    timed_out: bool = False

    def raise_for_status(self) -> ProgramOutcome:
        """Return the outcome itself.

        Raises:
            TrainingError: the program ended with an error or ran out of time. The message has the
                end of what it wrote to stderr.
        """
        if self.timed_out or self.return_code:
            ended = "ran out of time" if self.timed_out else f"exit status {self.return_code}"
            raise TrainingError(f"the agent's program failed ({ended}): {self.stderr[-1000:]}")
        return self


async def run_program(
    command: Sequence[str],
    address: Address,
    *,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    timeout_seconds: float = 300.0,
    max_output_bytes: int = 2**20,
) -> ProgramOutcome:
    """Run a program until it ends, and kill it and its children at the limit.

    The program inherits this process's environment without `TINKER_*`, `OPENAI_*` and
    `ANTHROPIC_*`, and gets `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL`. It runs with the
    rights of this process: run only programs that you trust, or use `run_in_sandbox`.

    Args:
        command: The program and its arguments.
        address: Where it finds its model.
        stdin: Text for its standard input.
        environment: Further environment variables.
        folder: Its working directory; None: that of this process.
        timeout_seconds: Maximum seconds.
        max_output_bytes: Bytes of each output that are kept; the rest is discarded.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(address) | dict(environment or {}),
        cwd=folder,
        start_new_session=True,
    )
    stdout, stderr = bytearray(), bytearray()
    piping = asyncio.gather(
        _read(process.stdout, stdout, max_output_bytes),
        _read(process.stderr, stderr, max_output_bytes),
        _write(process.stdin, stdin.encode()),
    )
    timed_out = False
    try:
        await asyncio.wait_for(process.wait(), timeout_seconds)
    except TimeoutError:
        timed_out = True
    finally:
        # also children that the program left behind
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    return_code = await process.wait()
    # A child that left the process group may keep the outputs open.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(piping, _OUTPUT_SECONDS)
    return ProgramOutcome(return_code, _text(stdout), _text(stderr), timed_out)


async def run_in_sandbox(
    sandbox: SandboxInterface,
    command: Sequence[str],
    address: Address,
    *,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 300.0,
    max_output_bytes: int = 2**20,
) -> ProgramOutcome:
    """Run a program in a sandbox, with the sandbox's limits and none of this process's variables.

    The program must reach the endpoint. A `LocalSandbox` is made with `cut_network=False`, and a
    sandbox on another machine needs an endpoint that listens there. Its files are put in place with
    `sandbox.write_file`; the sandbox stays open. Variables and arguments are as for `run_program`.

    Raises:
        SandboxError: the sandbox is gone or cannot be written to.
    """
    variables = address.environment() | dict(environment or {})
    # A file, because the arguments of a command can be seen by other programs of the machine.
    lines = [f"export {name}={shlex.quote(text)}" for name, text in variables.items()]
    for path, text in ((_VARIABLES_FILE, "\n".join(lines) + "\n"), (_INPUT_FILE, stdin)):
        written = await sandbox.write_file(path, text)
        if written.exit_code:
            raise SandboxError(f"{path} cannot be written in the sandbox: {written.stderr}")
    shell = f". ./{_VARIABLES_FILE} && exec {shlex.join(command)} < {_INPUT_FILE}"
    seconds = max(1, round(timeout_seconds))
    done = await sandbox.run_command(shell, None, seconds, max_output_bytes)
    timed_out = done.exit_code == _SANDBOX_TIMEOUT_CODE
    return ProgramOutcome(done.exit_code, done.stdout, done.stderr, timed_out)


def _environment(address: Address) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_HIDDEN)}
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, [kept.get(name, ""), "127.0.0.1,localhost"]))
    return kept | address.environment()


async def _read(stream: asyncio.StreamReader | None, kept: bytearray, max_bytes: int) -> None:
    while stream is not None and (part := await stream.read(_READ_AT_ONCE)):
        kept += part[: max_bytes - len(kept)]


async def _write(stream: asyncio.StreamWriter | None, data: bytes) -> None:
    if stream is None:
        return
    with contextlib.suppress(ConnectionError):
        stream.write(data)
        await stream.drain()
    with contextlib.suppress(ConnectionError):
        stream.close()


def _text(output: bytearray) -> str:
    return output.decode(errors="replace")
