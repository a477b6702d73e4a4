"""Watch the calls of the SDK's clients, without changes to the programs that make them.

The first watcher replaces a few methods of the SDK's classes; the last one that leaves restores
them. The passes of a gradient that a program computes itself are calls of `forward` and
`forward_backward`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["SAMPLING_CALLS", "CallEnd", "CallWatcher", "bind_arguments", "unwatch", "watch"]

CallEnd: TypeAlias = "Callable[[Future[Any] | None], None]"
"""Called once with the finished call; None if the SDK refused it before it was sent."""
CallWatcher: TypeAlias = "Callable[[object, str, tuple[Any, ...], dict[str, Any]], CallEnd | None]"
"""Called at each call with the client, the method, and its arguments; None: the end is ignored."""

SAMPLING_CALLS = ("sample", "compute_logprobs")
TRAINING_CALLS = ("forward", "forward_backward", "optim_step")
PARAMETERS = {
    "sample": ("prompt", "num_samples", "sampling_params"),
    "compute_logprobs": ("prompt",),
    "forward": ("data", "loss_fn"),
    "forward_backward": ("data", "loss_fn"),
}

_lock = threading.Lock()
_watchers: tuple[CallWatcher, ...] = ()
_originals: list[tuple[type, str, Callable[..., Any]]] = []


def watch(watcher: CallWatcher) -> None:
    """Call `watcher` at each call of a sampling or training client of this process."""
    import tinker

    global _watchers
    with _lock:
        _watchers = (*_watchers, watcher)
        if _originals:
            return
        for client, names in (
            (tinker.SamplingClient, SAMPLING_CALLS),
            (tinker.TrainingClient, TRAINING_CALLS),
        ):
            for name in names:
                original = getattr(client, name)
                _originals.append((client, name, original))
                setattr(client, name, _watched(original, name))


def unwatch(watcher: CallWatcher) -> None:
    """Undo `watch`. The ends of calls that have begun are still reported."""
    global _watchers
    with _lock:
        _watchers = tuple(each for each in _watchers if each != watcher)
        if not _watchers:
            for client, name, original in _originals:
                setattr(client, name, original)
            _originals.clear()


def bind_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the main arguments of a call by their names."""
    return dict(zip(PARAMETERS[name], args, strict=False)) | kwargs


def _watched(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(client: object, *args: Any, **kwargs: Any) -> Any:
        begun = [watcher(client, name, args, kwargs) for watcher in _watchers]
        ends = [end for end in begun if end is not None]
        try:
            future = original(client, *args, **kwargs)
        except BaseException:
            for end in ends:
                end(None)
            raise
        inner = future.future() if callable(getattr(future, "future", None)) else future
        for end in ends:
            inner.add_done_callback(end)
        return future

    return call
