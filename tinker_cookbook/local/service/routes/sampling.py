"""Routes that create sampling sessions and sample."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.engine.types import SampleSpec
from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.local.service.protocol.bodies import (
    CLONE_STRIDE,
    CancelFuture,
    CreateSamplingSession,
    JoinSamplingSession,
    SampleRequest,
)
from tinker_cookbook.local.service.protocol.engine_requests import decode_sample_spec
from tinker_cookbook.local.service.protocol.http import no_content, read_json, read_request
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.paths import missing_checkpoint, parse_tinker_path
from tinker_cookbook.local.service.protocol.wire import encode_sample_result, result_cells
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.samplers import SamplerSession, SubmittedSample
from tinker_cookbook.local.service.storage.checkpoint_index import NameTakenError
from tinker_cookbook.local.service.storage.rows import SamplerRow

__all__ = ["ROUTES", "sampling_group"]

INLINE_CELLS = 2**17
"""Results of more numbers than this are serialized on another thread."""


async def create_sampling_session(service: Service, request: Request) -> Response:
    asked = await read_request(request, CreateSamplingSession, service.limits.max_json_bytes)
    session_id = asked.session_id
    sampler_id = f"{session_id}:sample:{asked.sampling_session_seq_id}"
    answer = {"type": "create_sampling_session", "sampling_session_id": sampler_id}
    if service.samplers.find(sampler_id) is not None:
        return JSONResponse(answer)
    service.require_open()
    service.sessions.get_active(session_id)
    row = SamplerRow(
        sampler_id=sampler_id,
        session_id=session_id,
        base_model=_base_model(service, asked.base_model, asked.model_path),
        model_path=asked.model_path,
        run_id=None,
        created_at=time.time(),
    )
    with contextlib.suppress(NameTakenError):  # the same request, sent twice at once
        await service.samplers.open(row)
    return JSONResponse(answer)


def _base_model(service: Service, base_model: str | None, model_path: str | None) -> str:
    """Return the base model of a sampling session: the given one, or the one of its checkpoint."""
    if model_path is None:
        if base_model is None:
            raise UserError("base_model and model_path are both missing; give one of them")
        return service.engine.canonical_name(base_model)
    path = parse_tinker_path(model_path, field="model_path")
    run = service.store.index.run(path.run_id)
    if run is None or service.store.find(path.run_id, path.segment, path.name) is None:
        raise missing_checkpoint("model_path", model_path)
    name = service.engine.canonical_name(run.base_model)
    service.engine.check_base_model(base_model, name, model_path)
    return name


async def get_sampler(service: Service, request: Request) -> Response:
    sampler_id = request.path_params["sampler_id"]
    row = service.samplers.find(sampler_id)
    if row is None:
        raise NotFoundError(f"sampler_id={sampler_id[:200]!r} does not exist")
    return JSONResponse(
        {"sampler_id": sampler_id, "base_model": row.base_model, "model_path": row.model_path}
    )


async def join_sampling_session(service: Service, request: Request) -> Response:
    asked = await read_request(request, JoinSamplingSession, service.limits.max_json_bytes)
    sampler = service.samplers.get(asked.sampling_session_id)
    sampler.num_clients += 1
    return JSONResponse({"client_counter": sampler.num_clients})


def sampling_group(sampler_id: str, clone: int) -> str:
    """Return the name of the futures that one sampling client polls together."""
    return f"{sampler_id}#{clone}"


async def asample(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    asked = body.read_as(SampleRequest)
    spec = await body.decode(_decode, service, body.values)
    sampler = service.samplers.get(asked.sampling_session_id)
    sample = sampler.submitted.get(asked.seq_id)
    if sample is None:
        service.require_open()
        service.sessions.get_active(sampler.row.session_id)
        sample = _submit(service, sampler, asked.seq_id, spec)
    return JSONResponse(
        {"request_id": sample.request_id, "sample_sequence_ids": sample.sequence_ids}
    )


def _decode(service: Service, values: JsonObject) -> SampleSpec | UserError:
    """Return what to sample, or the error that the request's future will fail with."""
    try:
        return decode_sample_spec(values, assets_dir=service.settings.assets_dir)
    except UserError as error:
        return error


def _submit(
    service: Service, sampler: SamplerSession, seq_id: int, spec: SampleSpec | UserError
) -> SubmittedSample:
    session_id = sampler.row.session_id
    group = sampling_group(sampler.sampler_id, seq_id // CLONE_STRIDE)
    entry = service.futures.create("sample", session_id, group=group)
    num_samples = 0
    if isinstance(spec, UserError):
        service.futures.fail(entry, str(spec), "user")
    else:
        num_samples = spec.num_samples

        async def work() -> Payload:
            service.samplers.begin(sampler)
            try:
                key = await service.samplers.use(sampler)
                result = await service.engine.worker.sample(key, spec, client=session_id)
            finally:
                service.samplers.finish(sampler)
            if result_cells(result) < INLINE_CELLS:
                return Payload.of_proto(encode_sample_result(result))
            return Payload.of_proto(await asyncio.to_thread(encode_sample_result, result))

        service.launch(entry, work, lane=sampler.sampler_id)
    sequence_ids = [f"{entry.request_id}-{index}" for index in range(num_samples)]
    sample = SubmittedSample(entry.request_id, sequence_ids)
    sampler.remember(seq_id, sample)
    return sample


async def cancel_future(service: Service, request: Request) -> Response:
    asked = await read_request(request, CancelFuture, service.limits.max_json_bytes)
    entry = service.futures.get(asked.request_id)
    if entry is not None and entry.kind == "sample":
        service.cancel(entry.request_id)
    return no_content()


ROUTES = [
    ("POST", "/create_sampling_session", create_sampling_session),
    ("POST", "/join_sampling_session", join_sampling_session),
    ("POST", "/asample", asample),
    ("POST", "/cancel_future", cancel_future),
    ("GET", "/samplers/{sampler_id}", get_sampler),
]
