"""Numbers in replies: the last number of a reply against a reference."""

from __future__ import annotations

import re
from fractions import Fraction

from tinker_cookbook.eval.graders.math_answers import extract_boxed

__all__ = ["check_gsm8k", "extract_gsm8k_answer", "extract_number", "parse_number"]

_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:\$\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?%?"
    r"|(?<![\w.])[-+\u2212]?\$?\.\d+%?"
)
_MAX_DIGITS = 400


def extract_number(text: str) -> str:
    """Return the last number of a text as it is written; an empty text if there is none.

    Digits inside a word (`x2`) do not count. A minus sign counts only if no digit or letter is
    directly before it, so that `3-1` has the numbers 3 and 1.
    """
    found = _NUMBER.findall(text)
    return found[-1].strip() if found else ""


def parse_number(text: str) -> Fraction | None:
    """Read `1,234`, `$3.50`, `-2`, `3/4` or `50%` (the number 50) exactly; None for other texts."""
    plain = re.sub(r"[\s,$%]|\\[$%!,;]", "", text).replace("\u2212", "-").rstrip(".")
    if not plain or len(plain) > _MAX_DIGITS or "e" in plain.lower() or "_" in plain:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def extract_gsm8k_answer(text: str) -> str:
    """Return the answer after the last `####` of a GSM8K solution, or else the last number."""
    _, marker, answer = text.rpartition("####")
    if marker and answer.strip():
        return extract_number(answer.strip().splitlines()[0])
    return extract_number(text)


def check_gsm8k(response: str, expected: str) -> bool:
    r"""Return whether the answer of a reply is the expected number.

    The answer is the number in the last `\boxed{...}` if that holds one, or else the number after
    the last `####`, or else the last number of the reply.
    """
    wanted = parse_number(expected)
    if wanted is None:
        return False
    boxed = extract_boxed(response)
    number = extract_number(boxed) if boxed else ""
    return parse_number(number or extract_gsm8k_answer(response)) == wanted
