"""Run code against tests as data sets give them, for programs of the Tinker cookbook.

A test is standard input with the expected output, or a call with the expected result:
`{"input": ..., "output": ..., "testtype": "stdin" | "functional", "metadata": {"func_name": ...}}`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.sandbox import SandboxBackend, SandboxInterface, create_sandbox

__all__ = [
    "extract_code_from_model",
    "normalize_tests",
    "postprocess_lcb_sample",
    "run_tests_in_sandbox",
    "sandbox_check_correctness",
    "taco_to_lcb_format",
]

_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.S)
# The marker is gone from the disk before the reply's code runs, so that it cannot print a verdict.
_RUNNER = """
import contextlib, io, json, os, sys
with open("cases.json") as file:
    marker, name, cases = json.load(file)
os.remove("cases.json")
with open("solution.py") as file:
    source = file.read()

def lines(text):
    return [line.rstrip() for line in str(text).strip().splitlines()]

def call(case):
    scope = {"__name__": "solution"}
    exec(compile(source, "solution.py", "exec"), scope)
    owner = scope if name in scope else {name: getattr(scope["Solution"](), name)}
    found = owner[name](*case["input"])
    found = json.loads(json.dumps(found))
    return "" if found in (case["output"], [case["output"]]) or [found] == case["output"] else (
        f"returned {found!r}, not {case['output']!r}")

def pipe(case):
    printed = io.StringIO()
    sys.stdin = io.StringIO(case["input"])
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        exec(compile(source, "solution.py", "exec"), {"__name__": "__main__"})
    found = printed.getvalue()
    return "" if lines(found) == lines(case["output"]) else (
        f"printed {found[:100]!r}, not {str(case['output'])[:100]!r}")

results = []
for case in cases:
    try:
        results.append((call if name else pipe)(case))
    except BaseException as error:
        results.append(f"raised {type(error).__name__}: {error}")
    if results[-1]:
        break
sys.__stdout__.write("\\n" + marker + json.dumps([result[:300] for result in results]))
sys.__stdout__.flush()
os._exit(0)
"""


def extract_code_from_model(model_response: str) -> str | None:
    """The last block of code of a reply, None without one."""
    blocks = _FENCE.findall(model_response)
    return blocks[-1].rstrip() if blocks else None


def normalize_tests(raw_tests: Any, metadata: Mapping[str, Any] | None = None) -> list[dict]:
    """The tests of a row as a list, from JSON text, a list, or lists of inputs and outputs.

    Raises:
        DataFormatError: if they are none of these.
    """
    tests = json.loads(raw_tests) if isinstance(raw_tests, str) else raw_tests
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        tests = taco_to_lcb_format(tests)
    if isinstance(tests, Mapping):
        tests = [tests]
    if not isinstance(tests, Sequence) or not all(isinstance(test, Mapping) for test in tests):
        raise DataFormatError(
            f"tests of type {type(tests).__name__} cannot be read; give a list of objects with "
            "input and output, or an object with the lists inputs and outputs."
        )
    name = (metadata or {}).get("func_name")
    shared = {"metadata": {"func_name": name}, "testtype": "functional"} if name else {}
    return [{**shared, **test} for test in tests]


def taco_to_lcb_format(tests: Mapping[str, Any]) -> list[dict]:
    """Lists `inputs` and `outputs`, with `fn_name` for calls, as one object per test."""
    name = tests.get("fn_name")
    kind = "functional" if name else "stdin"
    return [
        {"input": given, "output": wanted, "testtype": kind, "metadata": {"func_name": name}}
        for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True)
    ]


def postprocess_lcb_sample(sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tests as `{"input_output": JSON}` with `inputs`, `outputs` and, for calls, `fn_name`."""
    record: dict[str, Any] = {
        "inputs": [test["input"] for test in sample],
        "outputs": [test["output"] for test in sample],
    }
    name = _function_name(sample)
    if name:
        record["fn_name"] = name
    return {"input_output": json.dumps(record)}


async def sandbox_check_correctness(
    sample: Sequence[Mapping[str, Any]],
    generation: str,
    timeout: int = 6,
    backend: SandboxBackend | str | None = None,
) -> tuple[bool, dict[str, Any]]:
    """Whether code passes all tests, in a sandbox of its own.

    Args:
        sample: The tests.
        generation: The code.
        timeout: Seconds for all tests.
        backend: Where the code runs; None: on this machine, under limits.

    Returns:
        The verdict, and `error` with the first failure.
    """
    sandbox = await create_sandbox(backend or SandboxBackend.LOCAL)
    try:
        failure = await run_tests_in_sandbox(sandbox, sample, generation, timeout)
    finally:
        await sandbox.cleanup()
    return not failure, {"error": failure} if failure else {}


async def run_tests_in_sandbox(
    sandbox: SandboxInterface, tests: Sequence[Mapping[str, Any]], code: str, timeout: int
) -> str:
    """The first failure in words; empty if all tests pass."""
    marker = secrets.token_hex(16)
    name = _function_name(tests)
    cases = [{"input": _input(test, name), "output": _output(test, name)} for test in tests]
    await sandbox.write_file("solution.py", code)
    await sandbox.write_file("runner.py", _RUNNER)
    await sandbox.write_file("cases.json", json.dumps([marker, name, cases]))
    result = await sandbox.run_command("python3 runner.py", timeout=timeout)
    if result.exit_code == 124:
        return f"the code ran longer than {timeout} seconds"
    lines = [line for line in result.stdout.splitlines() if line.startswith(marker)]
    if not lines:
        return (result.stderr.strip().splitlines() or ["the code ended early"])[-1]
    return next(filter(None, json.loads(lines[-1].removeprefix(marker))), "")


def _function_name(tests: Sequence[Mapping[str, Any]]) -> str:
    for test in tests:
        if test.get("testtype") == "functional":
            return str((test.get("metadata") or {}).get("func_name") or "")
    return ""


def _input(test: Mapping[str, Any], name: str) -> Any:
    """Text for standard input; for a call a list of arguments, one JSON value a line if text."""
    given = test["input"]
    if not name:
        return given if isinstance(given, str) else "\n".join(map(str, given))
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()]
    return given


def _output(test: Mapping[str, Any], name: str) -> Any:
    wanted = test["output"]
    if not name:
        return wanted if isinstance(wanted, str) else "\n".join(map(str, wanted))
    return json.loads(wanted) if isinstance(wanted, str) else wanted
