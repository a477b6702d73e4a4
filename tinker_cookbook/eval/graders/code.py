"""Programs in replies: find the code, and run it with its tests in a sandbox."""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, NamedTuple

from tinker_cookbook.exceptions import SandboxError

if TYPE_CHECKING:
    from tinker_cookbook.sandbox import SandboxInterface

__all__ = ["CodeVerdict", "build_humaneval_program", "extract_python_code", "run_tests"]

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_SHOWN_CHARACTERS = 500


class CodeVerdict(NamedTuple):
    """The outcome of a program with tests."""

    passed: bool
    reason: str
    """Empty, or the last lines of the error."""


def extract_python_code(text: str, entry_point: str | None = None) -> str:
    """Return the program of a reply.

    The last fenced block that defines `entry_point`, or else the last block marked as Python, or
    else the last block, or else the whole text. A block that is not closed ends with the text.
    """
    blocks = [(match[1].lower(), match[2]) for match in _BLOCK.finditer(text)]
    if not blocks:
        return text
    if entry_point is not None:
        for _, code in reversed(blocks):
            if _defines(code, entry_point):
                return code
    marked = [code for language, code in blocks if language in ("python", "python3", "py")]
    return marked[-1] if marked else blocks[-1][1]


def build_humaneval_program(prompt: str, reply: str, entry_point: str) -> str:
    """Return the program that a HumanEval reply makes, without its tests.

    The prompt comes first, for its imports and helper functions. A reply that defines the function
    replaces it; any other reply continues the prompt's function.
    """
    code = extract_python_code(reply, entry_point)
    if _defines(code, entry_point):
        return f"{prompt}\n\n{code}\n"
    # A chat format strips the spaces before the first line.
    indented = code if code[:1] in (" ", "\t", "\n") else f"    {code}"
    return f"{prompt}{indented}\n"


async def run_tests(
    sandbox: SandboxInterface, program: str, tests: str, *, timeout_seconds: int = 10
) -> CodeVerdict:
    """Run a program and then its tests; passed if the end of the tests is reached.

    The end prints a random word, so a program that exits early with status 0 does not pass.

    Raises:
        SandboxError: if the sandbox itself fails.
    """
    word = secrets.token_hex(16)
    source = f"{program}\n\n{tests}\n\nprint({word!r})\n"
    written = await sandbox.write_file("solution.py", source)
    if written.exit_code != 0:
        raise SandboxError(f"solution.py cannot be written to the sandbox: {written.stderr}")
    done = await sandbox.run_command("python solution.py", timeout=timeout_seconds)
    if done.exit_code == 0 and done.stdout.rstrip().endswith(word):
        return CodeVerdict(True, "")
    if done.exit_code == 124:
        return CodeVerdict(False, f"no end after {timeout_seconds} seconds")
    if done.exit_code == 0:
        return CodeVerdict(False, "the program ended before its tests")
    error = done.stderr.strip()[-_SHOWN_CHARACTERS:]
    return CodeVerdict(False, error or f"exit status {done.exit_code}")


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", code, re.MULTILINE) is not None
