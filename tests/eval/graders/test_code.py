"""Programs in replies, run in the local sandbox."""

from __future__ import annotations

import pytest

from tinker_cookbook.eval.graders.code import (
    build_humaneval_program,
    extract_python_code,
    run_tests,
)
from tinker_cookbook.sandbox import LocalSandbox

PROMPT = 'import math\n\n\ndef double(x):\n    """Return 2 x."""\n'
TESTS = "assert double(2) == 4\nassert double(0) == 0"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("Text\n```\nx = 1\n```\nmore", "x = 1\n"),
        ("```python\nx = 1\n```\nOutput:\n```\n1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nBetter:\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_code_of_a_reply(reply: str, code: str) -> None:
    assert extract_python_code(reply) == code


def test_the_block_with_the_function_is_preferred() -> None:
    reply = "```python\ndef f():\n    return 1\n```\nUse it:\n```python\nprint(f())\n```"
    assert "def f" in extract_python_code(reply, "f")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reply", "passed", "reason"),
    [
        ("    return 2 * x", True, ""),
        ("return 2 * x", True, ""),
        ("```python\ndef double(x):\n    return 2 * x\n```", True, ""),
        ("```python\ndef double(x):\n    return x\n```", False, "AssertionError"),
        ("```python\ndef double(x)\n```", False, "SyntaxError"),
        ("```python\ndef double(x):\n    raise SystemExit(0)\n```", False, "before its tests"),
        ("```python\ndef double(x):\n    while True: pass\n```", False, "no end after 1 seconds"),
        ("I cannot do that.", False, "Error"),
    ],
)
async def test_replies_are_run_with_their_tests(reply: str, passed: bool, reason: str) -> None:
    sandbox = LocalSandbox()
    try:
        program = build_humaneval_program(PROMPT, reply, "double")
        verdict = await run_tests(sandbox, program, TESTS, timeout_seconds=1)
    finally:
        await sandbox.cleanup()
    assert verdict.passed is passed
    assert reason in verdict.reason
