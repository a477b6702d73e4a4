"""Routes that open samplers and sample."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.engine.types import SampleSpec
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.fields import Fields
from tinker_cookbook.local.service.protocol.http import HttpError, decode, no_content, read_fields
from tinker_cookbook.local.service.protocol.json_requests import decode_sample_spec
from tinker_cookbook.local.service.protocol.paths import parse_tinker_path
from tinker_cookbook.local.service.protocol.wire import encode_sample_result, result_cells
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.samplers import SamplerSession, SubmittedSample
from tinker_cookbook.local.service.storage.index import NameTakenError, SamplerRow

__all__ = ["ROUTES", "sampling_group"]

MAX_SEQ_ID = 2**31 - 1
INLINE_CELLS = 2**17
"""Results of more numbers are written on another thread."""
CLONE_STRIDE = 1_000_000_000
"""The SDK numbers the samples of its nth copy of a client from n times this."""


async def create_sampling_session(service: Service, request: Request) -> Response:
    fields = await read_fields(request, service.limits.max_json_bytes)
    session_id = fields.text("session_id")
    seq = fields.integer("sampling_session_seq_id", minimum=0, maximum=MAX_SEQ_ID)
    sampler_id = f"{session_id}:sample:{seq}"
    answer = {"type": "create_sampling_session", "sampling_session_id": sampler_id}
    if service.samplers.find(sampler_id) is not None:
        return JSONResponse(answer)
    service.require_open()
    service.sessions.get_active(session_id)
    row = SamplerRow(
        sampler_id=sampler_id,
        session_id=session_id,
        base_model=_base_model(service, fields),
        model_path=fields.text("model_path", None),
        run_id=None,
        created_at=time.time(),
    )
    with contextlib.suppress(NameTakenError):  # the same request, sent twice at once
        await service.samplers.open(row)
    return JSONResponse(answer)


def _base_model(service: Service, fields: Fields) -> str:
    """The model of a sampling session: named, or that of the checkpoint."""
    base_model = fields.text("base_model", None)
    model_path = fields.text("model_path", None)
    if model_path is None:
        if base_model is None:
            raise UserError("base_model and model_path are both missing; give one of them")
        return service.engine.canonical_name(base_model)
    path = parse_tinker_path(model_path, field="model_path")
    run = service.store.index.run(path.run_id)
    if run is None or service.store.find(path.run_id, path.segment, path.name) is None:
        raise HttpError(404, f"model_path={model_path!r} does not exist; it may have expired")
    name = service.engine.canonical_name(run.base_model)
    if base_model is not None and service.engine.canonical_name(base_model) != name:
        raise UserError(
            f"base_model={base_model!r} does not fit {model_path}, which was trained on {name!r}; "
            "leave it out"
        )
    return name


async def get_sampler(service: Service, request: Request) -> Response:
    sampler_id = request.path_params["sampler_id"]
    row = service.samplers.find(sampler_id)
    if row is None:
        raise HttpError(404, f"sampler_id={sampler_id[:200]!r} does not exist")
    return JSONResponse(
        {"sampler_id": sampler_id, "base_model": row.base_model, "model_path": row.model_path}
    )


async def join_sampling_session(service: Service, request: Request) -> Response:
    fields = await read_fields(request, service.limits.max_json_bytes)
    sampler = service.samplers.get(fields.text("sampling_session_id"))
    sampler.num_clients += 1
    return JSONResponse({"client_counter": sampler.num_clients})


def sampling_group(sampler_id: str, clone: int) -> str:
    """What one sampling client polls together."""
    return f"{sampler_id}#{clone}"


async def asample(service: Service, request: Request) -> Response:
    fields = await read_fields(request, service.limits.max_json_bytes)
    if fields.values.get("sampling_session_id") is None:
        raise UserError("sampling_session_id is missing; create a sampling session first")
    spec = await decode(fields, _decode, service, fields)
    sampler = service.samplers.get(fields.text("sampling_session_id"))
    seq_id = fields.integer("seq_id", minimum=0)
    sample = sampler.submitted.get(seq_id)
    if sample is None:
        service.require_open()
        service.sessions.get_active(sampler.row.session_id)
        sample = _submit(service, sampler, seq_id, spec)
    return JSONResponse(
        {"request_id": sample.request_id, "sample_sequence_ids": sample.sequence_ids}
    )


def _decode(service: Service, fields: Fields) -> SampleSpec | UserError:
    """What is to be sampled, or why it cannot be."""
    try:
        return decode_sample_spec(
            fields.values, service.limits, assets_dir=service.settings.assets_dir
        )
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
    fields = await read_fields(request, service.limits.max_json_bytes)
    entry = service.futures.get(fields.text("request_id"))
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
