"""Benchmarks whose replies are programs: they run in a sandbox, with tests."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution

from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade
from tinker_cookbook.eval.graders.code import run_tests
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.sandbox import LocalSandbox, SandboxInterface

__all__ = ["SandboxFactory", "SandboxMixin", "get_sandbox_factory", "grade_program"]

SandboxFactory = Callable[[], SandboxInterface | Awaitable[SandboxInterface]]

TEST_SECONDS = 10
"""Time limit of one program with its tests."""


async def grade_program(program: str, tests: str, config: BenchmarkConfig) -> Grade:
    """Run a program with its tests in a new sandbox; the reason of a failure is in the logs."""
    sandbox = await _make_sandbox(config.sandbox_factory)
    try:
        verdict = await run_tests(sandbox, program, tests, timeout_seconds=TEST_SECONDS)
    finally:
        await sandbox.cleanup()
    return Grade(float(verdict.passed), logs={"reason": verdict.reason})


def get_sandbox_factory(
    config: BenchmarkConfig, *, packages: Sequence[str] | None = None
) -> SandboxFactory:
    """Return what makes the sandboxes of an evaluation: the config's factory, or local sandboxes.

    Args:
        config: The settings of the evaluation.
        packages: Packages that the programs import. A local sandbox uses those of this Python.

    Raises:
        ConfigurationError: if a local sandbox lacks a package.
    """
    if config.sandbox_factory is not None:
        return config.sandbox_factory
    missing = [name for name in packages or () if not _is_installed(name)]
    if missing:
        raise ConfigurationError(
            f"the programs need {', '.join(missing)}, which the local sandbox does not have; run "
            f"`pip install {' '.join(missing)}`, or set sandbox_factory."
        )
    return LocalSandbox


class SandboxMixin:
    """An environment that owns a sandbox; `cleanup` removes it."""

    sandbox: SandboxInterface | None = None

    def keep_sandbox(self, factory: SandboxFactory | None) -> SandboxFactory:
        """Return a factory whose newest sandbox is `sandbox`."""

        async def make() -> SandboxInterface:
            self.sandbox = await _make_sandbox(factory)
            return self.sandbox

        return make

    async def cleanup(self) -> None:
        """Remove the sandbox, if there is one."""
        sandbox, self.sandbox = self.sandbox, None
        if sandbox is not None:
            await sandbox.cleanup()


def _is_installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


async def _make_sandbox(factory: SandboxFactory | None) -> SandboxInterface:
    made = LocalSandbox() if factory is None else factory()
    return await made if inspect.isawaitable(made) else made
