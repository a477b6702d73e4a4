"""The SDK's own conversions against ours: what it sends is read, what we send it reads."""

# pyright: reportAttributeAccessIssue=false

import numpy as np
import pytest
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tinker_cookbook.local.engine.types import (
    SampledSequence,
    SampleResult,
    SparseRows,
    TokenLogprobs,
    TrainDatum,
    TrainResult,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol import protobuf as proto
from tinker_cookbook.local.service.protocol import wire

TOKENS = [3, 1, 4, 1, 5]


def make_datum(model_input: tinker.ModelInput | None = None, **inputs) -> tinker.Datum:
    tensors = {
        name: value if isinstance(value, tinker.TensorData) else tinker.TensorData.from_numpy(value)
        for name, value in inputs.items()
    }
    return tinker.Datum(
        model_input=model_input or tinker.ModelInput.from_ints(TOKENS), loss_fn_inputs=tensors
    )


def decode(*data: tinker.Datum, config=None, max_data: int = 100) -> list[TrainDatum]:
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(
            data=list(data), loss_fn="cross_entropy", loss_fn_config=config
        ),
        model_id="run",
        seq_id=1,
    )
    body = forward_backward_request_to_proto(request).SerializeToString()
    return wire.decode_data(wire.decode_train_request(body), max_data=max_data)


def targets(shape=(5,)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(np.int64)


def test_a_request_arrives_as_it_was_sent() -> None:
    weights = np.linspace(-1, 1, 5, dtype=np.float32)
    datum = make_datum(target_tokens=targets(), weights=weights)
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(
            data=[datum], loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.7, "note": "x"}
        ),
        model_id="a:train:0",
        seq_id=7,
    )
    message = forward_backward_request_to_proto(request)
    message.forward_only = True
    read = wire.decode_train_request(message.SerializeToString())
    assert (read.model_id, read.seq_id, read.forward_only) == ("a:train:0", 7, True)
    assert read.loss.name == "ppo"
    assert read.loss.config == {"clip_low_threshold": 0.7, "note": "x"}
    (decoded,) = wire.decode_data(read, max_data=1)
    np.testing.assert_array_equal(decoded.tokens, TOKENS)
    assert decoded.tokens.dtype == np.int32
    np.testing.assert_array_equal(decoded.loss_inputs["weights"], weights)
    assert decoded.loss_inputs["target_tokens"].dtype == np.int64


def test_chunks_are_joined_and_images_keep_their_place() -> None:
    chunks = [
        tinker.EncodedTextChunk(tokens=[1, 2]),
        tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=2),
        tinker.EncodedTextChunk(tokens=[9]),
    ]
    (datum,) = decode(make_datum(tinker.ModelInput(chunks=chunks), weights=np.ones(5, np.float32)))
    np.testing.assert_array_equal(datum.tokens, [1, 2, 0, 0, 9])
    (image,) = datum.images
    assert (image.position, image.data, image.format, image.expected_tokens) == (
        2,
        b"png",
        "png",
        2,
    )


def test_sparse_tensors_stay_sparse() -> None:
    sparse = tinker.TensorData(
        data=[7, 8],
        dtype="int64",
        shape=[5, 3],
        sparse_crow_indices=[0, 1, 1, 1, 2, 2],
        sparse_col_indices=[2, 0],
    )
    (datum,) = decode(make_datum(target_tokens=sparse))
    rows = datum.loss_inputs["target_tokens"]
    assert isinstance(rows, SparseRows)
    assert rows.shape == (5, 3)
    np.testing.assert_array_equal(rows.values, [7, 8])
    np.testing.assert_array_equal(rows.crow_indices, [0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(rows.col_indices, [2, 0])


def sparse(crow, col, data=(1.0,), shape=(5, 3)) -> tinker.TensorData:
    return tinker.TensorData(
        data=list(data),
        dtype="float32",
        shape=list(shape),
        sparse_crow_indices=list(crow),
        sparse_col_indices=list(col),
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"weights": np.ones(4, np.float32)}, "has 4 positions, but model_input has 5 tokens"),
        ({"weights": np.ones((2, 5), np.float32)}, "has 2 positions"),
        ({"weights": np.ones((5, 1, 1), np.float32)}, r"shape \[5, 1, 1\]"),
        ({"weights": np.array([1, 2, np.nan, 4, 5], np.float32)}, "holds nan at value 2"),
        ({"weights": np.array([1, 2, 3, 4, np.inf], np.float32)}, "holds inf at value 4"),
        ({"weights": sparse([0, 1, 1, 1, 1], [0])}, "crow_indices must have 6 values"),
        ({"weights": sparse([0, 2, 1, 1, 1, 1], [0])}, "never fall"),
        ({"weights": sparse([0, 2**63 - 1, -(2**63), -1, 0, 1], [0])}, "never fall"),
        ({"weights": sparse([-(2**63), 2**63 - 1, -1, 0, 0, 1], [0])}, "begin at 0"),
        ({"weights": sparse([0, 1, 1, 1, 1, 1], [-(2**63)])}, r"outside 0\.\.2"),
        ({"weights": sparse([0, 1, 1, 1, 1, 1], [3])}, r"outside 0\.\.2"),
        ({"weights": sparse([0, 1, 1, 1, 1, 2], [0])}, "must be equal"),
        ({"weights": sparse([0, 1, 1, 1, 1, 1], [0], shape=(5, 2**30))}, "K up to"),
    ],
)
def test_wrong_tensors_are_refused_with_datum_and_field(inputs, message: str) -> None:
    good = make_datum(weights=np.ones(5, np.float32))
    with pytest.raises(UserError, match=rf"data\[1\]\.loss_fn_inputs\['weights'\].*{message}"):
        decode(good, make_datum(**inputs))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2**62, 0], "positions, but model_input has 5"),
        ([5, 2**62], "K up to"),
        ([5, -1], "K up to"),
        ([-5], "positions"),
        ([5, 0, 0], "K up to"),
        ([5, 1], "holds 0 values"),
    ],
)
def test_shapes_that_the_data_do_not_have(shape: list[int], message: str) -> None:
    datum = make_datum(weights=np.ones(5, np.float32))
    sent = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(data=[datum], loss_fn="cross_entropy"),
        model_id="run",
        seq_id=1,
    )
    body = forward_backward_request_to_proto(sent)
    tensor = body.data[0].loss_fn_inputs["weights"]
    tensor.dense = b""
    tensor.shape[:] = shape
    request = wire.decode_train_request(body.SerializeToString())
    with pytest.raises(UserError, match=rf"data\[0\]\.loss_fn_inputs\['weights'\].*{message}"):
        wire.decode_data(request, max_data=1)


def test_small_requests_do_not_become_large_ones() -> None:
    """Sparse tensors and images take what they say, not what they send; 64 such make gigabytes."""
    wide = sparse([0, 1, 1, 1, 1, 1], [0], shape=(5, 2**20))
    with pytest.raises(UserError, match=r"data\[\d+\]\.loss_fn_inputs\['weights'\].*few bytes"):
        decode(*[make_datum(weights=wide)] * 64)
    assert len(decode(make_datum(weights=wide))) == 1
    image = tinker.types.ImageChunk(data=b"png", format="png", expected_tokens=1_000_000)
    pictures = tinker.ModelInput(chunks=[image] * 32)
    with pytest.raises(UserError, match=r"data\[0\]\.model_input\.chunks\[\d+\].*few bytes"):
        decode(make_datum(pictures))


def test_other_refusals() -> None:
    good = make_datum(weights=np.ones(5, np.float32))
    with pytest.raises(UserError, match="empty"):
        decode()
    with pytest.raises(UserError, match="at most 1"):
        decode(good, good, max_data=1)
    with pytest.raises(UserError, match=r"data\[0\]\.model_input has no tokens"):
        decode(make_datum(tinker.ModelInput.empty()))
    with pytest.raises(UserError, match=r"loss_fn_config\['beta'\]=nan"):
        decode(good, config={"beta": float("nan")})
    audio = tinker.ModelInput(chunks=[tinker.types.DmelChunk(dmel=b"x")])
    with pytest.raises(UserError, match="dmel chunk"):
        decode(make_datum(audio))
    image = tinker.types.ImageChunk(data=b"x", format="png")
    with pytest.raises(UserError, match="expected_tokens=None"):
        decode(make_datum(tinker.ModelInput(chunks=[image])))


def test_random_bytes_are_refused_or_read_but_never_crash() -> None:
    rng = np.random.default_rng(0)
    datum = make_datum(target_tokens=targets(), weights=np.ones(5, np.float32))
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(data=[datum], loss_fn="cross_entropy"),
        model_id="run",
        seq_id=1,
    )
    good = bytearray(forward_backward_request_to_proto(request).SerializeToString())
    for _ in range(3000):
        body = bytearray(good)
        for position in rng.integers(0, len(body), rng.integers(1, 6)):
            body[position] = rng.integers(256)
        try:
            wire.decode_data(wire.decode_train_request(bytes(body)), max_data=10)
        except UserError:
            continue


def test_results_read_back_through_the_sdk() -> None:
    arrays = [
        np.array([-1.0, -2.0], np.float32),
        np.array([-3.0], np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((1, 3), np.float32),
        np.array([-4.0, -5.0, -6.0], np.float32),
    ]
    result = TrainResult(logprobs=arrays, metrics={"loss:sum": 2.5, "tokens:sum": 9})
    output = deserialize_forward_backward_output(wire.encode_train_result(result))
    assert output.metrics == {"loss:sum": 2.5, "tokens:sum": 9.0}
    assert len(output.loss_fn_outputs) == 5
    for expected, datum in zip(arrays, output.loss_fn_outputs, strict=True):
        np.testing.assert_array_equal(datum["logprobs"].to_numpy(), expected)


def test_samples_read_back_through_the_sdk() -> None:
    topk = TokenLogprobs(
        np.array([[0, 0], [4, 5]], np.int32), np.array([[-99999.0, -99999.0], [-1, -2]], np.float32)
    )
    sparse_targets = SparseRows(
        np.array([-0.5], np.float32), np.array([0, 1]), np.array([1]), (1, 2)
    )
    result = SampleResult(
        sequences=[
            SampledSequence(np.array([7, 8], np.int32), np.array([-1, -2], np.float32), "stop"),
            SampledSequence(np.zeros(0, np.int32), np.zeros(0, np.float32), "length", topk),
        ],
        prompt_logprobs=np.array([np.nan, -3], np.float32),
        topk_prompt_logprobs=topk,
        target_prompt_logprobs=sparse_targets,
        prompt_alt_tokens=TokenLogprobs(np.array([[4]]), np.array([[-1.5]])),
        prompt_cache_hit_tokens=3,
    )
    response = deserialize_sample_response(wire.encode_sample_result(result))
    assert response.sequences[0].tokens == [7, 8]
    assert response.sequences[0].logprobs == [-1.0, -2.0]
    assert [sequence.stop_reason for sequence in response.sequences] == ["stop", "length"]
    assert response.prompt_logprobs == [None, -3.0]
    assert response.topk_prompt_logprobs == [None, [(4, -1.0), (5, -2.0)]]
    assert response.prompt_cache_hit_tokens == 3
    assert response.target_prompt_logprobs is not None
    assert response.target_prompt_logprobs.tolist() == [[0.0, -0.5]]
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.tolist() == [[4]]


def test_the_proto_module_is_the_sdks_own_when_that_is_imported() -> None:
    import tinker.proto.tinker_public_pb2 as sdk_module

    assert (
        proto._load_from_file(proto._proto_path()).Datum.DESCRIPTOR is sdk_module.Datum.DESCRIPTOR
    )


def test_training_data_as_json_names_the_sdk_to_install():
    with pytest.raises(UserError, match=r"body is JSON.*tinker>=0\.35"):
        wire.decode_train_request(b'{"forward_backward_input": {"data": []}}')
