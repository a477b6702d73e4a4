"""What the README promises: its commands exist, its code runs, its links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from tinker_cookbook import cli
from tinker_cookbook.commands.parts.recipe_files import find_recipes

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def shell_lines() -> list[list[str]]:
    lines = [
        line for page in PAGES for b in blocks(page.read_text(), "bash") for line in b.splitlines()
    ]
    commands = [part for line in lines for part in line.split("&&")]
    return [words for command in commands if (words := shlex.split(command, comments=True))]


def test_both_commands_make_their_environment_and_pin_torch():
    for mark in ("first command", "test command"):
        [command] = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", README)
        assert command.startswith(
            "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt"
        )


def files_that_pages_show() -> set[str]:
    """Return the names of files that readers write themselves; a block's first line names it."""
    shown = [b for page in PAGES for b in blocks(page.read_text("utf-8"), "python")]
    return {name for b in shown for name in re.findall(r"\A# (\w+\.py)$", b, re.M)}


@pytest.mark.parametrize("words", shell_lines(), ids=" ".join)
def test_every_command_named_exists(words: list[str]):
    if words[0] == "tinker-cookbook":
        assert words[1] in cli.find_commands()
    elif "-m" in words and words[words.index("-m") + 1].startswith("recipes."):
        name = words[words.index("-m") + 1].removeprefix("recipes.")
        file = ROOT / "recipes" / f"{name.replace('.', '/')}.py"
        assert name in find_recipes() or file.is_file()
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() or words[1] in files_that_pages_show()


def test_the_tables_list_recipes_that_exist_and_every_example():
    rows = set(re.findall(r"^\| `([\w.]+)` \|", README, re.M))
    assert {row for row in rows if not row.endswith(".py")} <= set(find_recipes())
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert {row for row in rows if row.endswith(".py")} == examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        linked = (page.parent / target).resolve() if target else page
        assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_python_blocks_compile():
    code = blocks(README, "python")
    assert code
    for block in code:
        ast.parse(block)
