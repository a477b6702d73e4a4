r"""Mathematical answers in `\boxed{...}`, compared as numbers, as text, or as expressions."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from fractions import Fraction

__all__ = ["check_math", "extract_boxed", "normalize_math", "same_expression"]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DROPPED = re.compile(
    r"\\left|\\right|\\[,!;: ]|\\displaystyle|\\\$|\$|(?<=\d),(?=\d{3}(?:\D|$))|~|\s"
)
_RENAMED = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"^\circ", ""), (r"^{\circ}", ""))
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_FRACTION = re.compile(r"([-+]?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_MAX_CHARACTERS = 2000
_TOO_LARGE = re.compile(r"\d{400}|(?:\^|\*\*)\s*[{(]*\s*[-+]?\s*\d{4}|\d{4}[\s)}]*!|![\s)}]*!")
_COMPARE_SECONDS = 20.0
"""Importing math-verify takes some of this time."""
_PROGRAM = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from math_verify import parse, verify
wanted, given = json.load(sys.stdin)
box = lambda text: parse(r"\\boxed{" + text + "}", parsing_timeout=None)
print(bool(verify(box(wanted), box(given), timeout_seconds=None)))
"""


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, including inner braces.

    None if there is no box, or if the last one is not closed (a reply that was cut).
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    depth, begin = 1, starts[-1].end()
    for index in range(begin, len(text)):
        if text[index - 1] == "\\":  # \{ and \} are characters, not groups
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index].strip()
    return None


def normalize_math(answer: str) -> str:
    r"""Remove typography from an answer: spaces, `\left`, `\text{...}`, `$`, a leading `x=`."""
    text = _TEXT.sub(r"\1", answer)
    for written, plain in _RENAMED:
        text = text.replace(written, plain)
    text = _DROPPED.sub("", text).rstrip(".")
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"^[a-zA-Z]=", "", text)


def check_math(response: str, expected: str) -> bool:
    r"""Return whether the last `\boxed{...}` of a reply equals the reference.

    Numbers are compared exactly, other answers as normalised text, and then as expressions if the
    package math-verify is installed; without it an expression in another form counts as wrong.
    """
    given = extract_boxed(response)
    if given is None or not given:
        return False
    plain, wanted = normalize_math(given), normalize_math(expected)
    if plain == wanted:
        return True
    first, second = _value(plain), _value(wanted)
    if first is not None and second is not None:
        return first == second
    return same_expression(given, expected)


def same_expression(given: str, expected: str) -> bool:
    """Return whether math-verify finds two expressions equal, in a separate process.

    False if the package is missing, or the comparison takes too much time or memory.
    """
    if importlib.util.find_spec("math_verify") is None:
        return False
    if any(len(text) > _MAX_CHARACTERS or _TOO_LARGE.search(text) for text in (given, expected)):
        return False
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM],
            input=json.dumps([expected, given]),
            capture_output=True,
            text=True,
            timeout=_COMPARE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.strip() == "True"


def _value(plain: str) -> Fraction | None:
    r"""Read a normalised `12`, `0.5`, `3/4` or `\frac{3}{4}`; None for other texts."""
    text = plain.removesuffix(r"\%").removesuffix("%")
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}" if fraction[3][0] != "-" else ""
    if not re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:/\d+)?", text) or len(text) > 400:
        return None
    try:
        return Fraction(text) if "/" not in text else _ratio(text)
    except (ValueError, ZeroDivisionError):
        return None


def _ratio(text: str) -> Fraction:
    above, below = text.split("/")
    return Fraction(above) / Fraction(below)
