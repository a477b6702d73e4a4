"""Make untrusted text safe for logs and terminals by escaping control characters."""

from __future__ import annotations

import re

__all__ = ["escape_controls"]

_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # the last 32 of these are the one-byte forms of ESC sequences
    "\u2028\u2029"  # line and paragraph separators
    "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069"  # these change the direction of what follows
    "\ud800-\udfff]"  # halves of pairs, which cannot be written as UTF-8
)


def escape_controls(text: str) -> str:
    r"""Return the text as one line: a newline becomes `\n`, ESC becomes `\x1b`.

    Control characters beyond ASCII become escapes such as `\u009b`, which are also valid JSON.
    """
    return _CONTROLS.sub(_spell_out, text)


def _spell_out(found: re.Match[str]) -> str:
    character = found[0]
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x7F else f"\\u{code:04x}"
