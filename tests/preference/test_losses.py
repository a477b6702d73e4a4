"""Preference losses: values worked out by hand, gradients by finite differences."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.losses import (
    PAIR_LOSSES,
    REFERENCE_FREE,
    PairBatch,
    SingleBatch,
    dpo,
    kto,
)

PAIRS = 7
STEP = 1e-6
TOLERANCE = 1e-7
"""Central differences of float64 with this step are off by about STEP**2 and 1e-16 / STEP."""


def random_batch(seed: int = 0) -> PairBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (2, PAIRS)).astype(float)
    means = -rng.uniform(0.05, 3.0, (4, PAIRS))
    return PairBatch(
        means[0] * lengths[0],
        means[1] * lengths[1],
        means[2] * lengths[0],
        means[3] * lengths[1],
        lengths[0],
        lengths[1],
    )


def shift(batch: PairBatch, field: str, by: float) -> PairBatch:
    return dataclasses.replace(batch, **{field: getattr(batch, field) + by})


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_derivatives_are_finite_differences(name: str, seed: int):
    loss, batch = PAIR_LOSSES[name](), random_batch(seed)
    result = loss(batch)
    for field, derivative in (
        ("chosen_P", result.by_chosen_P),
        ("rejected_P", result.by_rejected_P),
    ):
        above, below = loss(shift(batch, field, STEP)), loss(shift(batch, field, -STEP))
        numeric = (above.loss_P - below.loss_P) / (2 * STEP)
        np.testing.assert_allclose(derivative, numeric, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_step_against_the_gradient_prefers_the_better_completion(name: str):
    loss, batch = PAIR_LOSSES[name](), random_batch()
    result = loss(batch)
    learning = result.by_chosen_P != 0  # a hinge that is satisfied has no gradient
    assert learning.any()
    assert np.all(result.by_chosen_P[learning] < 0) or name == "ipo"
    assert np.all(result.by_rejected_P[learning] > 0) or name == "ipo"


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_probabilities_give_finite_numbers(name: str):
    ones = np.ones(2)
    batch = PairBatch(-1e5 * ones, -1e-3 * ones, -1.0 * ones, -1e5 * ones, ones, 500.0 * ones)
    for swapped in (batch, dataclasses.replace(batch, chosen_P=0 * ones, rejected_P=-1e5 * ones)):
        result = PAIR_LOSSES[name]()(swapped)
        for value in (result.loss_P, result.by_chosen_P, result.by_rejected_P):
            assert np.all(np.isfinite(value))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_read_the_reference_or_say_that_they_do_not(name: str):
    batch = random_batch()
    other = shift(batch, "reference_chosen_P", 1.5)
    is_same = np.array_equal(PAIR_LOSSES[name]()(batch).loss_P, PAIR_LOSSES[name]()(other).loss_P)
    assert is_same == (name in REFERENCE_FREE)


def test_dpo_of_a_model_that_is_its_reference_is_log_2():
    batch = random_batch()
    same = dataclasses.replace(
        batch, reference_chosen_P=batch.chosen_P, reference_rejected_P=batch.rejected_P
    )
    result = dpo(beta=0.3)(same)
    assert result.loss_P == pytest.approx(math.log(2))
    assert result.by_chosen_P == pytest.approx(-0.15)  # beta (sigmoid(0) - 1)


def test_dpo_by_hand():
    one = np.ones(1)
    batch = PairBatch(-3.0 * one, -5.0 * one, -4.0 * one, -4.0 * one, 6 * one, 9 * one)
    # h = (-3 + 4) - (-5 + 4) = 2; beta h = 1
    assert dpo(beta=0.5)(batch).loss_P[0] == pytest.approx(-math.log(1 / (1 + math.exp(-1))))
    smooth = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert dpo(beta=0.5, label_smoothing=0.1)(batch).loss_P[0] == pytest.approx(smooth)


def test_other_losses_by_hand():
    one = np.ones(1)
    batch = PairBatch(-3.0 * one, -9.0 * one, -4.0 * one, -4.0 * one, 3 * one, 6 * one)

    def value(name: str, **settings: float) -> float:
        return PAIR_LOSSES[name](**settings)(batch).loss_P[0]

    def minus_log_sigmoid(x: float) -> float:
        return math.log(1 + math.exp(-x))

    assert value("ipo", beta=0.5) == pytest.approx((1 / 3 + 5 / 6 - 1) ** 2)
    assert value("ipo", beta=0.5, per_token=False) == pytest.approx((1 + 5 - 1) ** 2)
    assert value("hinge", beta=0.1) == pytest.approx(1 - 0.6)
    assert value("length_normalized_dpo", beta=2.0) == pytest.approx(
        minus_log_sigmoid(2 * (1 / 3 + 5 / 6))
    )
    assert value("length_corrected_dpo", beta=0.1, alpha=0.1) == pytest.approx(
        minus_log_sigmoid(0.6 - 0.3)
    )
    assert value("simpo", beta=2.0, gamma=0.5) == pytest.approx(
        minus_log_sigmoid(2 * (-1 + 1.5) - 0.5)
    )
    assert value("cpo", beta=0.1, nll_weight=2.0) == pytest.approx(minus_log_sigmoid(0.6) + 2.0)
    assert value("dpo_with_nll", beta=0.1, nll_weight=2.0) == pytest.approx(
        minus_log_sigmoid(0.6) + 2.0
    )
    odds = math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(
        math.exp(-1.5) / (1 - math.exp(-1.5))
    )
    assert value("orpo", beta=0.1) == pytest.approx(1 + 0.1 * minus_log_sigmoid(odds))
    right, flipped = minus_log_sigmoid(0.6), minus_log_sigmoid(-0.6)
    assert value("robust_dpo", beta=0.1, label_smoothing=0.2) == pytest.approx(
        (0.8 * right - 0.2 * flipped) / 0.6
    )


def test_kto_by_hand_and_by_finite_differences():
    ratio = np.array([0.5, -2.0, 3.0])
    batch = SingleBatch(ratio, np.array([True, True, False]), 0.4)
    result = kto(batch, beta=0.5, good_weight=1.0, bad_weight=1.5)
    assert result.loss_S[0] == pytest.approx(1 - 1 / (1 + math.exp(-0.05)))
    assert result.loss_S[2] == pytest.approx(1.5 * (1 - 1 / (1 + math.exp(1.3))))

    def losses(by: float) -> np.ndarray:
        moved = dataclasses.replace(batch, log_ratio_S=ratio + by)
        return kto(moved, beta=0.5, good_weight=1.0, bad_weight=1.5).loss_S

    numeric = (losses(STEP) - losses(-STEP)) / (2 * STEP)
    np.testing.assert_allclose(result.by_log_ratio_S, numeric, atol=TOLERANCE)
    assert result.by_log_ratio_S[0] < 0 < result.by_log_ratio_S[2]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match="beta=0 must be greater than 0"):
        dpo(beta=0)
    with pytest.raises(ConfigurationError, match=r"label_smoothing=0\.5"):
        PAIR_LOSSES["robust_dpo"](label_smoothing=0.5)
