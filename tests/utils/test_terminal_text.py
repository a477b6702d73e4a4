"""What others wrote becomes one line of visible characters."""

import json
import unicodedata

import pytest

from tinker_cookbook.utils.terminal_text import escape_controls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Zürich, 東京, 🙂", "plain, Zürich, 東京, 🙂"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("\x9b31m\x85\x7f", r"\u009b31m\u0085\u007f"),
        ("left\u202eright\u2028line", r"left\u202eright\u2028line"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_what_moves_the_cursor_is_spelled_out(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


def test_no_control_character_is_left() -> None:
    everything = "".join(map(chr, range(0x11000)))
    left = {c for c in escape_controls(everything) if unicodedata.category(c) in ("Cc", "Cs", "Zl")}
    assert not left


def test_json_stays_the_same_json() -> None:
    value = {"a": "\x1b\n\x7f\x9b\u2028\u202e ü"}
    written = escape_controls(json.dumps(value, ensure_ascii=False))
    assert json.loads(written) == value
    assert "ü" in written
