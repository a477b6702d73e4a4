"""Unusable requests: refused before anything is computed, with the field and the value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.local.engine.training_data import make_run, random_datum
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.training.batch_checks import check_batch, check_loss
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    ImageInput,
    LoraSpec,
    LossSpec,
    SparseRows,
    TrainDatum,
)
from tinker_cookbook.local.errors import UserError

VOCAB, CONTEXT = 100, 64
ONES = np.ones(6, np.float32)


def _datum(num_tokens: int = 6, **changes: object) -> TrainDatum:
    datum = random_datum(np.random.default_rng(0), num_tokens, VOCAB)
    inputs = {**datum.loss_inputs, **changes}
    kept = {key: value for key, value in inputs.items() if value is not None}
    return replace(datum, loss_inputs=kept)


def _check(datum: TrainDatum, loss: str = "cross_entropy") -> None:
    everything = dict.fromkeys(("logprobs", "advantages", "sequence_ratio_mask"), ONES)
    good = _datum(**everything)
    check_batch([good, datum], loss, vocab_size=VOCAB, max_tokens=CONTEXT)


def _rl(**changes: object) -> TrainDatum:
    zeros = np.zeros(6, np.float32)
    return _datum(6, **({"weights": None, "logprobs": zeros, "advantages": zeros} | changes))


BAD_DATA = {
    "no tokens": (_datum(0), "cross_entropy", r"data\[1\]: model_input has no tokens"),
    "over-long": (_datum(65), "cross_entropy", "65 tokens and the model's context is 64"),
    "token id": (
        replace(_datum(), tokens=np.array([1, 2, 100, 3, 4, 5], np.int32)),
        "cross_entropy",
        r"model_input: token id 100 at position 2 is out of range.*0 to 99",
    ),
    "negative token id": (
        replace(_datum(), tokens=np.array([1, -2, 0, 3, 4, 5], np.int32)),
        "cross_entropy",
        "token id -2 at position 1",
    ),
    "target id": (
        _datum(target_tokens=np.array([0, 0, 0, 0, 0, 999])),
        "cross_entropy",
        "target_tokens: token id 999 at position 5",
    ),
    "no targets": (_datum(target_tokens=None), "cross_entropy", "lacks 'target_tokens'"),
    "no weights": (_datum(weights=None), "cross_entropy", "lacks 'weights'"),
    "no advantages": (_rl(advantages=None), "ppo", "lacks 'advantages'; ppo needs"),
    "no mask": (_rl(), "gspo", "lacks 'sequence_ratio_mask'"),
    "lengths": (
        _datum(target_tokens=np.zeros(5, np.int64)),
        "cross_entropy",
        r"target_tokens has shape \[5\] and model_input 6 tokens",
    ),
    "weights' length": (
        _datum(weights=np.ones(7, np.float32)),
        "cross_entropy",
        r"weights has shape \[7\] and target_tokens \[6\]",
    ),
    "float targets": (_datum(target_tokens=ONES), "cross_entropy", "dtype float32; int64"),
    "int weights": (_datum(weights=np.ones(6, np.int64)), "cross_entropy", "dtype int64; float32"),
    "three axes": (
        _datum(target_tokens=np.zeros((6, 1, 1), np.int64)),
        "cross_entropy",
        r"shape \[6, 1, 1\]",
    ),
    "several targets": (
        _rl(target_tokens=np.zeros((6, 2), np.int64)),
        "ppo",
        "ppo takes one target per position",
    ),
    "nan": (
        _datum(weights=np.array([0, 0, np.nan, 0, 0, 0], np.float32)),
        "cross_entropy",
        r"weights\[2\]=nan is not finite",
    ),
    "inf": (_rl(advantages=ONES * np.inf), "ppo", r"advantages\[0\]=inf is not finite"),
    "unknown input": (_datum(weight=ONES), "cross_entropy", "'weight'.*did you mean 'weights'"),
    "image": (
        replace(_datum(), images=(ImageInput(0, b"", "png", 1),)),
        "cross_entropy",
        "holds an image, and this model reads text only",
    ),
    "crossed bounds": (
        _rl(clip_low_threshold=ONES * 2, clip_high_threshold=ONES),
        "ppo",
        "clip_low_threshold is above",
    ),
    "broken sparse rows": (
        _datum(
            weights=SparseRows(
                np.ones(1, np.float32), np.array([0, 1, 0, 0, 0, 0, 1]), np.array([7]), (6, 2)
            )
        ),
        "cross_entropy",
        "crow_indices must begin at 0, never fall and end at",
    ),
}


@pytest.mark.parametrize("case", list(BAD_DATA))
def test_bad_datum_is_named(case: str) -> None:
    datum, loss, message = BAD_DATA[case]
    with pytest.raises(UserError, match=message):
        _check(datum, loss)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LossSpec("cross_entropi"), "did you mean 'cross_entropy'"),
        (LossSpec("stable_reinforce"), "not available here"),
        (LossSpec("ppo", {"clip_low": 0.5}), "'clip_low', unknown to ppo"),
        (LossSpec("cross_entropy", {"beta": 0.5}), "this loss has no settings"),
        (LossSpec("dro", {"beta": float("nan")}), "beta=nan is not usable"),
        (LossSpec("dro", {"beta": "high"}), "beta='high' is not usable"),
        (LossSpec("ppo", {"clip_low_threshold": 3.0}), "is above clip_high_threshold=1.2"),
    ],
)
def test_bad_loss_is_named(spec: LossSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_loss(spec)


def test_empty_request() -> None:
    with pytest.raises(UserError, match="data is empty"):
        check_batch([], "cross_entropy", vocab_size=VOCAB, max_tokens=CONTEXT)


def test_sparse_rows_equal_dense_ones() -> None:
    """Targets and weights may list different cells; what is not listed is 0."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, VOCAB, (6, 3)) * (rng.random((6, 3)) > 0.5)
    weights = (rng.standard_normal((6, 3)) * (rng.random((6, 3)) > 0.5)).astype(np.float32)
    sparse = _datum(target_tokens=_to_sparse(targets), weights=_to_sparse(weights))
    dense = _datum(target_tokens=targets, weights=weights)
    found, wanted = check_batch(
        [sparse, dense], "cross_entropy", vocab_size=VOCAB, max_tokens=CONTEXT
    )
    np.testing.assert_array_equal(found.targets, wanted.targets)
    np.testing.assert_array_equal(found.inputs["weights"], wanted.inputs["weights"])


def _to_sparse(dense: np.ndarray) -> SparseRows:
    rows, columns = np.nonzero(dense)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return SparseRows(dense[rows, columns], starts, columns, dense.shape)


def test_refused_batch_leaves_no_gradient() -> None:
    run = make_run(tiny_model("llama"))
    good = random_datum(np.random.default_rng(0), 10, run.model.vocab_size)
    bad = replace(good, tokens=np.array([10**6] * 10, np.int32))
    with pytest.raises(UserError):
        run.forward_backward([good, bad], LossSpec("cross_entropy"))
    assert run.gradient is None


@pytest.mark.parametrize("gap", [200.0, 5e37])
def test_overflow_is_refused_and_leaves_no_gradient(gap: float) -> None:
    """Finite inputs whose ratio is not: the adapter must survive."""
    run = make_run(tiny_model("llama"))
    datum = random_datum(np.random.default_rng(0), 10, run.model.vocab_size)
    inputs = {
        "target_tokens": datum.loss_inputs["target_tokens"],
        "logprobs": np.full(10, -gap, np.float32),
        "advantages": np.ones(10, np.float32),
    }
    with pytest.raises(UserError, match="out of the range of float32"):
        run.forward_backward([TrainDatum(datum.tokens, inputs)], LossSpec("importance_sampling"))
    assert run.gradient is None
    result = run.forward_backward([datum], LossSpec("cross_entropy"))
    assert np.isfinite(result.metrics["loss:sum"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"eps": float("inf")}, "eps=inf"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"grad_clip_norm": -0.1}, "grad_clip_norm=-0.1"),
    ],
)
def test_bad_adam_settings_are_refused_and_keep_the_gradient(changes: dict, message: str) -> None:
    run = make_run(tiny_model("llama"))
    run.forward_backward(
        [random_datum(np.random.default_rng(0), 10, run.model.vocab_size)],
        LossSpec("cross_entropy"),
    )
    before = run.adapter.parameters.clone()
    with pytest.raises(UserError, match=message):
        run.optim_step(replace(AdamSpec(), **changes))
    assert run.gradient is not None
    assert before.equal(run.adapter.parameters)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(rank=-1), "rank=-1"),
        (LoraSpec(rank=10**7), "rank=10000000"),
        (LoraSpec(train_attn=False, train_mlp=False, train_unembed=False), "all false"),
    ],
)
def test_bad_adapter_shape_is_refused(spec: LoraSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run(tiny_model("llama"), spec, random_b=False)
