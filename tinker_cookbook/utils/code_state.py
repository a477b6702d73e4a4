"""The exact code of a run: commit and uncommitted changes of its repositories."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tinker_cookbook.utils.git_rev import git_output

__all__ = ["code_state"]

MAX_DIFF_CHARACTERS = 5_000_000


def code_state(modules: Sequence[str | ModuleType] = ("tinker_cookbook",)) -> str:
    """Describe the git repositories that hold the given modules and the running program.

    Returns:
        One section per repository: folder, HEAD, and `git diff HEAD`. Empty if nothing is under
        version control, as for an installed wheel.
    """
    roots: dict[str, None] = {}
    for folder in [*map(_module_folder, modules), _program_folder()]:
        root = folder and git_output("rev-parse", "--show-toplevel", folder=folder)
        if root:
            roots[root.strip()] = None
    return "".join(_describe_repository(Path(root)) for root in roots)


def _module_folder(module: str | ModuleType) -> Path | None:
    name = module if isinstance(module, str) else module.__name__
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None


def _program_folder() -> Path | None:
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(program).resolve().parent if program else None


def _describe_repository(root: Path) -> str:
    head = (git_output("rev-parse", "HEAD", folder=root) or "no commit").strip()
    diff = git_output("diff", "HEAD", folder=root) or ""
    if len(diff) > MAX_DIFF_CHARACTERS:
        diff = diff[:MAX_DIFF_CHARACTERS] + f"\n# cut after {MAX_DIFF_CHARACTERS} characters\n"
    return f"# {root}\n# HEAD {head}\n{diff}\n"
