"""docs/troubleshooting.md: its messages are in the code; settings and commands exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.rl_basic import Config as RLConfig
from recipes.sl_basic import Config as SLConfig
from tinker_cookbook import cli
from tinker_cookbook.settings_help import read_settings_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
GAP = "\0"
"""Stands for a value that is inserted into a message."""
NOT_OURS = {"No space left on device."}
"""Text of the operating system inside a message."""
WITH_LIST = {"the local service needs torch, ..., which this environment does not have": "torch,"}
"""Messages whose first inserted value is shown."""


def literals(path: Path) -> Iterator[str]:
    """Yield the text of every string in a module, with gaps for inserted values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
            yield "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[.\d]*[a-z]", GAP, node.value)


def messages_on_the_page() -> list[str]:
    """Return the quoted messages: text in backticks in the first column that has several words."""
    quoted = [text for symptom, *_ in ROWS for text in re.findall(r"`(.*?)`", symptom)]
    quoted += re.findall(r"`(the code of .*?)`", PAGE)
    return [text for text in quoted if " " in text and not text.startswith(("check ", "FILE:"))]


CODE = [
    text
    for folder in ("tinker_cookbook", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for text in literals(path)
]
MESSAGES = messages_on_the_page()


def test_most_rows_quote_a_message():
    assert len(ROWS) > 35
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_is_in_the_code(message: str):
    shown = WITH_LIST.get(message)
    text = message if shown is None else message.replace(shown, "")
    for other in NOT_OURS:
        text = text.replace(other, "...")
    fragments = [re.escape(part.strip()) for part in text.split("...") if part.strip(" ,;")]
    assert fragments
    pattern = re.compile(r"[^\n]*".join(fragments))
    assert any(pattern.search(literal) for literal in CODE), fragments


def test_every_setting_exists():
    known = {*read_settings_of(SLConfig), *read_settings_of(RLConfig), "rollout_error_tolerance"}
    named = set(re.findall(r"`([a-z_]+)=", PAGE))
    assert len(named) > 12
    assert named - known == {"tokenizer"}  # a message quotes it


def test_every_command_and_option_exists():
    commands = set(re.findall(r"`tinker-cookbook (\w+)", PAGE))
    assert commands <= set(cli.find_commands())
    assert len(commands) > 4
