"""What people read is plain English: docstrings, comments, messages, help texts, pages and names.

Each rule is a phrase that makes a reader stop, and the words to use instead. `QUOTED` lists the
places where a phrase is not ours: text for a model to read or write, and words of other software.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
READ = (
    "tinker_cookbook",
    "recipes",
    "examples",
    "docs",
    "skills",
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
SUFFIXES = (".py", ".md", ".html", ".c", ".h")

# Phrase -> what to write. A space also fits a line break.
RULES = {
    r"(?<!\bthere )(?<!\bhere )\b(is|are|was|were|be) no "
    r"(?!longer|more|fewer|less|way|need|later|earlier|older|newer|larger|smaller|better|worse"
    r"|different|further|closer|such thing)\w+": "is not a ...; there is no ...",
    r"\b(needs?|knows?|gives?|makes?|leaves?|says?|takes?) no "
    r"(?!arguments?\b|parameters?\b|options?\b|differences?\b|sense\b|longer\b|mistakes?\b|room\b"
    r"|trace\b|assumptions?\b|claims?\b)\w+": (
        "does not need / know / give / make / leave / say / take"
    ),
    r"\bbesides?\b": "next to; in addition to; also; other than",
    r"\bof (its|their|one's|his|her|your|my) own\b": "its own ...; a separate ...",
    r"\bone's own\b": "your own",
    r"\b(goes|go|going|went|gone) on\b(?! (the|a|top|its|this|that|line|strike)\b)": (
        "continues; happens"
    ),
    r"\bon your word\b": "because you asked for it",
    r"\bfor ever\b": "forever; without end",
    r"\bto the letter\b": "exactly",
    r"\bword for word\b": "verbatim; exactly",
    r"\bone (after|by) the other\b": "in sequence; one at a time",
    r"\bnowhere\b": "not ... anywhere",
    r"\b(and|or|with) the like\b": "and similar ...",
    r"\b(that|which) (is|are) of\b": "that belongs to; whose ... is",
    r"\bwhat (it|they) (is|are) of\b": "name the thing",
    r"\b(is|are) of (the|this|that|its)\b(?! same)": "belongs to; comes from; has",
    r"\bwhat is (there|here|left)\b": "the existing ...; the rest; the remaining ...",
    r"\bmend(s|ed|ing)?\b": "fix; repair",
    r"\bstands? (in(?! for\b)|at|on|once|there|here|under|behind|before|between)\b": (
        "is in; is at; comes before"
    ),
    r"\bl(ies|ie|ay) (in|at|on|under|there|here)\b(?! wait)": "is in; is at",
    r"\b(whence|whereof|thereof|wherein|therein|thereby|thereto|hitherto|upon|lest|thrice)\b": (
        "from which; of it; in it; by this; on; so that ... not"
    ),
    r"\bfor the eye\b": "for display",
    r"\bin (the )?place of\b": "instead of; replacing",
    r"(^|[.:;\n] ?)About what\b": "Estimated ...; approximate ...",
    r"\bas (it|they) (is|are|stands?)(?=[.,;:]|$)": "unchanged",
    r"\b(is|are) to be (?!determined)\w+": "must be; should be",
    r"\bbut for\b": "except for; apart from",
    r"\bin vain\b": "without effect; for nothing",
    r"\bfor want of\b": "because there is no",
    r"\bto be had\b": "available",
    r"\bnothing of (it|them)\b": "none of it; no part of it",
    r"\bas (is|was) meant\b": "as intended",
    r"\blets? go of\b": "release; free",
    r"\bspares (the|it|them|a|whoever)\b": "saves; avoids",
    r"\b(nats|bits|bytes|once) an? (token|parameter|name|row|step|matrix|value|epoch)\b": "per",
}
# The start of a help text that cannot be understood without the option's name.
HELP_START = re.compile(r"(Of|Its|As|The same|That of|Not) ")
HELP_KEYWORDS = ("doc", "help")
HELP_PLAIN = "a noun phrase that can be understood without the option's name"

# (file, phrase) -> whose words they are. A phrase that is not found any more must leave this list.
QUOTED: dict[tuple[str, str], str] = {
    ("recipes/multiplayer_rl/twenty_questions/env.py", "of its own"): "a prompt for the model",
}


class Text(NamedTuple):
    """A piece of text, and the line of its file on which it begins."""

    line: int
    text: str


class Hit(NamedTuple):
    """A phrase that a rule refuses."""

    line: int
    phrase: str
    plain: str


@cache
def compiled_rules() -> tuple[re.Pattern[str], dict[str, str]]:
    """Return one pattern with a named group for each rule, and the plain words of each group."""
    named = {f"rule{index}": rule for index, rule in enumerate(RULES)}
    pattern = "|".join(f"(?P<{name}>{rule})" for name, rule in named.items())
    plain = {name: RULES[rule] for name, rule in named.items()}
    return re.compile(pattern.replace(" ", "[ \n]"), re.IGNORECASE | re.MULTILINE), plain


def find_hits(texts: Iterator[Text]) -> Iterator[Hit]:
    """Yield every refused phrase of some texts."""
    pattern, plain = compiled_rules()
    for line, text in texts:
        text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
        for found in pattern.finditer(text):
            start = found.start() + len(found[0]) - len(found[0].lstrip())
            rule = next(name for name, value in found.groupdict().items() if value is not None)
            phrase = " ".join(found[0].split())
            yield Hit(line + text.count("\n", 0, start), phrase, plain[rule])


def texts_of(path: Path) -> Iterator[Text]:
    """Yield what people read in a file; of a Python file comments, strings and names."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield Text(1, re.sub(r"(?m)^\s*(//|\*)", "", source))
        return
    yield from comments_and_names(source)
    for node in strings(ast.parse(source)):
        yield Text(node.lineno, string_value(node))


def comments_and_names(source: str) -> Iterator[Text]:
    """Yield names as words, and comments; lines of comment that follow each other are one text."""
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and "_" in token.string.strip("_"):
            yield Text(token.start[0], token.string.strip("_").replace("_", " "))
        elif token.type == tokenize.NAME:
            yield Text(token.start[0], token.string.strip("_"))
        if token.type == tokenize.COMMENT:
            if block and token.start[0] == first + len(block):
                block.append(token.string.lstrip("# "))
                continue
            yield Text(first, "\n".join(block))
            first, block = token.start[0], [token.string.lstrip("# ")]
    yield Text(first, "\n".join(block))


def strings(node: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    """Yield string literals, adjacent ones as one; an f-string's parts only with the whole."""
    if isinstance(node, ast.JoinedStr):
        yield node
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from strings(part.value)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from strings(child)


def string_value(node: ast.Constant | ast.JoinedStr) -> str:
    """Return a string's text, with X for every value that is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(
        string_value(part) if isinstance(part, ast.Constant) else "X" for part in node.values
    )


def help_hits(path: Path) -> Iterator[Hit]:
    """Yield help texts that begin with a fragment."""
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in HELP_KEYWORDS:
            for text in strings(node.value):
                if found := HELP_START.match(string_value(text)):
                    yield Hit(text.lineno, f'{node.arg}="{found[0]}', HELP_PLAIN)
                break  # the text's start


def files_of(name: str) -> list[Path]:
    """Return the files under one entry of `READ`."""
    path = ROOT / name
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    return [file for file in found if file.suffix in SUFFIXES and "__pycache__" not in file.parts]


@pytest.mark.parametrize("name", READ)
def test_people_read_plain_english(name: str) -> None:
    problems = []
    for path in files_of(name):
        relative = path.relative_to(ROOT).as_posix()
        for hit in sorted({*find_hits(texts_of(path)), *help_hits(path)}):
            if (relative, hit.phrase.lower()) not in QUOTED:
                problems.append(f"{relative}:{hit.line}: {hit.phrase!r}: write {hit.plain}")
    if problems:
        text = "\n".join([f"{len(problems)} phrases to write plainly:", *problems])
        pytest.fail(text, pytrace=False)


def test_quoted_phrases_are_still_in_their_files() -> None:
    for relative, phrase in QUOTED:
        found = {hit.phrase.lower() for hit in find_hits(texts_of(ROOT / relative))}
        assert phrase in found, f"{relative} does not have {phrase!r} any more: remove it here"


def check(tmp_path: Path, source: str) -> list[tuple[int, str]]:
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    return [hit[:2] for hit in sorted({*find_hits(texts_of(path)), *help_hits(path)})]


@pytest.mark.parametrize(
    ("source", "line", "phrase"),
    [
        ('"""The file lies\nin a folder."""', 1, "lies in"),
        ("# A run that goes\n# on where it ended.", 1, "goes on"),
        ("x = 1\n# one\n# two beside three", 3, "beside"),
        ('raise ValueError(f"{key}={value} is no "\n    f"{kind}")', 1, "is no X"),
        ("f(f\"a {g('needs no mercy')} b\")", 1, "needs no mercy"),
        ("beside = 1", 1, "beside"),
        ("def goes_on_alone(): ...", 1, "goes on"),
        ('x = chz.field(doc="Of sampling.")', 1, 'doc="Of '),
        ('p.add_argument("--x", help="Its own folder.")', 1, 'help="Its '),
        ('"""A.\n\nKept as it is."""', 3, "as it is"),
        ('"""A.\n\n    B.\n\n    What is left is dropped.\n"""', 5, "What is left"),
    ],
)
def test_the_detector_finds(tmp_path: Path, source: str, line: int, phrase: str) -> None:
    assert check(tmp_path, source) == [(line, phrase)]


@pytest.mark.parametrize(
    "source",
    [
        '"""There is no file; the older one is no longer needed."""',
        '"""It takes no arguments and makes no difference."""',
        '"""The tag goes on the first line; a Protocol can stand in for it."""',
        '"""The value is the same as it is in the file."""',
        "upper = side.besieged",
        'x = chz.field(doc="Sampling temperature.")',
        "# noqa: E501",
    ],
)
def test_the_detector_lets_ordinary_english_through(tmp_path: Path, source: str) -> None:
    assert check(tmp_path, source) == []


def test_pages_and_kernels_are_read_whole(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nA row that\nstands in the table.\n", encoding="utf-8")
    assert [hit[:2] for hit in find_hits(texts_of(page))] == [(4, "stands in")]
    kernel = tmp_path / "kernel.c"
    kernel.write_text("int x;\n/* the block\n * of its\n * own */\n", encoding="utf-8")
    assert [hit[:2] for hit in find_hits(texts_of(kernel))] == [(3, "of its own")]
