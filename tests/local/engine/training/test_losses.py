"""Each loss against a NumPy twin in float64, its gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import make_run, random_datum
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.training.built_in_loss import loss_and_gradient
from tinker_cookbook.local.engine.training.losses import LOSSES, UNAVAILABLE
from tinker_cookbook.local.engine.types import LossSpec, TrainDatum
from tinker_cookbook.rl import algorithms

LOW, HIGH, BETA = 0.9, 1.1, 0.3
Arrays = dict[str, np.ndarray]


def _cross_entropy(p: np.ndarray, x: Arrays) -> float:
    return -sum(w * v for w, v in zip(x["weights"], p, strict=True))


def _importance_sampling(p: np.ndarray, x: Arrays) -> float:
    return -sum(
        np.exp(v - q) * a for v, q, a in zip(p, x["logprobs"], x["advantages"], strict=True)
    )


def _ppo(p: np.ndarray, x: Arrays) -> float:
    total = 0.0
    for v, q, a in zip(p, x["logprobs"], x["advantages"], strict=True):
        ratio = np.exp(v - q)
        total -= min(ratio * a, min(max(ratio, LOW), HIGH) * a)
    return total


def _cispo(p: np.ndarray, x: Arrays, frozen: np.ndarray) -> float:
    total = 0.0
    for v, f, q, a in zip(p, frozen, x["logprobs"], x["advantages"], strict=True):
        total -= min(max(np.exp(f - q), LOW), HIGH) * v * a
    return total


def _dro(p: np.ndarray, x: Arrays) -> float:
    return -sum(
        v * a - 0.5 * BETA * (v - q) ** 2
        for v, q, a in zip(p, x["logprobs"], x["advantages"], strict=True)
    )


def _gspo(p: np.ndarray, x: Arrays, frozen: np.ndarray) -> float:
    total = 0.0
    for number in range(2):
        members = np.flatnonzero(x["sequence"] == number)
        counted = [i for i in members if x["sequence_ratio_mask"][i] != 0]
        sequence_ratio = np.exp(np.mean([frozen[i] - x["logprobs"][i] for i in counted]))
        for i in members:
            ratio = sequence_ratio * np.exp(p[i] - frozen[i])
            a = x["advantages"][i]
            total -= min(ratio * a, min(max(ratio, LOW), HIGH) * a)
    return total


TWINS: dict[str, Callable[[np.ndarray, Arrays, np.ndarray], float]] = {
    "cross_entropy": lambda p, x, frozen: _cross_entropy(p, x),
    "importance_sampling": lambda p, x, frozen: _importance_sampling(p, x),
    "ppo": lambda p, x, frozen: _ppo(p, x),
    "cispo": _cispo,
    "dro": lambda p, x, frozen: _dro(p, x),
    "gspo": _gspo,
}
CONFIG = {"clip_low_threshold": LOW, "clip_high_threshold": HIGH, "beta": BETA}


def _arrays(seed: int = 0, size: int = 24) -> tuple[np.ndarray, Arrays]:
    rng = np.random.default_rng(seed)
    p = -rng.random(size) * 3
    return p, {
        "weights": rng.standard_normal(size),
        # Ratios on both sides of both bounds, and inside.
        "logprobs": p + rng.uniform(-0.4, 0.4, size),
        "advantages": rng.standard_normal(size),
        "sequence_ratio_mask": (rng.random(size) > 0.2).astype(float),
        "sequence": np.repeat([0, 1], size // 2).astype(float),
    }


def test_every_loss_has_a_twin() -> None:
    assert set(TWINS) == set(LOSSES)


@pytest.mark.parametrize("name", list(LOSSES))
def test_value_and_gradient(name: str) -> None:
    p, arrays = _arrays()
    inputs = {key: torch.from_numpy(values) for key, values in arrays.items()}
    value, gradient = loss_and_gradient(LOSSES[name], torch.from_numpy(p), inputs, CONFIG)
    assert value == pytest.approx(TWINS[name](p, arrays, p), rel=1e-12)
    step = 1e-6
    for index in range(len(p)):
        moved = p.copy()
        moved[index] = p[index] + step
        above = TWINS[name](moved, arrays, p)
        moved[index] = p[index] - step
        below = TWINS[name](moved, arrays, p)
        assert float(gradient[index]) == pytest.approx((above - below) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_on_policy_gradient_is_that_of_weighted_cross_entropy(name: str) -> None:
    p, arrays = _arrays()
    arrays["logprobs"] = p.copy()
    inputs = {key: torch.from_numpy(values) for key, values in arrays.items()}
    _, gradient = loss_and_gradient(LOSSES[name], torch.from_numpy(p), inputs, CONFIG)
    np.testing.assert_allclose(gradient.numpy(), -arrays["advantages"], rtol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_bounds_per_token_replace_the_configured_ones(name: str) -> None:
    p, arrays = _arrays()
    inputs = {key: torch.from_numpy(values) for key, values in arrays.items()}
    ones = torch.ones(len(p), dtype=torch.float64)
    own = inputs | {"clip_low_threshold": LOW * ones, "clip_high_threshold": HIGH * ones}
    other = {"clip_low_threshold": 0.1, "clip_high_threshold": 9.0}
    wanted = loss_and_gradient(LOSSES[name], torch.from_numpy(p), inputs, CONFIG)
    found = loss_and_gradient(LOSSES[name], torch.from_numpy(p), own, other)
    assert found[0] == pytest.approx(wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("name", list(LOSSES))
def test_whole_gradient_by_finite_difference(name: str, train_unembed: bool) -> None:
    """Through the model: the loss along a random direction of the adapter's parameters."""
    from tinker_cookbook.local.engine.types import LoraSpec

    run = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1, train_unembed=train_unembed))
    data = [_rl_datum(run, name, seed) for seed in range(3)]
    loss = LossSpec(name, {"beta": BETA} if name == "dro" else {})
    run.forward_backward(data, loss)
    gradient = run.gradient
    assert gradient is not None
    direction = gradient / gradient.norm()
    start, step = run.adapter.parameters.clone(), 2e-3
    losses = []
    for sign in (1, -1):
        run.adapter.parameters.copy_(start + sign * step * direction)
        run.adapter.version += 1
        losses.append(run.forward_backward(data, loss, backward=False).metrics["loss:sum"])
    slope = (losses[0] - losses[1]) / (2 * step)
    if name in ("cispo", "gspo"):
        # Their gradient leaves the ratio out on purpose: it is not the derivative of the value.
        assert slope != 0
        return
    # Central difference in float32; curvature along the gradient adds some percent.
    assert slope == pytest.approx(float(gradient.norm()), rel=0.05)


def _rl_datum(run, name: str, seed: int) -> TrainDatum:
    """On-policy up to noise that stays inside the clip bounds."""
    rng = np.random.default_rng(seed)
    datum = random_datum(rng, 20, run.model.vocab_size)
    if name == "cross_entropy":
        return datum
    forward = run.forward_backward([datum], LossSpec("cross_entropy"), backward=False)
    targets = datum.loss_inputs["target_tokens"]
    inputs = {
        "target_tokens": targets,
        "logprobs": (forward.logprobs[0] + rng.uniform(-0.05, 0.05, 20)).astype(np.float32),
        "advantages": rng.standard_normal(20).astype(np.float32),
    }
    if name == "gspo":
        inputs["sequence_ratio_mask"] = np.ones(20, np.float32)
    return TrainDatum(datum.tokens, inputs)


def test_by_sequence_loss_through_packs() -> None:
    """A gspo datum has the same gradient alone and together with others."""
    run = make_run(tiny_model("llama"))
    data = [_rl_datum(run, "gspo", seed) for seed in range(3)]
    together = run.forward_backward(data, LossSpec("gspo"))
    gradient, run.gradient = run.gradient, None
    alone = [run.forward_backward([datum], LossSpec("gspo")) for datum in data]
    assert gradient is not None
    assert run.gradient is not None
    assert (gradient - run.gradient).norm() / gradient.norm() < 1e-5
    total = sum(result.metrics["loss:sum"] for result in alone)
    assert together.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)


def test_the_client_describes_the_losses_as_the_engine_declares_them() -> None:
    offered = {name: loss for name, loss in algorithms.LOSSES.items() if loss.on_local_service}
    assert set(offered) == {name for name, loss in LOSSES.items() if "advantages" in loss.inputs}
    assert set(algorithms.LOSSES) - set(offered) == set(UNAVAILABLE)
    for name, described in offered.items():
        assert set(described.settings) == set(LOSSES[name].settings)
        inputs = {"logprobs", "advantages", *described.extra_inputs}
        assert inputs == set(LOSSES[name].inputs)


def test_drivers_and_orders_name_declared_inputs_and_settings() -> None:
    for loss in LOSSES.values():
        assert loss.driver in ("", *loss.inputs)
        assert set(loss.ordered or ()) <= set(loss.settings)
        for setting in loss.settings.values():
            assert setting.low <= setting.default <= setting.high
