"""Length control: what it takes from the rewards of a group."""

from __future__ import annotations

import numpy as np
import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.length_control import LengthControl


def test_a_penalty_counts_tokens_above_the_free_ones():
    control = LengthControl(method="penalty", coef=0.1, free_tokens=10)
    found = control.adjustments(np.array([0.5, 0.2, -0.7]), np.array([8, 12, 20]))
    assert found == pytest.approx([0.0, -0.2, -1.0])


def test_the_residual_has_no_correlation_with_length():
    rewards, lengths = np.array([-0.8, 0.1, 0.2, 0.5]), np.array([5.0, 9.0, 14.0, 20.0])
    left = rewards + LengthControl(method="residual", coef=1.0).adjustments(rewards, lengths)
    assert np.corrcoef(left, lengths)[0, 1] == pytest.approx(0.0, abs=1e-12)
    assert left.mean() == pytest.approx(rewards.mean())
    half = LengthControl(method="residual", coef=0.5).adjustments(rewards, lengths)
    assert half == pytest.approx((left - rewards) / 2)


def test_a_preference_for_brevity_and_equal_lengths_are_left_alone():
    control = LengthControl(method="residual", coef=1.0)
    rewards = np.array([0.5, 0.0, -0.5])
    assert control.adjustments(rewards, np.array([1, 2, 3])) == pytest.approx([0, 0, 0])
    assert control.adjustments(rewards, np.array([4, 4, 4])) == pytest.approx([0, 0, 0])


def test_settings_without_a_meaning_are_refused():
    with pytest.raises(ConfigurationError, match=r"length_control\.coef=-1"):
        LengthControl(coef=-1)
    with pytest.raises(ConfigurationError, match="at most 1 for residual"):
        LengthControl(method="residual", coef=1.5)
