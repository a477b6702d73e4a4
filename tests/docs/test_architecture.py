"""docs/architecture.md names modules that exist and counts their lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("tinker_cookbook", "recipes")
    for path in (ROOT / folder).rglob("*")
    if "__pycache__" not in path.parts
]
ROWS = re.findall(r"^\| (an? .*?) \| (.*?) \| ([\d,]+) \|$", PAGE, re.M)
NOT_MODULES = {"begin", "forward_backward", "optim_step", "submit_ahead", "seq_id", "tinker"}
"""Names in the text that are not modules: methods, settings and packages."""


def find(name: str) -> list[str]:
    """Return the files that a name on the page stands for, such as `runs/` or `training/run`."""
    name = name.rstrip("/")
    whole = {name, f"{name}.py", f"tinker_cookbook/{name}", f"tinker_cookbook/{name}.py"}
    exact = [path for path in FILES if path in whole]
    return exact or [path for path in FILES if path.endswith((f"/{name}", f"/{name}.py"))]


def module_names() -> list[str]:
    """Return the names in backticks that are lower-case paths: modules, files and folders."""
    names = re.findall(r"`([a-z][a-z_/]*(?:\.py|\.c)?)`", PAGE)
    return sorted(set(names) - NOT_MODULES)


def test_every_module_exists():
    names = module_names()
    assert len(names) > 60
    assert not [name for name in names if not find(name) and not (ROOT / name).exists()]


def read_page(target: str) -> str:
    """Return the text of a page, or of the section that `page.md#title-of-the-section` names."""
    name, _, anchor = target.partition("#")
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    if not anchor:
        return page
    sections = re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, re.M)
    titles = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-"): text for title, text in sections
    }
    return titles[anchor]


@pytest.mark.parametrize(("task", "read", "lines"), ROWS, ids=[row[0] for row in ROWS])
def test_the_line_counts_are_those_of_the_files(task: str, read: str, lines: str):
    pages = [read_page(target) for target in re.findall(r"\]\((.*?)\)", read)]
    modules = [find(name) for name in re.findall(r"`(.*?)`", read)]
    assert all(len(found) == 1 for found in modules), modules
    texts = pages + [(ROOT / found[0]).read_text(encoding="utf-8") for found in modules]
    total = sum(len(text.splitlines()) for text in texts)
    stated = int(lines.replace(",", ""))
    assert abs(stated - total) <= 0.1 * total, f"{task}: {total} lines, the page says {stated}"
