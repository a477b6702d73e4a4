"""Routes that create and train runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.engine.types import LoraSpec, TrainDatum
from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.local.limits import MAX_INT32
from tinker_cookbook.local.service.protocol.bodies import (
    CreateModel,
    GetInfo,
    LoadIntoRun,
    LoadWeights,
    NewRun,
    NumberedRequest,
)
from tinker_cookbook.local.service.protocol.engine_requests import (
    ADAMW,
    decode_adam,
    decode_lora,
    refuse_other_optimizer,
)
from tinker_cookbook.local.service.protocol.http import (
    JsonBody,
    read_batch,
    read_json,
    read_request,
)
from tinker_cookbook.local.service.protocol.paths import missing_checkpoint, parse_tinker_path
from tinker_cookbook.local.service.protocol.wire import (
    TrainRequest,
    decode_data,
    decode_train_request,
    encode_train_result,
)
from tinker_cookbook.local.service.routes.losses import attach_graph
from tinker_cookbook.local.service.state.core import Service, Work
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.runs import Run, SequenceGate
from tinker_cookbook.local.service.storage.checkpoint_index import NameTakenError
from tinker_cookbook.local.service.storage.rows import CheckpointRow, Lora, RunRow
from tinker_cookbook.local.service.threads import READING, STORING

__all__ = ["ROUTES", "ack", "read_numbered"]

INLINE_BATCH_BYTES = 256 * 1024
"""Larger batches are decoded on another thread, so that other clients are answered meanwhile."""


def ack(request_id: str, model_id: str | None = None) -> Response:
    values = {"request_id": request_id} | ({} if model_id is None else {"model_id": model_id})
    return JSONResponse(values)


async def read_numbered(service: Service, request: Request) -> tuple[JsonBody, Run, int]:
    """Read a numbered JSON request of a run; returns the body, the run and the number.

    The rest of the body is checked when the operation starts: a refused request still takes its
    place in the order of the run, and its future fails.
    """
    body = await read_json(request, service.limits.max_json_bytes)
    asked = body.read_as(NumberedRequest)
    return body, service.get_run(asked.model_id), asked.seq_id


async def create_model(service: Service, request: Request) -> Response:
    asked = await read_request(request, CreateModel, service.limits.max_json_bytes)

    async def make(run: Run) -> Payload:
        refuse_other_optimizer(asked.optimizer_config, field="optimizer_config")
        run.base_model = service.engine.canonical_name(asked.base_model)
        run.lora = decode_lora(asked.lora_config, asked.user_metadata)
        await service.engine.load(run.base_model)
        await service.engine.worker.create_run(run.run_id, run.base_model, run.lora)
        await _record_run(service, run, asked.user_metadata)
        return Payload.of_json({"model_id": run.run_id, "type": "create_model"})

    return _begin_run(service, asked, "create_model", make)


async def load_weights(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    if body.values.get("session_id") is None:
        return _load_into_run(service, body.read_as(LoadIntoRun))
    asked = body.read_as(LoadWeights)
    path, with_optimizer = asked.path, asked.optimizer

    async def make(run: Run) -> Payload:
        refuse_other_optimizer(asked.optimizer_config, field="optimizer_config")
        found = _find_training_checkpoint(service, path, with_optimizer)
        source = service.store.index.run(found.run_id)
        assert source is not None, f"{found.tinker_path} has no run"
        run.base_model = service.engine.canonical_name(source.base_model)
        service.engine.check_base_model(asked.base_model, run.base_model, path)
        await service.engine.load(run.base_model)
        with service.store.pin(found):
            folder = await asyncio.to_thread(service.store.verify, found)
            run.lora = await service.engine.worker.create_run_from(
                run.run_id, folder, with_optimizer=with_optimizer
            )
        await _note_origin(service, run, found, with_optimizer)
        await _record_run(service, run, asked.user_metadata)
        return Payload.of_json({"path": path, "model_id": run.run_id, "type": "load_weights"})

    return _begin_run(service, asked, "load_weights", make)


def _begin_run(
    service: Service, asked: NewRun, kind: str, make: Callable[[Run], Awaitable[Payload]]
) -> Response:
    """Register a run under the id that the client computes too, and start to create it."""
    session_id = asked.session_id
    run_id = f"{session_id}:train:{asked.model_seq_id}"
    known = service.runs.get(run_id)
    if known is not None:
        return ack(known.create_request_id, run_id)
    service.require_open()
    service.sessions.get_active(session_id)
    entry = service.futures.create(kind, session_id)
    run = service.runs[run_id] = Run(
        run_id=run_id,
        session_id=session_id,
        base_model="",
        lora=LoraSpec(),
        gate=SequenceGate(grace_seconds=service.limits.gap_grace_seconds),
        create_request_id=entry.request_id,
        last_request_at=time.time(),
    )

    async def work() -> Payload:
        try:
            return await make(run)
        except BaseException:
            service.runs.pop(run_id, None)
            raise

    service.launch(entry, work, lane=run_id, run=run)
    return ack(entry.request_id, run_id)


async def _record_run(service: Service, run: Run, user_metadata: dict[str, str] | None) -> None:
    now = time.time()
    row = RunRow(
        run_id=run.run_id,
        session_id=run.session_id,
        base_model=run.base_model,
        lora=cast(Lora, asdict(run.lora)),
        user_metadata=user_metadata,
        created_at=now,
        last_request_at=now,
        is_trainable=True,
    )
    try:
        await STORING.run(service.store.index.insert, row)
    except NameTakenError as error:
        await service.engine.worker.free_run(run.run_id)
        raise UserError(
            f"model_id={run.run_id!r} was used before the service restarted; "
            "create a new ServiceClient"
        ) from error


def _find_training_checkpoint(service: Service, path: str, with_optimizer: bool) -> CheckpointRow:
    parsed = parse_tinker_path(path)
    if parsed.segment != "weights":
        raise UserError(
            f"path={path!r} holds {parsed.segment}, which cannot be trained; use a "
            "tinker://RUN/weights/NAME path from save_state"
        )
    found = service.store.find(parsed.run_id, parsed.segment, parsed.name)
    if found is None:
        raise missing_checkpoint("path", path)
    if with_optimizer and not found.has_optimizer:
        raise UserError(f"path={path!r} has no optimizer state; load its weights only")
    return found


async def _note_origin(
    service: Service, run: Run, found: CheckpointRow, with_optimizer: bool
) -> None:
    """Record which checkpoint a run continues, so that the dashboard shows both as one run."""
    origin = await asyncio.to_thread(service.progress.origin_in, found, is_resumed=with_optimizer)
    service.progress.begin_from(run.run_id, origin)
    await STORING.run(service.progress.save)  # saved at once, in case the service is killed


def _load_into_run(service: Service, asked: LoadIntoRun) -> Response:
    run = service.get_run(asked.model_id)
    path, with_optimizer = asked.path, asked.optimizer

    async def work() -> Payload:
        found = _find_training_checkpoint(service, path, with_optimizer)
        with service.store.pin(found):
            folder = await asyncio.to_thread(service.store.verify, found)
            await service.engine.worker.load_run(run.run_id, folder, with_optimizer=with_optimizer)
        await _note_origin(service, run, found, with_optimizer)
        return Payload.of_json({"path": path, "type": "load_weights"})

    return ack(service.submit(run, asked.seq_id, "load_weights", work, alone=True))


async def get_info(service: Service, request: Request) -> Response:
    model_id = (await read_request(request, GetInfo, service.limits.max_json_bytes)).model_id
    row = await asyncio.to_thread(service.store.index.run, model_id)
    if row is None:
        raise NotFoundError(f"model_id={model_id[:200]!r} does not exist")
    info = await service.engine.describe(row.base_model)
    loaded = service.engine.loaded_models().get(row.base_model)
    return JSONResponse(
        {
            "type": "get_info",
            "model_id": model_id,
            "model_data": {
                "arch": info.architecture,
                "model_name": row.base_model,
                "tokenizer_id": info.folder,
                "dtype": None if loaded is None else loaded.dtype,
            },
            "optimizer_config": {"type": ADAMW},
            "is_lora": True,
            "lora_rank": row.lora["rank"],
            "model_name": row.base_model,
        }
    )


async def forward_backward(service: Service, request: Request) -> Response:
    body = await read_batch(request, service.limits.max_batch_bytes)
    is_large = len(body) > INLINE_BATCH_BYTES
    if is_large:
        message = await READING.run(decode_train_request, body)
    else:
        message = decode_train_request(body)
    run = service.get_run(message.model_id)
    if not 1 <= message.seq_id <= MAX_INT32:
        raise UserError(f"seq_id={message.seq_id} is out of range; use 1 to {MAX_INT32}")
    data = _decode(message, service) if not is_large else None
    if data is None:
        data = await READING.run(_decode, message, service)
    kind = "forward" if message.forward_only else "forward_backward"
    work = _train_work(service, run, message, data)
    return ack(service.submit(run, message.seq_id, kind, work))


def _decode(message: TrainRequest, service: Service) -> list[TrainDatum] | UserError:
    """Return the data, or the error: a refused request still takes its place in the run's order."""
    try:
        return decode_data(message, max_data=service.limits.max_data)
    except UserError as error:
        return error


def _train_work(
    service: Service, run: Run, message: TrainRequest, data: list[TrainDatum] | UserError
) -> Work:
    backward = not message.forward_only

    async def work() -> Payload:
        if isinstance(data, UserError):
            raise data
        loss = attach_graph(service, message.loss, run.session_id)
        worker = service.engine.worker
        result = await worker.forward_backward(run.run_id, data, loss, backward=backward)
        if backward:
            service.progress.add_batch(run.run_id, data, result, loss.name)
        return Payload.of_proto(await asyncio.to_thread(encode_train_result, result))

    return work


async def optim_step(service: Service, request: Request) -> Response:
    body, run, seq_id = await read_numbered(service, request)

    async def work() -> Payload:
        adam = decode_adam(body.values)
        metrics = await service.engine.worker.optim_step(run.run_id, adam)
        service.progress.add_step(run.run_id)
        return Payload.of_json({"metrics": metrics, "type": "optim_step"})

    return ack(service.submit(run, seq_id, "optim_step", work))


ROUTES = [
    ("POST", "/create_model", create_model),
    ("POST", "/load_weights", load_weights),
    ("POST", "/get_info", get_info),
    ("POST", "/forward_backward", forward_backward),
    ("POST", "/optim_step", optim_step),
]
