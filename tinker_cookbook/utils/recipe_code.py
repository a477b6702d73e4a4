"""Digests of the running recipe's code, which a later start compares with its own.

Only what the code does is compared: comments, docstrings, texts of `doc=` and the layout of lines
may change freely.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinker_cookbook.utils.durable_files import write_atomically

__all__ = ["CODE_FILE", "code_differences", "compare_code", "write_code"]

CODE_FILE = "code.json"
OUTSIDE = "what stands outside functions and classes"  # also a key of stored files
_Digests = dict[str, str]


def write_code(folder: Path) -> None:
    """Write digests of the running recipe's functions and classes to code.json.

    Nothing is written if the running program is not a recipe, such as an interactive session or an
    installed tool.
    """
    files = {path.name: digests for path, digests in _read_recipe()}
    if files:
        text = json.dumps({"python": _python(), "files": files}, indent=1) + "\n"
        write_atomically(folder / CODE_FILE, text)


def code_differences(folder: Path) -> list[str]:
    """Return how the running recipe differs from the one that a run was started with.

    Returns:
        One line per file. Empty if nothing has changed, or if the digests cannot be compared:
        another version of Python may normalize the same code differently.
    """
    now = {path.name: digests for path, digests in _read_recipe()}
    return _compare_files(_read_digests(folder), (_python(), now))


def compare_code(old: Path, new: Path) -> list[str]:
    """Return how the recipe of one run differs from that of another; lines as above."""
    return _compare_files(_read_digests(old), _read_digests(new))


def _read_digests(folder: Path) -> tuple[str, dict[str, _Digests]]:
    """Return the version of Python and the digests of each file; no files if unknown."""
    try:
        stored = json.loads((folder / CODE_FILE).read_text(encoding="utf-8"))
        return stored["python"], dict(stored["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", {}


def _compare_files(
    old: tuple[str, dict[str, _Digests]], new: tuple[str, dict[str, _Digests]]
) -> list[str]:
    comparable = old[0] == new[0] and old[1] and new[1]
    return _compare(old[1], new[1]) if comparable else []


def _compare(before: dict[str, _Digests], now: dict[str, _Digests]) -> list[str]:
    if sorted(map(repr, before.values())) == sorted(map(repr, now.values())):
        return []  # the same code in a renamed file
    if len(before) == len(now) == 1:
        before = dict(zip(now, before.values(), strict=True))
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, {}), now.get(name, {})
        changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        if not old or not new:
            lines.append(f"{name} is {'gone' if old else 'new'}")
        elif changed:
            lines.append(f"the code of {name} has changed: {', '.join(changed)}")
    return lines


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _read_recipe() -> list[tuple[Path, _Digests]]:
    """Return the recipe's own files: the program, and the files it imports from its folder."""
    program = _program()
    if program is None:
        return []
    path, package = program
    waiting = sorted(path.parent.glob("*.py")) if path.name == "__main__.py" else [path]
    found: dict[Path, _Digests] = {}
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        waiting += _own_imports(tree, file.parent, package)
        found[file] = _digest_parts(tree)
    return sorted(found.items())


def _program() -> tuple[Path, str] | None:
    """Return the file and the package of the running program; None if it is not a recipe."""
    main = sys.modules.get("__main__")
    name = getattr(main, "__file__", None)
    if name is None or not name.endswith(".py"):
        return None
    path = Path(name).resolve()
    if _is_installed(path) and "tinker_cookbook/recipes/" not in path.as_posix():
        return None
    spec = getattr(main, "__spec__", None)
    return path, "" if spec is None else spec.parent or ""


def _is_installed(path: Path) -> bool:
    folders = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(folders) or path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())


def _own_imports(tree: ast.Module, folder: Path, package: str) -> Iterator[Path]:
    """Yield the files in a folder that a file there imports."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [_within(alias.name, package) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level <= 1:
            module = node.module or ""
            start = module if node.level else _within(module, package)
            members = [f"{start}.{alias.name}".strip(".") for alias in node.names]
            names = [start, *(members if start or node.level or module == package else [])]
        for name in filter(None, names):
            file = folder.joinpath(*name.split(".")).with_suffix(".py")
            if file.is_file():
                yield file.resolve()


def _within(name: str, package: str) -> str:
    """Return a module's name relative to its package; empty if it is in another package."""
    if not package:
        return name
    return name.removeprefix(f"{package}.") if name.startswith(f"{package}.") else ""


def _digest_parts(tree: ast.Module) -> _Digests:
    _strip(tree)
    parts: dict[str, list[str]] = {}
    for node in tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        parts.setdefault(node.name if named else OUTSIDE, []).append(ast.unparse(node))
    return {
        name: hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
        for name, texts in sorted(parts.items())
    }


def _strip(tree: ast.AST) -> None:
    """Remove docstrings and the texts that `--help` prints."""
    for node in ast.walk(tree):
        body: list[Any] | None = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            del body[0]
            if not body and not isinstance(node, ast.Module):
                body.append(ast.Pass())
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "doc"]


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
