"""Routes that save weights, change saved checkpoints, and serve them as files."""

from __future__ import annotations

import asyncio
import tarfile
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from tinker_cookbook.local.errors import (
    ForbiddenError,
    NotFoundError,
    StorageError,
    UserError,
)
from tinker_cookbook.local.service.protocol.auth import DownloadLink
from tinker_cookbook.local.service.protocol.bodies import (
    CopyWeights,
    SaveWeights,
    SaveWeightsExternal,
    Saving,
    SetExpiry,
    UseWeights,
    WeightsInfo,
)
from tinker_cookbook.local.service.protocol.engine_requests import ADAMW
from tinker_cookbook.local.service.protocol.http import no_content, read_request
from tinker_cookbook.local.service.protocol.paths import (
    SEGMENT_TYPES,
    missing_checkpoint,
    parse_tinker_path,
)
from tinker_cookbook.local.service.routes.rest_objects import render_time
from tinker_cookbook.local.service.routes.training import ack, read_numbered
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.runs import Run
from tinker_cookbook.local.service.storage.rows import CheckpointRow, RunRow, SamplerRow, Status
from tinker_cookbook.local.service.storage.store import NewCheckpoint
from tinker_cookbook.local.service.threads import STORING

__all__ = ["ROUTES"]

ARCHIVE = "archive.tar"
TRACE = "trace.pftrace"


async def save_weights(service: Service, request: Request) -> Response:
    body, run, seq_id = await read_numbered(service, request)

    async def work() -> Payload:
        asked = body.read_as(SaveWeights)
        new = _new_checkpoint(asked, run, "weights", asked.path or f"{seq_id:06d}")
        row = await _save(service, new)
        return Payload.of_json({"path": row.tinker_path, "type": "save_weights"})

    return ack(service.submit(run, seq_id, "save_weights", work))


async def save_weights_for_sampler(service: Service, request: Request) -> Response:
    body, run, seq_id = await read_numbered(service, request)

    async def work() -> Payload:
        answer = {"type": "save_weights_for_sampler"}
        if body.values.get("sampling_session_seq_id") is not None:
            use = body.read_as(UseWeights)
            sampler_id = f"{run.session_id}:sample:{use.sampling_session_seq_id}"
            await _open_unsaved_sampler(service, run, sampler_id, use.kind)
            return Payload.of_json(answer | {"sampling_session_id": sampler_id})
        asked = body.read_as(SaveWeights)
        name = asked.path or f"{seq_id:06d}"
        new = _new_checkpoint(asked, run, "sampler_weights", name)
        row = await _save(service, new)
        return Payload.of_json(answer | {"path": row.tinker_path})

    return ack(service.submit(run, seq_id, "save_weights_for_sampler", work))


async def save_weights_external(service: Service, request: Request) -> Response:
    body, run, seq_id = await read_numbered(service, request)

    async def work() -> Payload:
        asked = body.read_as(SaveWeightsExternal)
        if asked.age_encryption_recipients:
            raise UserError(
                "age_encryption_recipients is not available on this service; leave it out and "
                "encrypt the downloaded files"
            )
        new = _new_checkpoint(asked, run, "external_weights", asked.path)
        row = await _save(service, new)
        answer = {"path": row.tinker_path, "size_bytes": row.size_bytes}
        return Payload.of_json(answer | {"type": "save_weights_external"})

    return ack(service.submit(run, seq_id, "save_weights_external", work))


def _new_checkpoint(asked: Saving, run: Run, segment: str, name: str) -> NewCheckpoint:
    return NewCheckpoint(
        run_id=run.run_id,
        segment=segment,
        name=name,
        has_optimizer=segment == "weights",
        ttl_seconds=asked.ttl_seconds,
        user_metadata=asked.user_metadata,
        overwrite=asked.overwrite,
    )


async def _save(service: Service, new: NewCheckpoint) -> CheckpointRow:
    """Save a run's weights as they are at this point in the order of its requests."""
    store = service.store
    if not new.overwrite and store.find(new.run_id, new.segment, new.name) is not None:
        raise store.name_taken(new)
    staged = store.stage()
    try:
        await service.engine.worker.save_run(new.run_id, staged, with_optimizer=new.has_optimizer)
        service.progress.mark_saved(new.run_id, f"{new.segment}/{new.name}")
        await STORING.run(service.progress.save)
        return await STORING.run(store.commit, staged, new)
    finally:
        await STORING.run(store.discard, staged)


async def _open_unsaved_sampler(service: Service, run: Run, sampler_id: str, kind: str) -> None:
    """Create a sampling session on a run's weights without saving them.

    A `snapshot` keeps the weights of this moment. All `inflight` sessions of a run share one
    sampler, which each of these requests updates to the newest weights.
    """
    worker = service.engine.worker
    if kind == "snapshot":
        key = sampler_id
        await worker.create_sampler(key, run.base_model, run_id=run.run_id)
    elif run.inflight_sampler is None:
        key = run.inflight_sampler = f"{run.run_id}:inflight"
        await worker.create_sampler(key, run.base_model, run_id=run.run_id)
    else:
        key = run.inflight_sampler
        await worker.refresh_sampler(key, run.run_id)
    row = SamplerRow(
        sampler_id=sampler_id,
        session_id=run.session_id,
        base_model=run.base_model,
        model_path=None,
        run_id=run.run_id,
        created_at=time.time(),
    )
    for dropped in await service.samplers.adopt(row, key):
        service.futures.drop_group(dropped)


def find_checkpoint(service: Service, request: Request) -> CheckpointRow:
    """Return the checkpoint that the request's path names, or raise NotFoundError."""
    run_id, segment, name = (request.path_params[key] for key in ("run_id", "segment", "name"))
    row = service.store.find(run_id, segment, name) if segment in SEGMENT_TYPES else None
    if row is None:
        raise NotFoundError(f"checkpoint tinker://{run_id}/{segment}/{name} does not exist"[:400])
    return row


async def delete_checkpoint(service: Service, request: Request) -> Response:
    await STORING.run(service.store.delete, find_checkpoint(service, request))
    return no_content()


async def publish(service: Service, request: Request) -> Response:
    """Publish a checkpoint (POST) or withdraw it (DELETE). Both may be repeated."""
    row = find_checkpoint(service, request)
    await STORING.run(service.store.set_public, row, request.method == "POST")
    return no_content()


async def set_ttl(service: Service, request: Request) -> Response:
    row = find_checkpoint(service, request)
    ttl = (await read_request(request, SetExpiry, service.limits.max_json_bytes)).ttl_seconds
    expires_at = None if ttl is None else time.time() + ttl
    await STORING.run(service.store.set_expiry, row, expires_at)
    return no_content()


def _find_by_path(service: Service, path: str, field: str) -> tuple[CheckpointRow, RunRow]:
    parsed = parse_tinker_path(path, field=field)
    row = service.store.find(parsed.run_id, parsed.segment, parsed.name)
    run = service.store.index.run(parsed.run_id)
    if row is None or run is None:
        raise missing_checkpoint(field, path)
    return row, run


async def weights_info(service: Service, request: Request) -> Response:
    asked = await read_request(request, WeightsInfo, service.limits.max_json_bytes)
    _, run = _find_by_path(service, asked.tinker_path, "tinker_path")
    return JSONResponse(
        {
            "base_model": run.base_model,
            "is_lora": True,
            "lora_rank": run.lora["rank"],
            **{
                part: run.lora.get(part, True)
                for part in ("train_unembed", "train_mlp", "train_attn")
            },
            "optimizer_config": {"type": ADAMW},
        }
    )


async def copy_weights(service: Service, request: Request) -> Response:
    """Copy a checkpoint into a new run of a new session. The new run cannot be trained."""
    asked = await read_request(request, CopyWeights, service.limits.max_json_bytes)
    source, run = _find_by_path(service, asked.source_path, "source_path")
    idempotency_key = request.headers.get("x-idempotency-key", "")[:200]
    index = service.store.index
    known = index.copy_of(idempotency_key) if idempotency_key else None
    if known is not None:
        return JSONResponse({"tinker_path": known})
    session = await service.sessions.create(
        display_name=f"copy of {source.tinker_path}",
        user_metadata=None,
        tags=[],
        project_id=asked.destination_project_id,
        sdk_version=None,
    )
    run_id = f"{session.session_id}:train:0"
    now = time.time()
    target = RunRow(
        run_id=run_id,
        session_id=session.session_id,
        base_model=run.base_model,
        lora=run.lora,
        user_metadata=run.user_metadata,
        created_at=now,
        last_request_at=now,
        is_trainable=False,
    )
    await STORING.run(index.insert, target)
    new = NewCheckpoint(
        run_id=run_id,
        segment=source.segment,
        name=source.name,
        has_optimizer=source.has_optimizer,
        ttl_seconds=asked.ttl_seconds,
        user_metadata=source.user_metadata,
    )
    failed: Status = {"type": "cancelled", "detail": "the copy could not be made"}
    try:
        with service.store.pin(source):
            row = await STORING.run(service.store.copy, source, new)
    except BaseException:
        await service.end_session(session, failed)
        raise
    if idempotency_key:
        await STORING.run(index.put_copy, idempotency_key, row.tinker_path)
    done: Status = {
        "type": "client_finished",
        "reason": {"type": "success"},
        "detail": "copied",
    }
    await service.end_session(session, done)
    return JSONResponse({"tinker_path": row.tinker_path})


def download_url(service: Service, request: Request, folder: str, file: str) -> tuple[str, float]:
    """Return a link that works without a key, and the time when it expires."""
    expires_at = float(int(time.time() + service.limits.download_link_seconds))
    token = service.auth.sign_link(DownloadLink(folder, file, expires_at))
    base = str(request.base_url).rstrip("/")
    return f"{base}/api/v1/download/{token}/{file}", expires_at


async def external_weights_urls(service: Service, request: Request) -> Response:
    row = find_checkpoint(service, request)
    if row.segment != "external_weights":
        raise UserError(f"{row.tinker_path} is not external; use save_weights_external")
    expires_at = 0.0
    urls: dict[str, str] = {}
    for path in await asyncio.to_thread(service.store.weight_files, row):
        urls[path.name], expires_at = download_url(service, request, row.folder, path.name)
    return JSONResponse({"urls": urls, "expires": render_time(expires_at)})


async def archive(service: Service, request: Request) -> Response:
    """Redirect to a tar file of the weights, for SDKs up to 0.35."""
    row = find_checkpoint(service, request)
    url, expires_at = download_url(service, request, row.folder, ARCHIVE)
    expires = format_datetime(datetime.fromtimestamp(expires_at, UTC), usegmt=True)
    return Response(status_code=302, headers={"location": url, "expires": expires})


async def download(service: Service, request: Request) -> Response:
    """Serve the file that a signed link names. This route does not need the key."""
    link = service.auth.read_link(request.path_params["token"])
    if link is None:
        raise ForbiddenError("this download link is not valid or has expired; ask for a new one")
    if link.file == TRACE:
        timeline = await asyncio.to_thread(service.trace.export, link.folder)
        return Response(timeline, media_type="application/octet-stream")
    row = service.store.index.checkpoint_in(link.folder)
    if row is None:
        raise NotFoundError("this checkpoint was deleted or has expired")
    files = {path.name: path for path in await asyncio.to_thread(service.store.weight_files, row)}
    if link.file == ARCHIVE:
        return await _send_archive(service, row, list(files.values()))
    if link.file not in files:
        raise NotFoundError(f"{row.tinker_path} has no file {link.file!r}")
    return FileResponse(files[link.file], media_type="application/octet-stream")


async def _send_archive(service: Service, row: CheckpointRow, files: list[Path]) -> Response:
    staged = service.store.stage()
    path = staged / ARCHIVE
    try:
        with service.store.pin(row):
            await asyncio.to_thread(_write_archive, path, files)
    except BaseException as error:
        await STORING.run(service.store.discard, staged)
        if isinstance(error, OSError):
            problem = f"{row.tinker_path} cannot be packed into {path}: {error}"
            raise StorageError(problem) from error
        raise
    clean_up = BackgroundTask(service.store.discard, staged)
    return FileResponse(path, media_type="application/x-tar", background=clean_up)


def _write_archive(path: Path, files: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, arcname=file.name)
        tar.addfile(tarfile.TarInfo("checkpoint_complete"))  # the older CLI looks for it


async def trace_export(service: Service, request: Request) -> Response:
    session_id = request.path_params["session_id"]
    service.sessions.get(session_id)
    url, _ = download_url(service, request, session_id, TRACE)
    return JSONResponse({"status": "ready", "url": url})


_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{segment}/{name}"
ROUTES = [
    ("POST", "/save_weights", save_weights),
    ("POST", "/save_weights_for_sampler", save_weights_for_sampler),
    ("POST", "/save_weights_external", save_weights_external),
    ("POST", "/weights_info", weights_info),
    ("POST", "/copy_weights", copy_weights),
    ("DELETE", _CHECKPOINT, delete_checkpoint),
    ("POST", f"{_CHECKPOINT}/publish", publish),
    ("DELETE", f"{_CHECKPOINT}/publish", publish),
    ("PUT", f"{_CHECKPOINT}/ttl", set_ttl),
    ("GET", f"{_CHECKPOINT}/external_weights_urls", external_weights_urls),
    ("GET", f"{_CHECKPOINT}/archive", archive),
    ("GET", "/download/{token}/{file}", download),
    ("GET", "/sessions/{session_id}/trace_export", trace_export),
]
