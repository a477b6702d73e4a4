"""Grading of mathematical answers, under the names that programs of the Tinker cookbook import."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .expressions import same_expression
from .grading import extract_boxed, has_math_verify, parse_number, require_math_verify

__all__ = [
    "extract_boxed",
    "grade_answer",
    "grade_answer_math_verify",
    "normalize_answer",
    "run_with_timeout_signal",
]

GRADE_SECONDS = 1.0
# Written around an answer, or in it, without changing it.
_DROPPED = re.compile(
    r"\\left|\\right|\\[,!;: ]|\\displaystyle|\\\$|\$|(?<=\d),(?=\d{3}(?:\D|$))|~|\s|\.$"
)
_RENAMED = ((r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"^\circ", ""), (r"^{\circ}", ""))
_WRAPPED = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")


def normalize_answer(answer: str | None) -> str | None:
    r"""The answer without mere typography: spaces, `\left`, `\text{...}`, `x=` before it."""
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
    """Whether an answer equals the reference: as a number, as text, or as an expression.

    Expressions need the package math-verify; without it, differently written ones are wrong.
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
    """Whether math-verify finds the answer equal to the reference.

    Raises:
        ConfigurationError: without the package.
    """
    require_math_verify()
    return same_expression(given_answer, ground_truth, GRADE_SECONDS)


def run_with_timeout_signal(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    timeout_seconds: float = 5,
) -> Any:
    """The result of a call, or None if it takes too long; then it goes on in a thread of its own.

    A thread, not a signal: this works outside the main thread too. For what must be stopped, use a
    process, as `safe_grade` does.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(func(*args, **dict(kwargs or {})))
        except Exception as error:  # raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if errors:
        raise errors[0]
    return results[0] if results else None
