"""Protobuf messages of the SDK <-> dataclasses of the engine.

Axes: N input tokens of a datum, K targets per position, D datums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import DTypeLike

from tinker_cookbook.local.engine.csr import MAX_COLUMNS, check_csr
from tinker_cookbook.local.engine.types import (
    ImageInput,
    LossSpec,
    SampledSequence,
    SampleResult,
    SparseRows,
    TokenLogprobs,
    TrainDatum,
    TrainResult,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.protobuf import load_proto

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb

__all__ = [
    "TrainRequest",
    "decode_data",
    "decode_train_request",
    "encode_sample_result",
    "encode_train_result",
    "result_cells",
]

FREE_CELLS = 1 << 24
CELLS_PER_BYTE = 4
_FLOAT32, _INT64, _INT32, _BFLOAT16 = 1, 2, 3, 4
_ITEM_TYPES = {_FLOAT32: "<f4", _INT64: "<i8", _INT32: "<i4", _BFLOAT16: "<u2"}


@dataclass(frozen=True)
class TrainRequest:
    """A forward_backward request whose data are not yet decoded."""

    model_id: str
    seq_id: int
    loss: LossSpec
    forward_only: bool
    data: Sequence[pb.Datum]
    """Protobuf Datum messages."""
    num_bytes: int
    """Size of the request's body."""


class _Room:
    """Number of values that the rest of the data may take once decoded.

    Images and sparse tensors are larger in memory than in the request: they state their size.
    """

    def __init__(self, body_bytes: int) -> None:
        self._left = FREE_CELLS + CELLS_PER_BYTE * body_bytes

    def take(self, cells: int, name: str) -> None:
        """Subtract values, or raise a UserError that begins with `name`."""
        self._left -= cells
        if self._left < 0:
            raise UserError(
                f"{name} takes {cells} values in memory, which is too many for a request of few "
                "bytes; send fewer columns or images in one request"
            )


def decode_train_request(body: bytes) -> TrainRequest:
    """Parse the outer message.

    Raises:
        UserError: the body is not a ForwardBackwardRequest.
    """
    message = load_proto().ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        if body.lstrip()[:1] == b"{":
            raise UserError(
                "the request body is JSON, as tinker SDKs before 0.35 send training data; it must "
                "be protobuf. Install tinker>=0.35,<0.40 in the program that sends it."
            ) from error
        raise UserError(f"the request body is not a ForwardBackwardRequest: {error}") from error
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        config[key] = value.text if value.HasField("text") else value.number
    return TrainRequest(
        model_id=message.model_id,
        seq_id=message.seq_id,
        loss=LossSpec(message.loss_fn, config),
        forward_only=message.forward_only,
        data=message.data,
        num_bytes=len(body),
    )


def decode_data(request: TrainRequest, *, max_data: int) -> list[TrainDatum]:
    """Decode and check the data of a request.

    Raises:
        UserError: the message names the datum and the field.
    """
    for key, value in request.loss.config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"loss_fn_config[{key!r}]={value} is not finite; use a finite number")
    if not request.data:
        raise UserError("data=[] is empty; send at least one datum")
    if len(request.data) > max_data:
        raise UserError(f"data holds {len(request.data)} datums; at most {max_data} fit a request")
    room = _Room(request.num_bytes)
    return [
        _decode_datum(datum, f"data[{index}]", room) for index, datum in enumerate(request.data)
    ]


def _decode_datum(message: pb.Datum, where: str, room: _Room) -> TrainDatum:
    tokens, images = _decode_chunks(message.model_input, where, room)
    if tokens.size == 0:
        raise UserError(f"{where}.model_input has no tokens; send at least one")
    loss_inputs = {
        name: _decode_loss_input(tensor, tokens.size, f"{where}.loss_fn_inputs[{name!r}]", room)
        for name, tensor in message.loss_fn_inputs.items()
    }
    return TrainDatum(tokens=tokens, loss_inputs=loss_inputs, images=images)


def _decode_chunks(
    chunks: Iterable[pb.Chunk], where: str, room: _Room
) -> tuple[np.ndarray, tuple[ImageInput, ...]]:
    parts: list[np.ndarray] = []
    images: list[ImageInput] = []
    position = 0
    for index, chunk in enumerate(chunks):
        name = f"{where}.model_input.chunks[{index}]"
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            raw = chunk.encoded_text.tokens
            if len(raw) % 4:
                raise UserError(
                    f"{name} holds {len(raw)} bytes of tokens; expected a multiple of 4"
                )
            part = np.frombuffer(raw, dtype="<i4")
        elif kind == "image":
            image = chunk.image
            expected = image.expected_tokens if image.HasField("expected_tokens") else None
            images.append(ImageInput(position, image.data, image.format, expected))
            num_tokens = _image_length(expected, name)
            room.take(num_tokens, name)
            part = np.zeros(num_tokens, dtype=np.int32)
        else:
            raise UserError(
                f"{name} is a {kind or 'empty'} chunk; use encoded text or image chunks"
            )
        parts.append(part)
        position += part.size
    if not parts:
        return np.zeros(0, dtype=np.int32), ()
    return np.concatenate(parts).astype(np.int32, copy=False), tuple(images)


def _image_length(expected_tokens: int | None, name: str) -> int:
    if expected_tokens is None or not 0 <= expected_tokens <= 1_000_000:
        raise UserError(
            f"{name}: expected_tokens={expected_tokens} is not accepted; expected the number of "
            "tokens that the image takes"
        )
    return expected_tokens


def _decode_loss_input(
    message: pb.Tensor, num_tokens: int, name: str, room: _Room
) -> np.ndarray | SparseRows:
    shape = tuple(message.shape)
    if len(shape) > 2 or any(not 0 <= size <= MAX_COLUMNS for size in shape[1:]):
        raise UserError(
            f"{name} has shape {list(shape)}; expected [N] or [N, K] with K up to {MAX_COLUMNS}"
        )
    if shape:
        _check_positions(shape[0], num_tokens, name)
    if message.HasField("sparse_csr"):
        rows = _decode_sparse(message, shape, name)
        room.take(math.prod(rows.shape), name)
        return rows
    values = _decode_values(message.dense, message.dtype, name)
    if not shape and values.size == 1 != num_tokens:
        return values.reshape(())  # a single number, for custom losses
    shape = shape or (values.size,)
    _check_positions(shape[0], num_tokens, name)
    if math.prod(shape) != values.size:
        raise UserError(f"{name} has shape {list(shape)} but holds {values.size} values")
    return values.reshape(shape)


def _check_positions(num_positions: int, num_tokens: int, name: str) -> None:
    if num_positions != num_tokens:
        raise UserError(
            f"{name} has {num_positions} positions, but model_input has {num_tokens} tokens; "
            "every loss input needs one entry per input token"
        )


def _decode_values(raw: bytes, dtype: int, name: str) -> np.ndarray:
    item_type = _ITEM_TYPES.get(dtype)
    if item_type is None:
        raise UserError(f"{name} has dtype number {dtype}; use float32 or int64")
    if len(raw) % np.dtype(item_type).itemsize:
        raise UserError(f"{name} holds {len(raw)} bytes, which is not a whole number of values")
    values = np.frombuffer(raw, dtype=item_type).copy()  # torch needs writable memory
    if dtype == _BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif dtype == _INT32:
        values = values.astype(np.int64)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"{name} holds {values[position]} at value {position}; use finite numbers")
    return values


def _decode_sparse(message: pb.Tensor, shape: tuple[int, ...], name: str) -> SparseRows:
    csr = message.sparse_csr
    if len(shape) != 2:
        raise UserError(f"{name} is sparse with shape {list(shape)}; sparse tensors need [N, K]")
    rows = SparseRows(
        values=_decode_values(csr.values, message.dtype, name),
        crow_indices=_decode_values(csr.crow_indices, _INT64, f"{name}.crow_indices"),
        col_indices=_decode_values(csr.col_indices, _INT64, f"{name}.col_indices"),
        shape=(shape[0], shape[1]),
    )
    check_csr(rows, name)
    return rows


def encode_train_result(result: TrainResult) -> bytes:
    """Serialize a ForwardBackwardOutput.

    One record holds consecutive datums whose arrays have the same trailing shape. The client
    concatenates the records.
    """
    proto = load_proto()
    message = proto.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for key, value in result.metrics.items():
        message.metrics[key] = float(value)
    for group in _equal_trailing_shapes(result.logprobs):
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(group))
        lengths_D = np.array([0, *(array.nbytes for array in group)], dtype=np.int64)
        tensor = record.fields["logprobs"]
        tensor.data = b"".join(array.tobytes() for array in group)
        tensor.offsets = np.cumsum(lengths_D).tobytes()
        tensor.dtype = _FLOAT32
        tensor.trailing_shape.extend(group[0].shape[1:])
    return message.SerializeToString()


def _equal_trailing_shapes(arrays: Iterable[np.ndarray]) -> list[list[np.ndarray]]:
    groups: list[list[np.ndarray]] = []
    for array in arrays:
        array = np.ascontiguousarray(array, dtype=np.float32)
        if groups and groups[-1][0].shape[1:] == array.shape[1:]:
            groups[-1].append(array)
        else:
            groups.append([array])
    return groups


def result_cells(result: SampleResult) -> int:
    """Return about how many numbers a result holds."""
    topk = [sequence.topk_logprobs for sequence in result.sequences]
    topk += [result.topk_prompt_logprobs, result.prompt_alt_tokens]
    cells = sum(len(sequence.tokens) for sequence in result.sequences)
    return cells + sum(part.token_ids.size for part in topk if part is not None)


def encode_sample_result(result: SampleResult) -> bytes:
    """Serialize a SampleResponse."""
    message = load_proto().SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        _fill_sequence(message.sequences.add(), sequence)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _bytes(result.prompt_logprobs, np.float32)
    if result.topk_prompt_logprobs is not None:
        _fill_topk(message.topk_prompt_logprobs, result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        _fill_tensor(message.target_prompt_logprobs, result.target_prompt_logprobs, _FLOAT32)
    if result.prompt_alt_tokens is not None:
        alternatives = result.prompt_alt_tokens
        _fill_tensor(message.prompt_alt_tokens.tokens, alternatives.token_ids, _INT64)
        _fill_tensor(message.prompt_alt_tokens.logprobs, alternatives.logprobs, _FLOAT32)
    return message.SerializeToString()


def _bytes(array: np.ndarray, dtype: DTypeLike) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _fill_sequence(message: pb.SampledSequence, sequence: SampledSequence) -> None:
    stop_reason = 0 if sequence.stop_reason == "stop" else 1
    message.stop_reason = cast("pb.StopReason.ValueType", stop_reason)
    message.tokens = _bytes(sequence.tokens, np.int32)
    message.logprobs = _bytes(sequence.logprobs, np.float32)
    if sequence.topk_logprobs is not None:
        _fill_topk(message.topk_sampled_logprobs, sequence.topk_logprobs)


def _fill_topk(message: pb.TopkLogprobs, topk: TokenLogprobs) -> None:
    message.length, message.k = topk.token_ids.shape
    message.token_ids = _bytes(topk.token_ids, np.int32)
    message.logprobs = _bytes(topk.logprobs, np.float32)


def _fill_tensor(message: pb.Tensor, array: np.ndarray | SparseRows, dtype: int) -> None:
    message.dtype = cast("pb.DType.ValueType", dtype)
    item_type = _ITEM_TYPES[dtype]
    message.shape.extend(array.shape)
    if isinstance(array, SparseRows):
        message.sparse_csr.values = _bytes(array.values, item_type)
        message.sparse_csr.crow_indices = _bytes(array.crow_indices, np.int64)
        message.sparse_csr.col_indices = _bytes(array.col_indices, np.int64)
    else:
        message.dense = _bytes(array, item_type)
