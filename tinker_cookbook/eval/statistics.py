"""Statistics of benchmark scores: standard errors, pass@k, and the comparison of two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinker_cookbook.exceptions import ConfigurationError, DataValidationError

__all__ = ["PairedComparison", "compare_paired", "pass_at_k", "standard_error"]

Z_95 = 1.959963984540054


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean: sqrt(sample variance / n); 0 for fewer than 2 values.

    For values of 0 and 1 this is sqrt(p * (1 - p) / (n - 1)). If an example has several samples,
    pass one mean per example, because samples of one example are not independent.
    """
    n = len(values)
    if n < 2:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k), for n samples of which c are correct. Source: arXiv:2107.03374.

    Raises:
        ConfigurationError: if k is not in 1..n, or c not in 0..n.
    """
    if not 1 <= k <= num_samples:
        raise ConfigurationError(f"k={k} is out of range; use 1 to num_samples={num_samples}.")
    if not 0 <= num_correct <= num_samples:
        raise ConfigurationError(
            f"num_correct={num_correct} is out of range; use 0 to num_samples={num_samples}."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same examples."""

    num_examples: int
    """Number of examples that both models have a score for."""
    mean_a: float
    mean_b: float
    difference: float
    """Mean of score B minus score A."""
    standard_error: float
    """Standard error of the difference; smaller than for unpaired scores if the models agree."""
    p_value: float
    """Chance of a difference at least as large if both models are equally good."""
    num_better: int
    """Number of examples on which B has the higher score."""
    num_worse: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the difference."""
        half = Z_95 * self.standard_error
        return self.difference - half, self.difference + half


def compare_paired(scores_a: Sequence[float], scores_b: Sequence[float]) -> PairedComparison:
    """Compare two models by the differences of their scores on the same examples.

    The p-value is exact where all differences are -1, 0 or 1 (McNemar's test, that is, a sign test
    of the examples that differ); otherwise it comes from the normal distribution of the mean
    difference. Source: arXiv:2411.00640 on paired differences.

    Raises:
        DataValidationError: if the lists are empty or differ in length.
    """
    if not scores_a or len(scores_a) != len(scores_b):
        raise DataValidationError(
            f"{len(scores_a)} and {len(scores_b)} scores cannot be paired; give both models the "
            "same examples, at least one."
        )
    differences = [b - a for a, b in zip(scores_a, scores_b, strict=True)]
    better = sum(value > 0 for value in differences)
    worse = sum(value < 0 for value in differences)
    mean = math.fsum(differences) / len(differences)
    error = standard_error(differences)
    exact = all(value in (-1.0, 0.0, 1.0) for value in differences)
    return PairedComparison(
        num_examples=len(differences),
        mean_a=math.fsum(scores_a) / len(scores_a),
        mean_b=math.fsum(scores_b) / len(scores_b),
        difference=mean,
        standard_error=error,
        p_value=_sign_test(better, worse) if exact else _normal_test(mean, error),
        num_better=better,
        num_worse=worse,
    )


def _sign_test(better: int, worse: int) -> float:
    """Return the two-sided chance of a split at least this uneven, with equal chances."""
    n, smaller = better + worse, min(better, worse)
    tail = sum(math.comb(n, k) for k in range(smaller + 1)) / 2**n
    return min(1.0, 2.0 * tail)


def _normal_test(mean: float, error: float) -> float:
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return math.erfc(abs(mean) / error / math.sqrt(2.0))
