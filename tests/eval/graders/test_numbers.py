"""The last number of a reply."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tinker_cookbook.eval.graders.numbers import check_gsm8k, extract_number, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("First 12, then 7. The answer is 19.", "19"),
        ("That is $1,234.50.", "$1,234.50"),
        ("10 - 5", "5"),
        ("3-1", "1"),
        ("the change is -4", "-4"),
        ("- 5 apples", "5"),
        ("50% of them", "50%"),
        ("3/4 of it", "3/4"),
        ("x2 and y3", ""),
        ("none", ""),
        ("", ""),
        (".5 metres", ".5"),
    ],
)
def test_the_last_number_is_found(text: str, number: str) -> None:
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", Fraction(1234)),
        ("$3.50", Fraction(7, 2)),
        ("18.00", Fraction(18)),
        ("\u22123", Fraction(-3)),
        ("3/4", Fraction(3, 4)),
        ("1/0", None),
        ("1e999999999", None),
        ("many", None),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction | None) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("reply", "expected", "verdict"),
    [
        ("2 + 3 = 5. The answer is 5.", "5", True),
        ("#### 5", "5", True),
        (r"So \boxed{18} dollars, for 3 days.", "18", True),
        (r"\boxed{17}. No, \boxed{18}.", "18", True),
        (r"\boxed{18} was wrong; \boxed{17}", "18", False),
        ("The answer is $1,234.", "1234", True),
        ("The answer is 18.00 dollars", "18", True),
        ("5 is the answer, from 3 parts", "5", False),
        ("15", "5", False),
        ("-5", "5", False),
        ("I do not know", "5", False),
        ("", "5", False),
    ],
)
def test_gsm8k_replies(reply: str, expected: str, verdict: bool) -> None:
    assert check_gsm8k(reply, expected) is verdict
