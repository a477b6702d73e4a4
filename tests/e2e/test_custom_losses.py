"""Losses that the SDK traces and uploads: the service computes them, in one pass."""

# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import pytest
import tinker
import torch

from tests.e2e.sdk import (
    ADAM,
    batch,
    fails_as_user_error,
    forward,
    is_alive,
    logprobs_of,
    tensor,
    text,
    tokens,
)
from tests.number_format import STEPPED_NATS, TRAINED_NATS, TRAINED_SHARE, by_format


def clipped(logprobs, old, advantages, floor):
    """PPO with a lower bound that is a number of the datum."""
    ratio = torch.exp(logprobs - old)
    bounded = torch.maximum(ratio, floor).clamp(max=1.2)
    loss = -torch.minimum(ratio * advantages, bounded * advantages).sum()
    return loss, {"custom/ratio:mean": ratio.mean(), "custom/loss:sum": loss}


RANKS = {"logprobs": 1, "old": 1, "advantages": 1, "floor": 0}


def clipped_locally(data, logprobs_list):
    """The same for the path on which the client computes the loss."""
    total, ratios = torch.zeros(()), []
    for item, logprobs in zip(data, logprobs_list, strict=True):
        inputs = [item.loss_fn_inputs[name].to_torch() for name in list(RANKS)[1:]]
        loss, metrics = clipped(logprobs, *inputs)
        total = total + loss
        ratios.append(metrics["custom/ratio:mean"].detach().item())
    return total, {"custom/ratio:mean": float(np.mean(ratios))}


def data(num_data: int = 3) -> list[tinker.Datum]:
    made = []
    for index in range(num_data):
        rng = np.random.default_rng(index)
        ids = tokens(9 + 2 * index, seed=index)
        count = len(ids) - 1
        inputs = {
            "target_tokens": tensor(ids[1:], np.int64),
            "old": tensor(-rng.exponential(3.0, count), np.float32),
            "advantages": tensor(rng.standard_normal(count), np.float32),
            "floor": tinker.TensorData.from_torch(torch.tensor(0.5 + 0.1 * index)),
        }
        made.append(tinker.Datum(model_input=text(ids[:-1]), loss_fn_inputs=inputs))
    return made


@pytest.fixture(scope="module")
def handle(module_client: tinker.ServiceClient):
    return module_client.create_custom_loss(clipped, RANKS).result()


def test_los_16_uploaded_loss_equals_the_clients_own(new_run, handle) -> None:
    assert handle.loss_id is not None
    here, there = new_run(), new_run()
    found = here.forward_backward_custom(data(), handle).result()
    expected = there.forward_backward_custom(data(), clipped_locally).result()
    assert "surrogate_loss:sum" not in found.metrics  # one pass, not two
    share = by_format(float32=1e-5, bfloat16=TRAINED_SHARE)
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=share)
    assert found.metrics["custom/loss:sum"] == pytest.approx(found.metrics["loss:sum"])
    assert found.metrics["custom/ratio:mean"] == pytest.approx(
        expected.metrics["custom/ratio:mean"], rel=share
    )
    for one, other in zip(logprobs_of(found), logprobs_of(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=by_format(float32=1e-6, bfloat16=TRAINED_NATS))
    norms = [run.optim_step(ADAM).result().metrics["grad_norm"] for run in (here, there)]
    assert norms[0] == pytest.approx(norms[1], rel=by_format(float32=1e-4, bfloat16=0.05))
    for one, other in zip(forward(here, batch()), forward(there, batch()), strict=True):
        np.testing.assert_allclose(one, other, atol=by_format(float32=1e-4, bfloat16=STEPPED_NATS))


def spread(logprobs, target_tokens):
    """Reads two targets per position, and token ids."""
    is_even = (target_tokens % 2 == 0).float()
    return (torch.logsumexp(logprobs, dim=-1) * is_even[:, 0]).sum(), {}


def test_several_targets_per_position(module_client, new_run) -> None:
    ranks: dict[str, tinker.types.CustomLossInputRank] = {"logprobs": 2, "target_tokens": 2}
    loss = module_client.create_custom_loss(spread, ranks).result()
    ids = tokens(7)
    targets = np.random.default_rng(0).integers(3, 300, (6, 2))
    inputs = {"target_tokens": tensor(targets, np.int64)}
    item = tinker.Datum(model_input=text(ids[:-1]), loss_fn_inputs=inputs)
    result = new_run().forward_backward_custom([item], loss).result()
    (logprobs,) = logprobs_of(result)
    assert logprobs.shape == (6, 2)
    expected = (np.logaddexp(*logprobs.T) * (targets[:, 0] % 2 == 0)).sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_an_uploaded_loss_can_be_pipelined(new_run, handle) -> None:
    run = new_run()
    results = []
    for _ in range(4):
        results.append(run.forward_backward_custom(data(), handle))
        run.optim_step(tinker.AdamParams(learning_rate=3e-3))
    losses = [result.result().metrics["loss:sum"] for result in results]
    assert losses[-1] < losses[0]


def wrong_size(logprobs, advantages):
    return (logprobs[:2] * advantages).sum(), {}


def forbidden(logprobs):
    return (logprobs * torch.rand_like(logprobs)).sum(), {}


def test_err_a_loss_that_fails_names_its_node(module_client, new_run) -> None:
    ranks: dict[str, tinker.types.CustomLossInputRank] = {"logprobs": 1, "advantages": 1}
    loss = module_client.create_custom_loss(wrong_size, ranks).result()
    run = new_run()
    fails_as_user_error(
        lambda: run.forward_backward_custom(data(), loss).result(), "'wrong_size'.*node 'mul'"
    )
    assert is_alive(run)
    fails_as_user_error(
        lambda: module_client.create_custom_loss(forbidden, {"logprobs": 1}).result(),
        "node 'rand_like'.*not on the list",
    )


def test_err_a_loss_belongs_to_its_session(service_client, new_run, handle) -> None:
    stranger = new_run(service_client)
    config = {"loss_id": handle.loss_id}
    for wrong in (config, {"loss_id": "nothing"}, {}):
        fails_as_user_error(
            lambda wrong=wrong: stranger.forward_backward(data(), "custom", wrong).result(),
            "loss_id",
        )
    assert is_alive(stranger)


def test_err_data_that_do_not_fit_the_loss(new_run, handle) -> None:
    run = new_run()
    lacking = data(1)
    del lacking[0].loss_fn_inputs["old"]
    flat = data(1)
    flat[0].loss_fn_inputs["old"] = flat[0].loss_fn_inputs["floor"]
    config = {"loss_id": handle.loss_id}
    for bad, match in ((lacking, "lacks 'old'"), (flat, "old has shape.*rank 1")):
        fails_as_user_error(
            lambda bad=bad: run.forward_backward(bad, "custom", config).result(), match
        )
    assert is_alive(run)
