"""Ranges: which numbers they hold, and how error messages describe them."""

from types import SimpleNamespace

import pytest

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import INT32, SAMPLING, Range, check_ranges


@pytest.mark.parametrize(
    ("accepted", "inside", "outside", "text"),
    [
        (Range(0, 1), [0, 0.5, 1], [-0.1, 1.1], " from 0 up to 1"),
        (Range(0, 1, excludes_lowest=True), [0.1, 1], [0, 0.0], " above 0 up to 1"),
        (Range(0, 1, excludes_highest=True), [0, 0.9], [1, 1.0], " from 0 to less than 1"),
        (Range(0), [0, 1e300], [-1], " of 0 or greater"),
        (Range(), [-1e300, 0], [float("nan")], ""),
        (INT32, [2**31 - 1], [2**31, -1], " from 0 up to 2147483647"),
    ],
)
def test_ranges(accepted: Range, inside: list, outside: list, text: str) -> None:
    assert all(number in accepted for number in inside)
    assert not any(number in accepted for number in outside)
    assert str(accepted) == text


def test_the_name_and_the_value_are_in_the_error() -> None:
    settings = dict.fromkeys(SAMPLING)
    check_ranges(SimpleNamespace(**settings), SAMPLING)
    with pytest.raises(
        UserError, match=r"^top_p=0 is not accepted; expected a number above 0 up to"
    ):
        check_ranges(SimpleNamespace(**settings | {"top_p": 0}), SAMPLING)
