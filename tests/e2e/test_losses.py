"""Values and gradients of the losses, from logprobs that the service itself returned (LOS)."""

import numpy as np
import pytest
import tinker
import torch

from tests.e2e.sdk import (
    ADAM,
    batch,
    datum,
    fails_promptly,
    forward,
    is_alive,
    logprobs_of,
    rl_datum,
    tensor,
    text,
    tokens,
    train_step,
)
from tests.number_format import STEPPED_NATS, TRAINED_SHARE, by_format

IDS = tokens(9)
ADVANTAGES = np.array([1.0, -1.0, 0.5, 2.0, -0.3, 0.0, 1.5, -2.0])
# sampler's logprobs = trainer's + OFFSET, so ratios are exp(-OFFSET)
OFFSET = np.array([0.0, 0.05, -0.05, 0.5, -0.5, 0.1, -0.6, 0.4])
RL_LOSSES = ["importance_sampling", "ppo", "cispo", "dro", "gspo"]


@pytest.fixture(scope="module")
def run(new_run) -> tinker.TrainingClient:
    return new_run()


@pytest.fixture(scope="module")
def current(run) -> np.ndarray:
    """Trainer's logprobs of IDS."""
    return forward(run, [datum(IDS)])[0].astype(np.float64)


def config_of(loss: str) -> dict[str, float]:
    return {
        "dro": {"beta": 0.05},
        "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    }.get(loss, {})


def extra_of(loss: str) -> dict[str, tinker.TensorData]:
    return {"sequence_ratio_mask": tensor(np.ones(8), np.float32)} if loss == "gspo" else {}


def loss_of(run, loss: str, sampling_logprobs, advantages=ADVANTAGES, config=None) -> float:
    data = [rl_datum(IDS, sampling_logprobs, advantages, **extra_of(loss))]
    options = (
        {} if (config or config_of(loss)) == {} else {"loss_fn_config": config or config_of(loss)}
    )
    return run.forward(data, loss, **options).result().metrics["loss:sum"]


def ratios() -> np.ndarray:
    return np.exp(-OFFSET)


def test_los_01_importance_sampling(run, current) -> None:
    expected = -(ratios() * ADVANTAGES).sum()
    assert loss_of(run, "importance_sampling", current + OFFSET) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("bounds", [None, (0.9, 1.05)])
def test_los_02_ppo(run, current, bounds) -> None:
    low, high = bounds or (0.8, 1.2)
    config = bounds and {"clip_low_threshold": low, "clip_high_threshold": high}
    clipped = np.clip(ratios(), low, high)
    expected = -np.minimum(ratios() * ADVANTAGES, clipped * ADVANTAGES).sum()
    assert loss_of(run, "ppo", current + OFFSET, config=config) == pytest.approx(expected, rel=1e-4)


def test_los_03_cispo(run, current) -> None:
    expected = -(np.clip(ratios(), 0.8, 1.2) * current * ADVANTAGES).sum()
    assert loss_of(run, "cispo", current + OFFSET) == pytest.approx(expected, rel=1e-4)


def test_los_04_dro(run, current) -> None:
    expected = -(current * ADVANTAGES - 0.5 * 0.05 * OFFSET**2).sum()
    assert loss_of(run, "dro", current + OFFSET) == pytest.approx(expected, rel=1e-4)


def test_los_05_gspo(run, current) -> None:
    ratio = np.exp(-OFFSET.mean())
    clipped = np.clip(ratio, 0.8, 1.2)
    expected = -np.minimum(ratio * ADVANTAGES, clipped * ADVANTAGES).sum()
    assert loss_of(run, "gspo", current + OFFSET) == pytest.approx(expected, rel=1e-4)


SLOW_STEP = tinker.AdamParams(learning_rate=100.0, eps=1e6)
"""A large eps makes the first step proportional to the gradient."""


def movement(new_run, data, loss: str, **options) -> np.ndarray:
    """How a step along the gradient moves logprobs elsewhere."""
    run = new_run()
    probe = batch(2, seed=8)
    before = np.concatenate(forward(run, probe))
    train_step(run, data, SLOW_STEP, loss, **options)
    return np.concatenate(forward(run, probe)) - before


def weighted(weights) -> list[tinker.Datum]:
    return [datum(IDS, weights)]


def assert_same_direction(one: np.ndarray, other: np.ndarray) -> None:
    share = by_format(float32=0.02, bfloat16=0.15)  # of gradients that are rounded to 8 bits
    np.testing.assert_allclose(one, other, atol=share * np.abs(other).max() + 2e-6)


@pytest.mark.parametrize("loss", RL_LOSSES)
def test_los_06_on_policy_gradient_is_weighted_cross_entropy(new_run, current, loss: str) -> None:
    data = [rl_datum(IDS, current, ADVANTAGES, **extra_of(loss))]
    options = {"loss_fn_config": config_of(loss)} if config_of(loss) else {}
    expected = movement(new_run, weighted(ADVANTAGES), "cross_entropy")
    assert_same_direction(movement(new_run, data, loss, **options), expected)


def test_los_07_importance_sampling_off_policy_gradient(new_run, current) -> None:
    data = [rl_datum(IDS, current + OFFSET, ADVANTAGES)]
    expected = movement(new_run, weighted(ADVANTAGES * ratios()), "cross_entropy")
    assert_same_direction(movement(new_run, data, "importance_sampling"), expected)


def test_los_08_ppo_clip_stops_the_gradient(new_run, current) -> None:
    # ratios of e with positive advantages are beyond the bound everywhere
    data = [rl_datum(IDS, current - 1.0, np.ones(8))]
    assert np.abs(movement(new_run, data, "ppo")).max() == 0
    assert np.abs(movement(new_run, data, "importance_sampling")).max() > 0


def test_los_09_cispo_keeps_the_gradient(new_run, current) -> None:
    data = [rl_datum(IDS, current - 1.0, np.ones(8))]
    expected = movement(new_run, weighted(1.2 * np.ones(8)), "cross_entropy")
    assert_same_direction(movement(new_run, data, "cispo"), expected)


def test_los_10_dro_gradient(new_run, current) -> None:
    data = [rl_datum(IDS, current + OFFSET, ADVANTAGES)]
    expected = movement(new_run, weighted(ADVANTAGES + 0.5 * OFFSET), "cross_entropy")
    found = movement(new_run, data, "dro", loss_fn_config={"beta": 0.5})
    assert_same_direction(found, expected)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo", "gspo"])
def test_los_11_zero_advantage_is_no_gradient(new_run, current, loss: str) -> None:
    data = [rl_datum(IDS, current, np.zeros(8), **extra_of(loss))]
    options = {"loss_fn_config": config_of(loss)} if config_of(loss) else {}
    assert np.abs(movement(new_run, data, loss, **options)).max() == 0


def test_los_12_many_targets_importance_sampling(run) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(3, 300, (8, 2))
    advantages = rng.standard_normal((8, 2))
    plain = {
        "target_tokens": tensor(targets, np.int64),
        "weights": tensor(np.ones((8, 2)), np.float32),
    }
    (current,) = forward(run, [tinker.Datum(model_input=text(IDS[:-1]), loss_fn_inputs=plain)])
    inputs = {
        "target_tokens": plain["target_tokens"],
        "logprobs": tensor(current - 0.1, np.float32),
        "advantages": tensor(advantages, np.float32),
    }
    item = tinker.Datum(model_input=text(IDS[:-1]), loss_fn_inputs=inputs)
    found = run.forward_backward([item], "importance_sampling").result().metrics["loss:sum"]
    assert found == pytest.approx(-(np.exp(0.1) * advantages).sum(), rel=1e-4, abs=1e-4)


def negative_log_likelihood(data, logprobs_list):
    loss = torch.stack(
        [
            -(logprobs * torch.tensor(item.loss_fn_inputs["weights"].to_numpy())).sum()
            for item, logprobs in zip(data, logprobs_list, strict=True)
        ]
    ).sum()
    return loss, {"mine:sum": loss.item()}


def test_los_13_custom_loss_equals_cross_entropy(new_run) -> None:
    custom, plain = new_run(), new_run()
    result = custom.forward_backward_custom(batch(), negative_log_likelihood).result()
    custom.optim_step(ADAM).result()
    expected = train_step(plain, batch())
    # the client's own loss begins with scores
    share = by_format(float32=1e-4, bfloat16=TRAINED_SHARE)
    assert result.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=share)
    assert result.metrics["mine:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=share)
    for one, other in zip(forward(custom, batch()), forward(plain, batch()), strict=True):
        np.testing.assert_allclose(one, other, atol=by_format(float32=1e-4, bfloat16=STEPPED_NATS))


def preference(data, logprobs_list):
    margin = logprobs_list[0].sum() - logprobs_list[1].sum()
    return -torch.nn.functional.logsigmoid(margin), {"margin:mean": margin.item()}


def test_los_14_and_15_cross_sequence_loss_pipelined(new_run) -> None:
    run = new_run()
    pair = batch(2)[::-1]  # the longer one first: its logprob sum is lower
    results = []
    for _ in range(4):
        results.append(run.forward_backward_custom(pair, preference))
        run.optim_step(ADAM)
    margins = [result.result().metrics["margin:mean"] for result in results]
    assert margins == sorted(margins)
    assert margins[-1] > margins[0] + 0.5


def test_los_16_loss_handle(module_client, new_run) -> None:
    def my_loss(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/my_loss:sum": loss}

    handle = module_client.create_custom_loss(my_loss, {"logprobs": 1, "weights": 1}).result()
    run = new_run()
    result = run.forward_backward_custom(batch(), handle).result()
    expected = run.forward(batch(), "cross_entropy").result().metrics["loss:sum"]
    share = by_format(float32=1e-4, bfloat16=TRAINED_SHARE)
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=share)


def test_los_17_stable_reinforce_works_or_is_refused(run, current) -> None:
    data = [rl_datum(IDS, current, ADVANTAGES)]
    error = fails_promptly(
        lambda: run.forward_backward(data, "stable_reinforce").result(), "stable_reinforce"
    )
    assert isinstance(error, tinker.RequestFailedError)
    assert is_alive(run)


def test_losses_return_logprobs(new_run, current) -> None:
    run = new_run()
    for loss in RL_LOSSES:
        data = [rl_datum(IDS, current, ADVANTAGES, **extra_of(loss))]
        options = {"loss_fn_config": config_of(loss)} if config_of(loss) else {}
        (found,) = logprobs_of(run.forward(data, loss, **options).result())
        np.testing.assert_allclose(found, current, atol=1e-5)
