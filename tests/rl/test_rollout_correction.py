"""Weights for samples of another policy."""

from __future__ import annotations

import asyncio
from math import e

import numpy as np
import pytest
import tinker

from tests.rl.envs import trajectory, turn
from tinker_cookbook.rl.data_processing import drop_client_inputs, trajectory_to_data
from tinker_cookbook.rl.metrics import compute_kl_sample_train
from tinker_cookbook.rl.rollout_correction import compute_correction_weights, correct_rollouts

# The first position is a prompt, whose log ratio means nothing.
LOG_RATIO = np.array([99.0, 0.5, -0.5, 2.0, -2.0])
SAMPLED = np.array([False, True, True, True, True])


@pytest.mark.parametrize(
    ("correction", "limit", "expected"),
    [
        ("token_truncate", 3.0, [0, e**0.5, e**-0.5, 3.0, e**-2]),
        ("token_mask", 3.0, [0, e**0.5, e**-0.5, 0, 0]),
        ("sequence_truncate", 3.0, [0, 1, 1, 1, 1]),
        ("sequence_mask", 3.0, [0, 1, 1, 1, 1]),
    ],
)
def test_weights(correction, limit: float, expected: list[float]):
    found = compute_correction_weights(LOG_RATIO, SAMPLED, correction, limit)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_sequence_is_weighted_by_the_product_of_its_ratios():
    far = LOG_RATIO + np.array([0, 0, 0, 0, 1.0])  # the sum of the log ratios is 1
    kept = compute_correction_weights(far, SAMPLED, "sequence_mask", 3.0)
    np.testing.assert_allclose(kept, [0, e, e, e, e])
    assert not compute_correction_weights(far, SAMPLED, "sequence_mask", 2.0).any()
    cut = compute_correction_weights(far, SAMPLED, "sequence_truncate", 2.0)
    np.testing.assert_allclose(cut, [0, 2, 2, 2, 2])


def test_weights_stay_finite():
    huge = np.array([0.0, 1e4, -1e4, 0.0, 0.0])
    for correction in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
        assert np.isfinite(compute_correction_weights(huge, SAMPLED, correction, 2.0)).all()


class _Trainer:
    """Scores every token with the same log probability; only `forward` may be called."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob
        self.sent: list[tinker.Datum] = []

    async def forward(self, data: list[tinker.Datum], loss_fn: str) -> tinker.ForwardBackwardOutput:
        assert loss_fn == "cross_entropy"
        self.sent = data
        outputs = [
            {
                "logprobs": tinker.TensorData.from_numpy(
                    np.full(datum.model_input.length, self.logprob, np.float32)
                )
            }
            for datum in data
        ]
        return tinker.ForwardBackwardOutput(
            loss_fn_output_type="TensorData", loss_fn_outputs=outputs, metrics={}
        )


def test_the_trainers_policy_takes_the_samplers_place():
    data = trajectory_to_data(trajectory(turn([1, 2], [5, 6])), 2.0)  # sampled at -5 and -6
    trainer = _Trainer(-5.5)
    [found], metrics = asyncio.run(
        correct_rollouts(data, trainer, "token_truncate", 1.5)  # pyright: ignore
    )
    inputs = {name: value.to_numpy().tolist() for name, value in found.loss_fn_inputs.items()}
    assert inputs["logprobs"] == [0, -5.5, -5.5]
    assert inputs["sampler_logprobs"] == [0, -5, -6]
    np.testing.assert_allclose(inputs["advantages"], [0, 2 * e**-0.5, 2 * 1.5], rtol=1e-6)
    assert metrics == pytest.approx(
        {"correction/weight": (e**-0.5 + 1.5) / 2, "correction/limited": 0.5, "correction/kl": 0.0}
    )
    assert set(trainer.sent[0].loss_fn_inputs) == {"target_tokens", "weights"}
    [sent] = drop_client_inputs([found], "ppo")
    assert set(sent.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
    # The divergence of sampler and trainer is still measured between these two.
    measured = compute_kl_sample_train([found], [np.full(3, -5.5)])
    assert measured["optim/kl_sample_train_v2"] == pytest.approx(0.125)
    assert asyncio.run(correct_rollouts([], trainer, "token_mask", 2.0)) == ([], {})  # pyright: ignore
