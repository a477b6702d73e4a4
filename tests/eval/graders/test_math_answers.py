"""Boxed answers: which box, and when two answers are equal."""

from __future__ import annotations

import importlib.util

import pytest

from tinker_cookbook.eval.graders.math_answers import check_math, extract_boxed

HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} is wrong, so \boxed{2}", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right\}}", r"\left\{ x \right\}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{3", None),
        ("no box", None),
    ],
)
def test_the_last_box_counts_with_its_inner_braces(text: str, content: str | None) -> None:
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    ("reply", "expected", "verdict"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\frac{1}{2}}", "12", False),
        (r"\boxed{\dfrac{1}{2}}", r"\frac12", True),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{5\text{ cm}}", r"5 \text{cm}", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        (r"\boxed{-3}", "3", False),
        (r"\boxed{}", "3", False),
        ("The answer is 3.", "3", False),
    ],
)
def test_answers_are_compared_by_value(reply: str, expected: str, verdict: bool) -> None:
    assert check_math(reply, expected) is verdict


@pytest.mark.skipif(not HAS_MATH_VERIFY, reason="needs math-verify")
def test_expressions_in_another_form_are_equal() -> None:
    assert check_math(r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}")
    assert not check_math(r"\boxed{x + 1}", "x + 2")


def test_a_huge_power_is_wrong_at_once() -> None:
    assert not check_math(r"\boxed{9^{99999999}}", "7")
