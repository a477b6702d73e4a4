"""Record what the SDK's clients are asked for and return, without changes to the program.

`instrument_tinker` watches the calls of the SDK and enqueues a record when a result is there. The
record has the scope in which the call was made.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tinker_cookbook.capture.exporter import CaptureExporter, CaptureRecord
from tinker_cookbook.capture.scope import current_scope
from tinker_cookbook.utils.sdk_calls import (
    SAMPLING_CALLS,
    CallEnd,
    bind_arguments,
    unwatch,
    watch,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["current_exporter", "instrument_tinker", "uninstrument_tinker"]

_exporter: CaptureExporter | None = None


def current_exporter() -> CaptureExporter | None:
    """Return where records go; None if the SDK is not instrumented."""
    return _exporter


def instrument_tinker(exporter: CaptureExporter) -> None:
    """Record every sampling and training call of this process.

    A second call only changes where records go.
    """
    global _exporter
    is_first = _exporter is None
    _exporter = exporter
    if is_first:
        watch(_record)


def uninstrument_tinker() -> None:
    """Undo `instrument_tinker`. Calls that have begun are still recorded."""
    global _exporter
    unwatch(_record)
    _exporter = None


def _record(
    client: object, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallEnd | None:
    del client
    exporter = _exporter
    if exporter is None:
        return None
    record: CaptureRecord = {
        "kind": name,
        "scope": dict(current_scope()),
        "time": time.time(),
        "request": _describe_request(name, args, kwargs),
    }
    exporter.track_pending()
    began = time.perf_counter()

    def finish(done: Future[Any] | None) -> None:
        if done is None:
            exporter.pending_done()
        else:
            _finish(exporter, record, began, done)

    return finish


def _finish(
    exporter: CaptureExporter, record: CaptureRecord, began: float, done: Future[Any]
) -> None:
    record["seconds"] = time.perf_counter() - began
    try:
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or error is not None:
            record["error"] = "cancelled" if error is None else f"{type(error).__name__}: {error}"
        else:
            record["response"] = _describe_response(record["kind"], done.result())
        exporter.enqueue(record)
    finally:
        exporter.pending_done()


def _describe_request(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if name in SAMPLING_CALLS:
        given = bind_arguments(name, args, kwargs)
        params = given.get("sampling_params")
        return {
            "prompt": _tokens(given.get("prompt")),
            "num_samples": given.get("num_samples"),
            "sampling_params": params.model_dump(mode="json") if params is not None else None,
        }
    if name == "optim_step":
        settings = (*args, *kwargs.values())
        return {"params": [s.model_dump(mode="json") for s in settings if s is not None]}
    given = bind_arguments(name, args, kwargs)
    data = list(given.get("data") or ())
    loss = given.get("loss_fn")
    return {
        "num_data": len(data),
        "num_tokens": sum(datum.model_input.length for datum in data),
        "loss_fn": loss if isinstance(loss, str) else type(loss).__name__,
    }


def _describe_response(name: str, response: Any) -> dict[str, Any]:
    if name == "sample":
        return {"sequences": [_sequence(sequence) for sequence in response.sequences]}
    if name == "compute_logprobs":
        return {"logprobs": list(response)}
    return {"metrics": dict(getattr(response, "metrics", None) or {})}


def _sequence(sequence: Any) -> dict[str, Any]:
    logprobs = sequence.logprobs
    return {
        "tokens": list(sequence.tokens),
        "logprobs": None if logprobs is None else list(logprobs),
        "stop_reason": sequence.stop_reason,
    }


def _tokens(prompt: Any) -> list[int | None]:
    """Return the tokens of a prompt; None for each position of an image."""
    tokens: list[int | None] = []
    for chunk in getattr(prompt, "chunks", ()):
        own = getattr(chunk, "tokens", None)
        tokens += [None] * chunk.length if own is None else list(own)
    return tokens
