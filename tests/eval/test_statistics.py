"""Standard errors, pass@k and the paired comparison, against naive calculations."""

from __future__ import annotations

import itertools
import math

import pytest

from tinker_cookbook.eval.statistics import compare_paired, pass_at_k, standard_error
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError


def test_the_standard_error_is_that_of_the_mean() -> None:
    assert standard_error([1.0]) == 0.0
    values = [1.0] * 30 + [0.0] * 70
    assert standard_error(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_without_replacement(n: int, c: int) -> None:
    samples = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 0), (4, 2, 5), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_numbers(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigurationError, match="out of range"):
        pass_at_k(n, c, k)


def test_paired_comparison_of_verdicts_is_the_exact_sign_test() -> None:
    a = [0.0] * 10 + [1.0] * 2 + [1.0] * 8
    b = [1.0] * 10 + [0.0] * 2 + [1.0] * 8
    found = compare_paired(a, b)
    assert (found.num_better, found.num_worse, found.num_examples) == (10, 2, 20)
    assert found.difference == pytest.approx(0.4)
    # 12 fair coins: at most 2 heads, or at most 2 tails.
    assert found.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    assert found.standard_error == pytest.approx(standard_error(differences))
    low, high = found.interval
    assert (low + high) / 2 == pytest.approx(0.4)


def test_equal_models_have_no_significant_difference() -> None:
    found = compare_paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.difference, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)


def test_other_scores_use_the_normal_distribution() -> None:
    a, b = [0.0, 0.25, 0.5, 0.75], [0.5, 0.5, 0.75, 0.75]
    found = compare_paired(a, b)
    z = found.difference / found.standard_error
    assert found.p_value == pytest.approx(2 * (1 - 0.5 * (1 + math.erf(z / math.sqrt(2)))))


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(DataValidationError, match="same examples"):
        compare_paired([1.0], [1.0, 0.0])
