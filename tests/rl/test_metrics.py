import math

import numpy as np
import pytest
import tinker

from tests.rl.envs import EchoEnv, EnvsBuilder, ScriptedPolicy, group, trajectory, turn
from tinker_cookbook.exceptions import AllTrajectoriesFailedError
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.metric_util import RLTestSetEvaluator, compute_trajectory_metrics
from tinker_cookbook.rl.metrics import (
    compute_kl_sample_train,
    discounted_future_sum_vectorized,
    measure_sampling_gap,
)
from tinker_cookbook.rl.rollout_strategy import MinViableGroup
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, TrajectoryGroup


class ListDataset(RLDataset):
    def __init__(self, *batches: list[EnvGroupBuilder]) -> None:
        self.batches = batches

    def get_batch(self, index: int) -> list[EnvGroupBuilder]:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def test_divergence_is_measured_on_sampled_tokens_only():
    (datum,) = trajectory_to_data(trajectory(turn([1, 2], [5, 9], logprobs=[-1.0, -2.0])), 1.0)
    training = np.array([-7.0, -1.5, -2.0], dtype=np.float32)  # the first is a prompt position
    found = compute_kl_sample_train([datum], [training])
    assert found["optim/kl_sample_train_v1"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["optim/kl_sample_train_v2"] == pytest.approx(0.5 * (0.25 + 0.0) / 2)
    assert found["optim/entropy"] == pytest.approx(1.5)
    assert compute_kl_sample_train([], []) == {}


def test_floor_is_measured_on_sampled_tokens_only():
    (datum,) = trajectory_to_data(trajectory(turn([1, 2], [5, 9], logprobs=[-1.0, -2.0])), 1.0)
    gap = measure_sampling_gap([datum], [np.array([-7.0, -1.5, -1.75], dtype=np.float32)])
    assert gap is not None
    assert (gap.mean, gap.largest, gap.num_tokens) == (pytest.approx(0.375), 0.5, 2)
    assert gap.half_mean_square == pytest.approx(0.5 * (0.25 + 0.0625) / 2)
    assert "3.8e-01 nats per token" in gap.describe()
    assert measure_sampling_gap([], []) is None


def test_discounted_sums():
    np.testing.assert_allclose(
        discounted_future_sum_vectorized(np.array([1.0, 2.0, 4.0]), 0.5), [3.0, 4.0, 4.0]
    )
    np.testing.assert_allclose(discounted_future_sum_vectorized(np.array([1.0, 2.0]), 0.0), [1, 2])
    assert discounted_future_sum_vectorized(np.ones(2, dtype=np.float32), 1.0).dtype == np.float32


def test_metrics_cover_all_groups():
    groups = [group(1.0, 0.0), group(1.0, 1.0), group(0.0, 0.0)]
    metrics = compute_trajectory_metrics(groups, [[]] * 3)
    assert metrics["env/all/reward/total"] == pytest.approx(0.5)
    assert metrics["env/all/by_group/frac_mixed"] == pytest.approx(1 / 3)
    assert metrics["env/all/by_group/frac_all_good"] == pytest.approx(1 / 3)
    assert metrics["env/all/by_group/frac_all_bad"] == pytest.approx(1 / 3)
    assert metrics["env/all/total_episodes"] == 6
    assert metrics["env/all/total_ac_tokens"] == 12
    assert metrics["env/all/ob_tokens_per_turn"] == 2


def test_tags_are_averaged_apart_when_they_differ():
    metrics = compute_trajectory_metrics([group(1.0), group(0.0)], [["easy"], ["hard", "new"]])
    assert metrics["env/easy/reward/total"] == 1.0
    assert metrics["env/hard/reward/total"] == metrics["env/new/reward/total"] == 0.0
    same = compute_trajectory_metrics([group(1.0), group(0.0)], [["easy"], ["easy"]])
    assert not any(key.startswith("env/easy") for key in same)


def test_stop_reasons_are_fractions_and_broken_prefixes_are_counted():
    first = trajectory(turn([1], [5], metrics={"score": 2.0, "stop/max_turns": 1}))
    second = trajectory(turn([1], [5], metrics={"score": 4.0}), turn([2], [6]))
    both = TrajectoryGroup([first, second], [0.0, 0.0], [{}, {"group": 1.0}])
    metrics = compute_trajectory_metrics([both], [[]])
    assert metrics["env/all/stop/max_turns"] == 0.5
    assert metrics["env/all/score"] == 3.0
    assert metrics["env/all/group"] == 1.0
    assert metrics["env/all/prefix_breaks"] == 1
    assert metrics["env/all/turns_per_episode"] == 1.5


@pytest.mark.anyio
async def test_evaluator_prefixes_and_gives_a_standard_error():
    builders: list[EnvGroupBuilder] = [
        EnvsBuilder(lambda _, value=value: EchoEnv(reward=lambda turn: value), group_size=2)
        for value in (1.0, 0.0, 0.0, 1.0)
    ]
    evaluator = RLTestSetEvaluator(ListDataset(builders[:2], builders[2:]), max_tokens=4)
    metrics = await evaluator.eval_token_completer(ScriptedPolicy())
    assert metrics["test/env/all/reward/total"] == 0.5
    expected = math.sqrt(4 * 0.25 / 3) / math.sqrt(4)
    assert metrics["test/env/all/reward/stderr"] == pytest.approx(expected)
    assert len(evaluator.last_result) == 4


@pytest.mark.anyio
async def test_evaluator_survives_a_failing_task_and_says_so():
    def fail(turn: int) -> None:
        raise ValueError("no such table")

    good = EnvsBuilder(lambda _: EchoEnv())
    bad = EnvsBuilder(lambda _: EchoEnv(on_step=fail))
    strategy = MinViableGroup(max_retries=0)
    evaluator = RLTestSetEvaluator(ListDataset([good, bad]), 4, strategy=strategy)
    metrics = await evaluator.eval_token_completer(ScriptedPolicy())
    assert metrics["test/env/all/reward/total"] == 1.0
    assert metrics["test/rollout_errors/groups_failed"] == 1.0
    alone = RLTestSetEvaluator(ListDataset([bad]), 4, strategy=strategy)
    with pytest.raises(AllTrajectoriesFailedError, match=r"none of the 1 held-out.*no such table"):
        await alone.eval_token_completer(ScriptedPolicy())


def test_prompt_of_an_image_counts_its_tokens():
    image = tinker.types.ImageChunk(data=b"x", format="png", expected_tokens=4)
    shown = turn([1], [5])
    shown.ob = tinker.ModelInput(chunks=[image])
    metrics = compute_trajectory_metrics([TrajectoryGroup([trajectory(shown)], [0.0], [{}])], [[]])
    assert metrics["env/all/total_ob_tokens"] == 4
