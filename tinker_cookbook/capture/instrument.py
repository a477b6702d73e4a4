"""Record what the SDK's clients are asked for and return, without changes to the program.

`instrument_tinker` replaces a few methods of the SDK's classes by functions that call them and
enqueue a record when the result is there. The record has the scope in which the call was made.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tinker_cookbook.capture.exporter import CaptureExporter, CaptureRecord
from tinker_cookbook.capture.scope import current_scope

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["current_exporter", "instrument_tinker", "uninstrument_tinker"]

_SAMPLING = ("sample", "compute_logprobs")
_TRAINING = ("forward", "forward_backward", "optim_step")
"""The passes of a custom loss are calls of the first two."""
_lock = threading.Lock()
_originals: list[tuple[type, str, Callable[..., Any]]] = []
_exporter: CaptureExporter | None = None


def current_exporter() -> CaptureExporter | None:
    """Return where records go; None if the SDK is not instrumented."""
    return _exporter


def instrument_tinker(exporter: CaptureExporter) -> None:
    """Record every sampling and training call of this process.

    A second call only changes where records go.
    """
    import tinker

    global _exporter
    with _lock:
        _exporter = exporter
        if _originals:
            return
        for client, names in (
            (tinker.SamplingClient, _SAMPLING),
            (tinker.TrainingClient, _TRAINING),
        ):
            for name in names:
                original = getattr(client, name)
                _originals.append((client, name, original))
                setattr(client, name, _recorded(original, name))


def uninstrument_tinker() -> None:
    """Undo `instrument_tinker`. Calls that have begun are still recorded."""
    global _exporter
    with _lock:
        for client, name, original in _originals:
            setattr(client, name, original)
        _originals.clear()
        _exporter = None


def _recorded(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(client: object, *args: Any, **kwargs: Any) -> Any:
        exporter = _exporter
        if exporter is None:
            return original(client, *args, **kwargs)
        record: CaptureRecord = {
            "kind": name,
            "scope": dict(current_scope()),
            "time": time.time(),
            "request": _describe_request(name, args, kwargs),
        }
        exporter.track_pending()
        began = time.perf_counter()
        try:
            future = original(client, *args, **kwargs)
        except BaseException:
            exporter.pending_done()
            raise
        _when_done(future, lambda done: _finish(exporter, record, began, done))
        return future

    return call


def _when_done(future: Any, react: Callable[[Future[Any]], None]) -> None:
    """Call a function when the SDK's future has its result."""
    inner = future.future() if callable(getattr(future, "future", None)) else future
    inner.add_done_callback(react)


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
    if name in _SAMPLING:
        names = ("prompt", "num_samples", "sampling_params")
        given = dict(zip(names, args, strict=False)) | kwargs
        params = given.get("sampling_params")
        return {
            "prompt": _tokens(given.get("prompt")),
            "num_samples": given.get("num_samples"),
            "sampling_params": params.model_dump(mode="json") if params is not None else None,
        }
    if name == "optim_step":
        settings = (*args, *kwargs.values())
        return {"params": [s.model_dump(mode="json") for s in settings if s is not None]}
    given = dict(zip(("data", "loss_fn"), args, strict=False)) | kwargs
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
