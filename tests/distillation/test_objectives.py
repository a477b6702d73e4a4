"""Objectives against finite differences through a softmax, closed forms, and identity cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tinker_cookbook.distillation import objectives
from tinker_cookbook.distillation.objectives import TOP_K_DIVERGENCES
from tinker_cookbook.distillation.on_policy_loop import ScoredDatum, cut_at_floor
from tinker_cookbook.distillation.target_cache import Targets

VOCAB, POSITIONS = 30, 4
STEP = 1e-6


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of a student and of a teacher, [T, V]."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (POSITIONS, VOCAB)), rng.normal(0, 2, (POSITIONS, VOCAB))


def top(teacher: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-teacher, axis=-1)[:, :count]


def at(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_softmax(logits), ids, -1)


def numeric_gradient(value: Callable[[np.ndarray], float], logits: np.ndarray) -> np.ndarray:
    gradient = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = STEP
        gradient[index] = (value(logits + moved) - value(logits - moved)) / (2 * STEP)
    return gradient


def service_gradient(weights: np.ndarray, ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the gradient of the service's loss -sum(weights * log p) by the logits."""
    spread = np.zeros_like(logits)
    for row in range(len(ids)):
        np.add.at(spread[row], ids[row], weights[row])
    return -spread + np.exp(log_softmax(logits)) * spread.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
@pytest.mark.parametrize("count", [1, 5, VOCAB - 1])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_gradient_through_a_softmax(name: str, count: int, seed: int):
    divergence = TOP_K_DIVERGENCES[name]
    student, teacher = draw(seed)
    ids = top(teacher, count)

    def value(logits: np.ndarray) -> float:
        return divergence(at(logits, ids), at(teacher, ids)).value_T.sum()

    weights = divergence(at(student, ids), at(teacher, ids)).weights_TK
    np.testing.assert_allclose(
        service_gradient(weights, ids, student), numeric_gradient(value, student), atol=1e-7
    )


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_the_gradient_of_any_mixture(beta: float):
    student, teacher = draw(5)
    ids = top(teacher, 6)

    def value(logits: np.ndarray) -> float:
        return objectives.jensen_shannon(at(logits, ids), at(teacher, ids), beta).value_T.sum()

    weights = objectives.jensen_shannon(at(student, ids), at(teacher, ids), beta).weights_TK
    np.testing.assert_allclose(
        service_gradient(weights, ids, student), numeric_gradient(value, student), atol=1e-7
    )


@pytest.mark.parametrize("name", TOP_K_DIVERGENCES)
def test_equal_models_give_zero(name: str):
    student, _ = draw(0)
    ids = top(student, 5)
    found = TOP_K_DIVERGENCES[name](at(student, ids), at(student, ids))
    np.testing.assert_allclose(found.value_T, 0, atol=1e-12)
    np.testing.assert_allclose(found.weights_TK, 0, atol=1e-12)


def full_kl(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    one, other = log_softmax(first), log_softmax(second)
    return (np.exp(one) * (one - other)).sum(-1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_more_tokens_bring_the_value_to_the_kl_of_the_vocabulary(name: str):
    student, teacher = draw(2)
    exact = full_kl(teacher, student) if name == "forward_kl" else full_kl(student, teacher)
    values = []
    for count in (1, 4, 12, VOCAB - 1):
        ids = top(teacher, count)
        values.append(TOP_K_DIVERGENCES[name](at(student, ids), at(teacher, ids)).value_T)
    assert float(np.diff(np.array(values), axis=0).min()) >= -1e-12
    assert (values[0] < exact).all()
    np.testing.assert_allclose(values[-1], exact, atol=1e-9)
    ids = top(teacher, VOCAB)
    whole = TOP_K_DIVERGENCES[name](at(student, ids), at(teacher, ids)).value_T
    np.testing.assert_allclose(whole, exact, atol=1e-3)  # the floor of the empty rest


def test_the_full_vocabulary_gives_the_gradient_of_cross_entropy():
    student, teacher = draw(3)
    ids = top(teacher, VOCAB)
    weights = objectives.forward_kl(at(student, ids), at(teacher, ids)).weights_TK
    wanted = np.exp(log_softmax(student)) - np.exp(log_softmax(teacher))
    np.testing.assert_allclose(service_gradient(weights, ids, student), wanted, atol=1e-3)


def minimize(weigh: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return the probability that the minimum gives to the tokens `ids`, [T, K]."""
    logits = np.zeros((POSITIONS, VOCAB))
    for _ in range(20_000):
        logits -= 0.5 * service_gradient(weigh(at(logits, ids)), ids, logits)
    return np.exp(at(logits, ids))


def test_the_rest_bucket_finds_the_teacher_and_renormalizing_does_not():
    _, teacher = draw(1)
    ids = top(teacher, 3)
    wanted = np.exp(at(teacher, ids))
    known = at(teacher, ids)
    with_rest = minimize(lambda student: objectives.forward_kl(student, known).weights_TK, ids)
    np.testing.assert_allclose(with_rest, wanted, atol=1e-6)
    biased = minimize(lambda student: objectives.forward_kl_renormalized(known), ids)
    assert (biased.sum(-1) > 0.99).all()
    assert (wanted.sum(-1) < 0.95).any()


def test_drawn_targets_give_the_full_gradient_on_average():
    student, teacher = draw(4)
    rng = np.random.default_rng(0)
    q = np.exp(log_softmax(teacher))
    draws = 40_000
    ids = np.stack([rng.choice(VOCAB, draws, p=row) for row in q])
    found = service_gradient(objectives.forward_kl_sampled(ids), ids, student)
    wanted = np.exp(log_softmax(student)) - q
    np.testing.assert_allclose(found, wanted, atol=4 * 0.5 / draws**0.5)


def test_advantages_are_the_gradient_of_the_reverse_kl_on_average():
    """Policy gradient over all tokens: sum of p A grad log p is minus the gradient of the KL."""
    student, teacher = draw(6)
    logp, logq = log_softmax(student), log_softmax(teacher)
    p = np.exp(logp)
    advantages = np.stack(
        [
            objectives.reverse_kl_advantages(a, b, np.ones(VOCAB))
            for a, b in zip(logp, logq, strict=True)
        ]
    )
    found = p * advantages - p * (p * advantages).sum(-1, keepdims=True)
    numeric = numeric_gradient(lambda logits: full_kl(logits, teacher).sum(), student)
    np.testing.assert_allclose(found, -numeric, atol=1e-7)


def test_advantages_count_later_tokens_with_a_discount():
    student = np.array([-1.0, np.nan, -2.0, -3.0])
    teacher = np.array([-1.5, np.nan, -1.0, -3.25])
    mask = np.array([1.0, 0.0, 1.0, 1.0])

    def found(**settings: float) -> list[float]:
        return objectives.reverse_kl_advantages(student, teacher, mask, **settings).tolist()

    assert found() == [-0.5, 0.0, 1.0, -0.25]
    assert found(coef=2.0) == [-1.0, 0.0, 2.0, -0.5]
    assert found(discount=1.0) == [0.25, 0.0, 0.75, -0.25]
    assert found(discount=0.5) == [-0.5 + 0.5 * 0.875, 0.0, 0.875, -0.25]
    same = objectives.reverse_kl_advantages(student, student, mask, discount=0.9)
    assert same.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_estimates_average_to_the_kl():
    student, teacher = draw(7)
    logp, logq = log_softmax(student), log_softmax(teacher)
    k1, k3 = objectives.kl_estimates(logp, logq)
    wanted = full_kl(student, teacher)
    np.testing.assert_allclose((np.exp(logp) * k1).sum(-1), wanted, atol=1e-12)
    np.testing.assert_allclose((np.exp(logp) * k3).sum(-1), wanted, atol=1e-12)
    assert (k3 >= 0).all()


def test_entropy_of_the_whole_vocabulary_and_of_a_part():
    _, teacher = draw(8)
    logq = log_softmax(teacher)
    exact = -(np.exp(logq) * logq).sum(-1)
    part = objectives.rest_entropy(at(teacher, top(teacher, 5)))
    nearly = objectives.rest_entropy(at(teacher, top(teacher, VOCAB - 1)))
    assert (part < exact).all()
    np.testing.assert_allclose(nearly, exact, atol=1e-4)  # the floor of the rest


def test_tokens_with_no_probability_stay_finite():
    student = np.array([[-2000.0, 0.0]])
    teacher = np.array([[0.0, -2000.0]])
    for divergence in TOP_K_DIVERGENCES.values():
        found = divergence(student, teacher)
        assert np.isfinite(found.value_T).all()
        assert np.isfinite(found.weights_TK).all()


def test_what_follows_an_improbable_token_is_left_out():
    targets = Targets(np.arange(8, dtype=np.int32).reshape(4, 2), np.zeros((4, 2), np.float32))
    positions, student = np.array([3, 4, 7, 8]), np.full(4, -1.0)
    teacher = np.log([0.5, 0.02, 0.9, 0.9])
    score = ScoredDatum(positions, student, teacher, targets)
    assert cut_at_floor(score, 0.0) is score
    assert cut_at_floor(score, 0.01) is score
    cut = cut_at_floor(score, 0.05)
    assert cut.positions_n.tolist() == [3, 4], "the improbable token itself is trained"
    assert cut.teacher_n.tolist() == teacher[:2].tolist()
    assert len(cut.student_n) == 2
    assert cut.targets is not None
    assert cut.targets.tokens_nK.tolist() == [[0, 1], [2, 3]]
    without = cut_at_floor(ScoredDatum(positions, student, teacher, None), 0.05)
    assert without.targets is None
    assert len(without.positions_n) == 2
