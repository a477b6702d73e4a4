"""Credit options: penalties of long replies, cut replies, and advantages per turn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.rl.envs import group, trajectory, turn
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.rl.credit import Credit, compute_overlong_penalty, compute_turn_advantages
from tinker_cookbook.rl.data_processing import assemble_training_data
from tinker_cookbook.rl.types import TrajectoryGroup


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (60, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1)]
)
def test_the_penalty_falls_linearly_within_the_buffer(num_tokens: int, expected: float):
    assert compute_overlong_penalty(num_tokens, 100, 20) == pytest.approx(expected)


def test_long_replies_lose_reward_in_the_comparison_only():
    short, long = trajectory(turn([1], [5] * 2, 1.0)), trajectory(turn([1], [5] * 10, 1.0))
    played = TrajectoryGroup([short, long], [0.0, 0.0], [{}, {}])
    credit = Credit(max_tokens=10, overlong_buffer=4, overlong_penalty=0.5)
    assert Credit(max_tokens=10).is_constant(played)
    shaped = credit.shape(played)
    assert shaped.get_total_rewards() == [1.0, 0.5]
    assert played.get_total_rewards() == [1.0, 1.0]
    assert not credit.is_constant(shaped)
    np.testing.assert_allclose(credit.advantages([shaped])[0], [0.25, -0.25])


def test_replies_that_were_cut_are_context_only_if_asked():
    reply = TokensWithLogprobs([5, 6], [-0.5, -0.5], stop_reason="length")
    cut = dataclasses.replace(turn([1], [5, 6], 1.0), ac=reply)
    played = TrajectoryGroup(
        [trajectory(cut, turn([1, 5, 6, 7], [8], 0.0)), trajectory(turn([1], [9], 0.0))],
        [0.0, 0.0],
        [{}, {}],
    )
    advantages = [np.array([0.5, -0.5], np.float32)]
    kept, _ = assemble_training_data([played], advantages)
    assert kept[0].loss_fn_inputs["mask"].to_numpy().tolist() == [1, 1, 0, 1]
    left_out, _ = assemble_training_data([played], advantages, train_truncated=False)
    assert left_out[0].loss_fn_inputs["mask"].to_numpy().tolist() == [0, 0, 0, 1]
    assert left_out[0].loss_fn_inputs["advantages"].to_numpy().tolist() == [0, 0, 0, 0.5]
    assert left_out[0].model_input == kept[0].model_input


def test_a_turn_is_compared_with_the_same_turn_of_the_others():
    """Member 0 does well at first, member 1 later; member 2 ends early."""
    rewards = [[1.0, 0.0], [0.0, 2.0], [0.0]]
    members = [
        trajectory(*(turn([1, *range(10, 10 + 2 * i)], [5, 6], r) for i, r in enumerate(earned)))
        for earned in rewards
    ]
    played = TrajectoryGroup(members, [0.0, 0.0, 0.5], [{}, {}, {}])
    [advantages] = compute_turn_advantages([played], discount=0.5)
    # Returns of the first turn: 1 + 0.5 * 0, 0 + 0.5 * 2, 0.5; of the second: 0, 2.
    np.testing.assert_allclose(advantages[0], [1 - 2.5 / 3, -1.0], atol=1e-6)
    np.testing.assert_allclose(advantages[1], [1 - 2.5 / 3, 1.0], atol=1e-6)
    np.testing.assert_allclose(advantages[2], [0.5 - 2.5 / 3], atol=1e-6)
    scaled = compute_turn_advantages([played], discount=0.5, length_normalization="trajectory")
    np.testing.assert_allclose(scaled[0][0], advantages[0] / 4, atol=1e-6)


def test_turns_can_differ_where_totals_do_not():
    members = [
        trajectory(turn([1], [5], 1.0), turn([1, 5, 2], [6], 0.0)),
        trajectory(turn([1], [5], 0.0), turn([1, 5, 2], [7], 1.0)),
    ]
    played = TrajectoryGroup(members, [0.0, 0.0], [{}, {}])
    assert Credit().is_constant(played)
    by_turn = Credit(assignment="turn")
    assert not by_turn.is_constant(played)
    data, _ = assemble_training_data([played], by_turn.advantages([played]))
    found = [datum.loss_fn_inputs["advantages"].to_numpy().tolist() for datum in data]
    # Nothing separates the first turns, whose returns are equal.
    assert found == [[0, 0, -0.5], [0, 0, 0.5]]
    assert Credit(assignment="turn").is_constant(group(1.0, 1.0))
