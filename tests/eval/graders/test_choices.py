"""Multiple choice, by reply and by likelihood."""

from __future__ import annotations

import pytest

from tinker_cookbook.eval.graders.choices import (
    extract_mcq_answer,
    format_mcq_choices,
    grade_likelihood,
)
from tinker_cookbook.exceptions import DataValidationError


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("**B**", "B"),
        ("B) Paris", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is (C).", "C"),
        ("Answer: **D**", "D"),
        ("The answer is option C", "C"),
        (r"So \boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{A}, no: \boxed{D}", "D"),
        ("It is wrong to say the answer is B; the answer is (D).", "D"),
        ("Some thoughts about A.\n\nC", "C"),
        ("A", "A"),
        ("A. It rains", "A"),
        ("The answer is A", "A"),
        ("The answer is A.", "A"),
        ("A dog barks.", ""),
        ("The answer is A dog.", ""),
        ("The answer is a dog.", ""),
        ("I would choose A because it rains", ""),
        ("A good reason was given. The answer is C.", "C"),
        ("Because", ""),
        ("Both A and B are plausible.", ""),
        ("", ""),
        ("The answer is E.", ""),
    ],
)
def test_the_letter_of_a_reply(reply: str, letter: str) -> None:
    assert extract_mcq_answer(reply) == letter


def test_more_letters_can_be_valid() -> None:
    assert extract_mcq_answer("The answer is (J).", "ABCDEFGHIJ") == "J"


def test_choices_are_written_with_letters() -> None:
    assert format_mcq_choices(["red", "blue"]) == "A. red\nB. blue"


def test_the_normed_choice_divides_by_characters() -> None:
    verdict = grade_likelihood([-4.0, -6.0], ["abcd", "abcdefghij"], expected=1)
    assert (verdict.choice, verdict.acc) == (0, 0.0)  # -4 > -6
    assert (verdict.choice_norm, verdict.acc_norm) == (1, 1.0)  # -1.0 < -0.6


def test_the_first_ending_wins_a_tie() -> None:
    assert grade_likelihood([-2.0, -2.0], ["ab", "cd"], expected=0).acc == 1.0


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataValidationError, match="do not fit"):
        grade_likelihood([-1.0], ["a", "b"], expected=0)
