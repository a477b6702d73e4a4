"""Run a reply's code against the tests of its problem, in a sandbox."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import weakref
from dataclasses import dataclass, field

from tinker_cookbook.rl.types import EnvGroupBuilder
from tinker_cookbook.sandbox import SandboxBackend, SandboxInterface, create_sandbox

from .problems import Problem

FENCE = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.S)
# The marker is deleted before the code of the reply runs, so the code cannot forge a verdict.
RUNNER = """
import json, os
with open("cases.json") as file:
    marker, cases = json.load(file)
os.remove("cases.json")
results = []
try:
    from solution import solve
except BaseException as error:
    results = [f"{type(error).__name__}: {error}"] * len(cases)
else:
    for arguments, expected in cases:
        try:
            found = solve(*arguments)
            results.append("" if found == expected and type(found) is type(expected)
                           else f"returned {found!r}")
        except BaseException as error:
            results.append(f"raised {type(error).__name__}: {error}")
print("\\n" + marker + json.dumps([result[:200] for result in results]), flush=True)
os._exit(0)
"""
_slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
_slots = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Verdict:
    """The result of the tests."""

    share_passed: float
    """Share of the tests that passed, from 0 to 1."""
    problem: str = ""
    """The first failure, in words for the model; empty if all tests passed."""


def extract_code(reply: str) -> str | None:
    """Return the code of a reply: its first block, or the whole reply if it is code itself."""
    found = FENCE.search(reply)
    code = found.group(1) if found else reply
    return code if "def solve" in code else None


async def run_tests(
    sandbox: SandboxInterface, problem: Problem, code: str, timeout_seconds: int
) -> Verdict:
    """Run the code; an error, a wrong result or a timeout is a verdict, never an exception."""
    async with _slot():
        failures = await run_in_sandbox(sandbox, RUNNER, code, [problem.cases], timeout_seconds)
    if isinstance(failures, str):
        return Verdict(0.0, failures)
    return Verdict(failures.count("") / len(failures), _first_failure(problem, failures))


async def run_in_sandbox(
    sandbox: SandboxInterface, runner: str, code: str, inputs: list[object], timeout_seconds: int
) -> list[str] | str:
    """Run the code of a reply through a runner program that tests it.

    Args:
        sandbox: Where both run.
        runner: A program that reads `[marker, *inputs]` from cases.json, tests solution.py, and
            prints a line of the marker and a JSON list of failures, one per test.
        code: The code of the reply.
        inputs: What the runner needs: the tests.
        timeout_seconds: Time limit for all tests.

    Returns:
        A failure for each test, empty if it passed; or one text if the program did not end well.
    """
    marker = secrets.token_hex(16)
    await sandbox.write_file("solution.py", code)
    await sandbox.write_file("runner.py", runner)
    await sandbox.write_file("cases.json", json.dumps([marker, *inputs]))
    result = await sandbox.run_command("python3 runner.py", timeout=timeout_seconds)
    if result.exit_code == 124:
        return f"the code ran longer than {timeout_seconds} seconds"
    lines = [line for line in result.stdout.splitlines() if line.startswith(marker)]
    if not lines:
        return (result.stderr.strip().splitlines() or ["the code ended early"])[-1]
    return json.loads(lines[-1].removeprefix(marker))


@dataclass
class SandboxGroup(EnvGroupBuilder):
    """A group whose members each have their own sandbox."""

    sandboxes: list[SandboxInterface] = field(default_factory=list, kw_only=True)

    async def make_sandboxes(self, backend: SandboxBackend, count: int) -> list[SandboxInterface]:
        """Start new sandboxes, which `cleanup` removes."""
        made = [await create_sandbox(backend) for _ in range(count)]
        self.sandboxes += made
        return made

    async def cleanup(self) -> None:
        """Remove the sandboxes, also those of failed attempts."""
        while self.sandboxes:
            await self.sandboxes.pop().cleanup()


def _first_failure(problem: Problem, failures: list[str]) -> str:
    for (arguments, expected), failure in zip(problem.cases, failures, strict=True):
        if failure:
            call = f"solve({', '.join(map(repr, arguments))})"
            return f"{call} should be {expected!r}: {failure}"
    return ""


def _slot() -> asyncio.Semaphore:
    """Allow one program per processor, so that waiting does not count as running time."""
    loop = asyncio.get_running_loop()
    return _slots.setdefault(loop, asyncio.Semaphore(os.cpu_count() or 1))
