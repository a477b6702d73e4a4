"""Grading of mathematical answers, as programs of the Tinker cookbook import it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .answers import extract_boxed, has_math_verify, parse_number, require_math_verify
from .expressions import same_expression

__all__ = [
    "extract_boxed",
    "grade_answer",
    "grade_answer_math_verify",
    "normalize_answer",
    "run_with_timeout_signal",
]

T = TypeVar("T")
GRADE_SECONDS = 1.0
# Parts of an answer that do not change it.
_DROPPED = re.compile(
    r"\\left|\\right|\\[,!;: ]|\\displaystyle|\\\$|\$|(?<=\d),(?=\d{3}(?:\D|$))|~|\s|\.$"
)
_RENAMED = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"^\circ", ""), (r"^{\circ}", ""))
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")


def normalize_answer(answer: str | None) -> str | None:
    r"""Remove typography from an answer: spaces, `\left`, `\text{...}`, a leading `x=`."""
    if answer is None:
        return None
    text = _WRAPPED.sub(r"\1", answer)
    for written, plain in _RENAMED:
        text = text.replace(written, plain)
    text = _DROPPED.sub("", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"^[a-zA-Z]=", "", text)


def grade_answer(
    given_answer: str | None, ground_truth: str, seconds: float = GRADE_SECONDS
) -> bool:
    """Return whether an answer equals the reference, as a number, as text, or as an expression.

    Without the package math-verify, an expression that is written differently counts as wrong.
    """
    if given_answer is None:
        return False
    given, wanted = parse_number(given_answer), parse_number(ground_truth)
    if given is not None and wanted is not None:
        return given == wanted
    plain = normalize_answer(given_answer)
    if plain and plain == normalize_answer(ground_truth):
        return True
    return has_math_verify() and same_expression(given_answer, ground_truth, seconds)


def grade_answer_math_verify(given_answer: str, ground_truth: str) -> bool:
    """Return whether math-verify finds the answer equal to the reference.

    Raises:
        ConfigurationError: if the package is not installed.
    """
    require_math_verify()
    return same_expression(given_answer, ground_truth, GRADE_SECONDS)


def run_with_timeout_signal(
    func: Callable[..., T],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    timeout_seconds: float = 5,
) -> T | None:
    """Return the result of a call, or None if it takes too long.

    The call runs in a thread, so this works outside the main thread too. A call that takes too
    long continues in the background; to stop it, use a process, as `safe_grade` does.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(func(*args, **dict(kwargs or {})))
        except Exception as error:  # raised again in the waiting thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None
