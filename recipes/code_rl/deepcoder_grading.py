"""Run code against tests in the forms of DeepCoder's data sets.

A test is standard input with the expected output, or a call with the expected result:
`{"input": ..., "output": ..., "testtype": "stdin" | "functional", "metadata": {"func_name": ...}}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.sandbox import SandboxBackend, SandboxInterface, create_sandbox

from .grading import run_in_sandbox

__all__ = [
    "Test",
    "extract_code_from_model",
    "normalize_tests",
    "postprocess_lcb_sample",
    "run_tests_in_sandbox",
    "sandbox_check_correctness",
    "taco_to_lcb_format",
]

Test = Mapping[str, Any]
"""One test, as JSON has it."""
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.S)
# The marker is deleted before the code of the reply runs, so the code cannot forge a verdict.
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
    """Return the last block of code of a reply; None if it has none."""
    blocks = _FENCE.findall(model_response)
    return blocks[-1].rstrip() if blocks else None


def normalize_tests(raw_tests: Any, metadata: Mapping[str, Any] | None = None) -> list[dict]:
    """Return the tests of a row as a list; they may be JSON text, a list, or parallel lists.

    Raises:
        DataFormatError: if they have another form.
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
    """Turn lists `inputs` and `outputs`, with `fn_name` for calls, into one object per test."""
    name = tests.get("fn_name")
    kind = "functional" if name else "stdin"
    return [
        {"input": given, "output": wanted, "testtype": kind, "metadata": {"func_name": name}}
        for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True)
    ]


def postprocess_lcb_sample(sample: Sequence[Test]) -> dict[str, str]:
    """Turn tests into `{"input_output": JSON}` of `inputs`, `outputs`, and `fn_name` for calls."""
    record: dict[str, Any] = {
        "inputs": [test["input"] for test in sample],
        "outputs": [test["output"] for test in sample],
    }
    name = _function_name(sample)
    if name:
        record["fn_name"] = name
    return {"input_output": json.dumps(record)}


async def sandbox_check_correctness(
    sample: Sequence[Test],
    generation: str,
    timeout: int = 6,
    backend: SandboxBackend | str | None = None,
) -> tuple[bool, dict[str, Any]]:
    """Return whether code passes all tests, in a new sandbox.

    Args:
        sample: The tests.
        generation: The code.
        timeout: Time limit for all tests, in seconds.
        backend: Where the code runs; None: on this machine, with limits.

    Returns:
        The verdict, and a dict with the first failure as `error`.
    """
    sandbox = await create_sandbox(backend or SandboxBackend.LOCAL)
    try:
        failure = await run_tests_in_sandbox(sandbox, sample, generation, timeout)
    finally:
        await sandbox.cleanup()
    return not failure, {"error": failure} if failure else {}


async def run_tests_in_sandbox(
    sandbox: SandboxInterface, tests: Sequence[Test], code: str, timeout: int
) -> str:
    """Return the first failure in words; empty if all tests pass."""
    name = _function_name(tests)
    cases = [{"input": _input(test, name), "output": _output(test, name)} for test in tests]
    failures = await run_in_sandbox(sandbox, _RUNNER, code, [name, cases], timeout)
    return failures if isinstance(failures, str) else next(filter(None, failures), "")


def _function_name(tests: Sequence[Test]) -> str:
    for test in tests:
        if test.get("testtype") == "functional":
            return str((test.get("metadata") or {}).get("func_name") or "")
    return ""


def _input(test: Test, name: str) -> Any:
    """Return text for standard input, or the arguments of a call.

    If the arguments are given as text, each line is one JSON value.
    """
    given = test["input"]
    if not name:
        return given if isinstance(given, str) else "\n".join(map(str, given))
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()]
    return given


def _output(test: Test, name: str) -> Any:
    wanted = test["output"]
    if not name:
        return wanted if isinstance(wanted, str) else "\n".join(map(str, wanted))
    return json.loads(wanted) if isinstance(wanted, str) else wanted
