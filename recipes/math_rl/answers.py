"""Find the answer in a reply, and compare it with the reference."""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction

from tinker_cookbook.exceptions import ConfigurationError, EvalGradingError

from .expressions import same_expression

MAX_EXPONENT = 400
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s*/\s*\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


class AnswerNotFound(EvalGradingError, ValueError):
    """A reply does not contain an answer."""


def extract_boxed(text: str) -> str:
    r"""Return the content of the last `\boxed{...}`, including inner braces.

    Raises:
        AnswerNotFound: if the text has no box, or the box is not closed.
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        raise AnswerNotFound(r"the reply has no \boxed{...}")
    depth = 0
    for index in range(start + len(r"\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len(r"\boxed{") : index].strip()
    raise AnswerNotFound(r"the reply's last \boxed{ is not closed")


def extract_gsm8k_final_answer(text: str) -> str:
    """Return the text after `####` in a GSM8K solution.

    Raises:
        AnswerNotFound: if the text has no such answer.
    """
    _, marker, answer = text.rpartition("####")
    if not marker or not answer.strip():
        raise AnswerNotFound("the text has no #### answer")
    return answer.strip().splitlines()[0].strip()


def last_number(text: str) -> str:
    """Return the last number of a text.

    Raises:
        AnswerNotFound: if the text has no number.
    """
    found = NUMBER.findall(text)
    if not found:
        raise AnswerNotFound("the reply has no number")
    return found[-1]


def parse_number(text: str) -> Fraction | None:
    """Read `1,234`, `$3.50`, `50%`, `3/4` or `1e3` as an exact number; None for other texts.

    A number with an exponent beyond `MAX_EXPONENT` would fill the memory, so it gives None.
    """
    plain = re.sub(r"[\s,$]|\\[$%!,;]|\\text\{[^}]*\}", "", text).rstrip(".")
    plain = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", plain)
    exponent = re.search(r"e([-+]?\d+)%?$", plain, re.IGNORECASE)
    if exponent and (len(exponent[1]) > 5 or abs(int(exponent[1])) > MAX_EXPONENT):
        return None
    percent = plain.endswith("%")
    try:
        value = Fraction(plain.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


def safe_grade(
    given_answer: str, ground_truth: str, grader: str = "numeric", timeout: float = 1.0
) -> bool:
    """Return whether an answer equals the reference.

    Args:
        given_answer: The answer found in the reply.
        ground_truth: The reference.
        grader: `numeric` compares numbers exactly and other answers as text; `math_verify` also
            compares expressions, and needs the package math-verify; `sympy` ignores typography,
            and compares expressions if that package is installed.
        timeout: Seconds of processor time. Expressions are compared in a separate process; a
            comparison that takes longer, or a lot of memory, counts as wrong.
    """
    given, wanted = parse_number(given_answer), parse_number(ground_truth)
    if given is not None and wanted is not None:
        return given == wanted
    if re.sub(r"\s", "", given_answer) == re.sub(r"\s", "", ground_truth):
        return True
    if grader == "numeric":
        return False
    if grader == "sympy":
        from .math_grading import grade_answer

        return grade_answer(given_answer, ground_truth, timeout)
    if grader != "math_verify":
        raise ConfigurationError(
            f"grader={grader!r} is unknown; use numeric, math_verify or sympy."
        )
    require_math_verify()
    return same_expression(given_answer, ground_truth, timeout)


def has_math_verify() -> bool:
    """Return whether the package that compares expressions is installed."""
    return importlib.util.find_spec("math_verify") is not None


def require_math_verify() -> None:
    """Check that math-verify is installed.

    Raises:
        ConfigurationError: if it is not.
    """
    if not has_math_verify():
        raise ConfigurationError(
            "grader=math_verify needs the package math-verify, which is not installed; run "
            "`pip install math-verify`, or use grader=numeric."
        )
