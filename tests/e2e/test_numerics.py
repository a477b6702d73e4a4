"""Values of forward and forward_backward (NUM)."""

# pyright: reportArgumentType=false

import numpy as np
import pytest
import tinker

from tests.e2e.sdk import batch, datum, forward, logprobs_of, tensor, text, tokens
from tests.number_format import TRAINED_NATS, by_format

TOLERANCE = 2e-5  # scores are float32 sums, in another order, in any format
TRAINED_TOLERANCE = by_format(float32=TOLERANCE, bfloat16=TRAINED_NATS)


@pytest.fixture(scope="module")
def run(new_run) -> tinker.TrainingClient:
    return new_run()


def test_num_01_logprobs(run) -> None:
    data = batch()
    result = run.forward(data, "cross_entropy").result()
    for item, logprobs in zip(data, logprobs_of(result), strict=True):
        assert logprobs.dtype == np.float32
        assert logprobs.shape == (item.model_input.length,)
        assert np.isfinite(logprobs).all()
        assert (logprobs <= 0).all()


def test_num_02_loss_is_the_weighted_sum(run) -> None:
    ids = tokens(10)
    weights = np.linspace(-0.5, 2, 9)
    result = run.forward_backward([datum(ids, weights)], "cross_entropy").result()
    expected = -(weights * logprobs_of(result)[0]).sum()
    assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


def test_num_03_sum_over_a_ragged_batch(run) -> None:
    data = batch(4)
    whole = run.forward(data, "cross_entropy").result().metrics["loss:sum"]
    parts = [run.forward([item], "cross_entropy").result().metrics["loss:sum"] for item in data]
    assert whole == pytest.approx(sum(parts), rel=1e-5)


def test_num_04_forward_equals_forward_backward(run) -> None:
    data = batch()
    both = logprobs_of(run.forward_backward(data, "cross_entropy").result())
    for one, other in zip(forward(run, data), both, strict=True):
        np.testing.assert_allclose(one, other, atol=TRAINED_TOLERANCE)


def test_num_05_order_kept_and_no_batch_dependence(run) -> None:
    data = batch(5)
    together = forward(run, data)
    backwards = forward(run, data[::-1])[::-1]
    for item, one, other in zip(data, together, backwards, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)
        np.testing.assert_allclose(one, forward(run, [item])[0], atol=TOLERANCE)


def test_num_06_causality(run) -> None:
    ids = tokens(16)
    changed = [*ids[:10], *tokens(6, seed=9)]
    one, other = forward(run, [datum(ids), datum(changed)])
    np.testing.assert_allclose(one[:9], other[:9], atol=TOLERANCE)
    assert np.abs(one[9:] - other[9:]).max() > 1e-2


def test_num_07_targets_are_not_shifted(run) -> None:
    """Probabilities of all tokens at a position add up to 1, wherever the target stands."""
    info = run.get_tokenizer()
    vocab = len(info)
    ids = tokens(3)
    data = [
        tinker.Datum(
            model_input=text(ids),
            loss_fn_inputs={
                "target_tokens": tensor([token] * 3, np.int64),
                "weights": tensor(np.ones(3), np.float32),
            },
        )
        for token in range(vocab)
    ]
    probabilities = np.exp(np.stack(forward(run, data)))
    assert (probabilities <= 1).all()
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-4)


def many_targets(ids: list[int], targets: np.ndarray, weights: np.ndarray) -> tinker.Datum:
    inputs = {"target_tokens": tensor(targets, np.int64), "weights": tensor(weights, np.float32)}
    return tinker.Datum(model_input=text(ids), loss_fn_inputs=inputs)


def test_num_08_many_targets_per_position(run) -> None:
    ids = tokens(6)
    rng = np.random.default_rng(1)
    targets, weights = rng.integers(3, 300, (6, 3)), rng.random((6, 3))
    result = run.forward_backward([many_targets(ids, targets, weights)], "cross_entropy").result()
    (logprobs,) = logprobs_of(result)
    assert logprobs.shape == (6, 3)
    columns = [many_targets(ids, targets[:, k], weights[:, k]) for k in range(3)]
    np.testing.assert_allclose(logprobs, np.stack(forward(run, columns), 1), atol=TRAINED_TOLERANCE)
    assert result.metrics["loss:sum"] == pytest.approx(-(weights * logprobs).sum(), rel=1e-5)


def test_num_09_sparse_equals_dense(run) -> None:
    ids = tokens(8)
    targets, weights = np.zeros((8, 4), np.int64), np.zeros((8, 4), np.float32)
    targets[2, 1], targets[5, 0], targets[5, 3] = 7, 9, 11
    weights[2, 1], weights[5, 0] = 1.0, -0.5
    sparse_targets = tinker.TensorData(
        data=[7, 9, 11],
        dtype="int64",
        shape=[8, 4],
        sparse_crow_indices=[0, 0, 0, 1, 1, 1, 3, 3, 3],
        sparse_col_indices=[1, 0, 3],
    )
    sparse_weights = tinker.TensorData(
        data=[1.0, -0.5],
        dtype="float32",
        shape=[8, 4],
        sparse_crow_indices=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        sparse_col_indices=[1, 0],
    )
    inputs = {"target_tokens": sparse_targets, "weights": sparse_weights}
    sparse = tinker.Datum(model_input=text(ids), loss_fn_inputs=inputs)
    dense = many_targets(ids, targets, weights)
    one = run.forward([sparse], "cross_entropy").result()
    other = run.forward([dense], "cross_entropy").result()
    assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=1e-5)
    np.testing.assert_allclose(logprobs_of(one)[0], logprobs_of(other)[0], atol=TOLERANCE)


def test_num_10_chunks_join(run) -> None:
    ids = tokens(12)
    whole = datum(ids)
    chunks = [tinker.EncodedTextChunk(tokens=part) for part in (ids[:4], ids[4:5], ids[5:-1])]
    parts = tinker.Datum(
        model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs=whole.loss_fn_inputs
    )
    one, other = forward(run, [whole, parts])
    np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_num_11_more_than_a_thousand_data(run) -> None:
    data = [datum(tokens(6, seed=number)) for number in range(1100)]
    result = run.forward(data, "cross_entropy").result()
    assert len(result.loss_fn_outputs) == 1100
    (last,) = forward(run, data[-1:])
    np.testing.assert_allclose(logprobs_of(result)[-1], last, atol=TOLERANCE)


def test_num_12_metric_names(run) -> None:
    metrics = run.forward_backward(batch(), "cross_entropy").result().metrics
    assert "loss:sum" in metrics
    assert all(name.count(":") == 1 for name in metrics)
