"""Benchmarks whose replies are programs: they run in a sandbox, with tests."""

from __future__ import annotations

import inspect

from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade
from tinker_cookbook.eval.graders.code import run_tests
from tinker_cookbook.sandbox import LocalSandbox, SandboxInterface

__all__ = ["grade_program"]

TEST_SECONDS = 10
"""Time limit of one program with its tests."""


async def grade_program(program: str, tests: str, config: BenchmarkConfig) -> Grade:
    """Run a program with its tests in a new sandbox; the reason of a failure is in the logs."""
    sandbox = await _make_sandbox(config)
    try:
        verdict = await run_tests(sandbox, program, tests, timeout_seconds=TEST_SECONDS)
    finally:
        await sandbox.cleanup()
    return Grade(float(verdict.passed), logs={"reason": verdict.reason})


async def _make_sandbox(config: BenchmarkConfig) -> SandboxInterface:
    if config.sandbox_factory is None:
        return LocalSandbox()
    made = config.sandbox_factory()
    return await made if inspect.isawaitable(made) else made
