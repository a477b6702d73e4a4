from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rl.envs import group, trajectory, turn
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.training import losses as engine_losses
from tinker_cookbook.rl import train
from tinker_cookbook.rl.algorithms import (
    ALGORITHMS,
    LOSSES,
    RLLoss,
    center_rewards,
    compute_group_advantages,
    compute_length_scale,
    leave_one_out,
    standardize_rewards,
)
from tinker_cookbook.rl.data_processing import compute_advantages
from tinker_cookbook.rl.types import TrajectoryGroup

REWARDS = st.lists(st.floats(-100, 100), min_size=1, max_size=16)


def test_centred_rewards_are_distances_from_the_mean():
    np.testing.assert_allclose(
        center_rewards(np.array([1.0, 0.0, 0.0, 1.0])), [0.5, -0.5, -0.5, 0.5]
    )


def test_standardized_rewards_have_deviation_one():
    advantages_G = standardize_rewards(np.array([3.0, 1.0, 2.0]))
    np.testing.assert_allclose(advantages_G, np.array([1.0, -1.0, 0.0]) * 1.224743, rtol=1e-5)


def test_leave_one_out_compares_with_the_others():
    # 1 against the mean 0.5 of (0, 1); 0 against 1 and 1.
    np.testing.assert_allclose(leave_one_out(np.array([1.0, 0.0, 1.0])), [0.5, -1.0, 0.5])


@given(REWARDS)
def test_leave_one_out_is_the_centred_reward_on_another_scale(rewards: list[float]):
    size = len(rewards)
    scale = size / (size - 1) if size > 1 else 0.0
    expected = center_rewards(np.array(rewards)) * scale
    np.testing.assert_allclose(leave_one_out(np.array(rewards)), expected, atol=1e-4)


@given(REWARDS, st.sampled_from(["group_mean", "group_std", "leave_one_out"]))
def test_advantages_sum_to_zero(rewards: list[float], estimator):
    assert abs(compute_group_advantages(rewards, estimator).sum()) < 1e-2


@pytest.mark.parametrize("estimator", ["group_mean", "group_std", "leave_one_out"])
@pytest.mark.parametrize("rewards", [[0.7], [0.1] * 5, [3.0, 3.0]])
def test_equal_rewards_give_no_gradient(estimator, rewards):
    assert np.abs(compute_group_advantages(rewards, estimator)).max() < 1e-6


def test_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"'median' is unknown.*leave_one_out"):
        compute_group_advantages([1.0], "median")  # pyright: ignore[reportArgumentType]


def test_length_scales():
    lengths = [2, 4, 6]
    np.testing.assert_allclose(compute_length_scale(lengths, "none"), [1, 1, 1])
    np.testing.assert_allclose(compute_length_scale(lengths, "trajectory"), [1 / 2, 1 / 4, 1 / 6])
    np.testing.assert_allclose(compute_length_scale(lengths, "batch"), [1 / 4] * 3)
    with pytest.raises(ConfigurationError, match="'token' is unknown"):
        compute_length_scale(lengths, "token")  # pyright: ignore[reportArgumentType]


def test_an_empty_reply_does_not_divide_by_zero():
    np.testing.assert_allclose(compute_length_scale([0, 4], "trajectory"), [1.0, 0.25])


def test_advantages_of_a_batch_follow_their_groups():
    long = trajectory(turn([1], [5, 5, 5, 9], 1.0))
    short = trajectory(turn([1], [9], 0.0))
    groups = [group(1.0, 0.0), TrajectoryGroup([long, short], [0.0, 0.0], [{}, {}])]
    plain = compute_advantages(groups)
    np.testing.assert_allclose(plain[0], [0.5, -0.5])
    scaled = compute_advantages(groups, length_normalization="trajectory")
    np.testing.assert_allclose(scaled[0], [0.25, -0.25])
    np.testing.assert_allclose(scaled[1], [0.125, -0.5])


def test_the_group_reward_counts():
    both = TrajectoryGroup(group(1.0, 1.0).trajectories_G, [2.0, 0.0], [{}, {}])
    assert both.get_total_rewards() == [3.0, 1.0]
    np.testing.assert_allclose(compute_advantages([both])[0], [1.0, -1.0])


def test_the_table_of_losses_says_what_the_local_service_takes():
    offered = {name: loss for name, loss in LOSSES.items() if loss.on_local_service}
    assert LOSSES.keys() == set(get_args(RLLoss))
    assert offered.keys() == engine_losses.LOSSES.keys() - {"cross_entropy"}
    assert LOSSES.keys() - offered.keys() <= set(engine_losses.UNAVAILABLE)
    for name, loss in offered.items():
        computed = engine_losses.LOSSES[name]
        assert set(loss.settings) == computed.settings.keys()
        assert {"logprobs", "advantages", *loss.extra_inputs} == computed.inputs.keys()


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_a_named_algorithm_is_settings_of_a_run(name: str):
    algorithm = ALGORITHMS[name]
    options = train.RunOptions(**algorithm.settings())
    assert options.loss_fn == algorithm.loss_fn
    assert set(options.loss_fn_config or {}) <= set(LOSSES[algorithm.loss_fn].settings)
    assert algorithm.source


def test_the_default_of_a_run_has_a_name():
    settings = train.RunOptions()
    assert all(
        getattr(settings, name) == value
        for name, value in ALGORITHMS["reinforce"].settings().items()
    )
