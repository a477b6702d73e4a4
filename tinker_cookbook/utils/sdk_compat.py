"""Differences between versions of the `tinker` SDK, handled in this module only.

- SDK 0.35 returns a client where later versions return a future of the client, and futures of
  threads where later ones can be awaited.
- SDK 0.36 and later have a separate `RestClient`.
- Older SDKs do not support display names of sessions, and cannot close a session.
- Older SDKs score a whole prompt, or none of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import tinker

__all__ = [
    "awaitable",
    "call",
    "can_close_sessions",
    "can_score_last_tokens",
    "can_score_targets",
    "create_client",
    "drop_unknown_session_options",
    "has_rest_client",
    "hide_reported_errors",
    "is_refusal",
    "known_base_model",
    "model_path_of",
    "rest_client_of",
    "sdk_version",
    "service_message",
    "wait_for_client",
]

Client = TypeVar("Client")


def sdk_version() -> str:
    """Return the version of the installed SDK."""
    return version("tinker")


def awaitable(future: Any) -> Any:
    """Return something to await for the future that an SDK call returned."""
    if inspect.isawaitable(future) or not isinstance(future, concurrent.futures.Future):
        return future
    return asyncio.wrap_future(future)


def call(client: object, method: str, *args: object, **kwargs: object) -> Any:
    """Call `method` of a client, or `method_async` if the client has only that.

    The SDK has both and calls the second one deprecated. Clients that programs define, as test
    doubles or as wrappers, may have either. A wrapper that forwards unknown names to an inner
    client is first searched for the methods that it defines itself.

    Returns:
        Something to await.

    Raises:
        AttributeError: if the client has neither method.
    """
    names = (method, f"{method}_async")
    own = [name for name in names if inspect.getattr_static(client, name, None) is not None]
    offered = own or [name for name in names if hasattr(client, name)]
    if not offered:
        raise AttributeError(
            f"sampling client {type(client).__name__} has neither {names[0]} nor {names[1]}; give "
            "it one of them."
        )
    return awaitable(getattr(client, offered[0])(*args, **kwargs))


def wait_for_client(created: Any) -> Any:
    """Wait for what a `create_..._client` call returned, and return the client."""
    return created.result() if hasattr(created, "result") else created


async def create_client(
    create: Callable[..., Client | Awaitable[Client]], *args: object, **kwargs: object
) -> Client:
    """Call an SDK function that makes a client, without blocking the event loop."""
    created = await asyncio.to_thread(create, *args, **kwargs)
    if inspect.isawaitable(created):
        return await created
    return cast("Client", created)


def drop_unknown_session_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a session without those that this SDK does not know."""
    import tinker

    known = inspect.signature(tinker.ServiceClient.__init__).parameters
    if "display_name" in known:
        return options
    return {name: value for name, value in options.items() if name != "display_name"}


def can_close_sessions(client: tinker.ServiceClient) -> bool:
    """Return whether this SDK can tell the service that a session has ended."""
    return hasattr(client, "close")


def can_score_last_tokens() -> bool:
    """Return whether this SDK can ask for the scores of only the last tokens of a prompt."""
    import tinker

    return "prompt_logprobs_last_n" in inspect.signature(tinker.SamplingClient.sample).parameters


def can_score_targets() -> bool:
    """Return whether this SDK can ask for the log probabilities of any tokens of a prompt."""
    import tinker

    return "target_prompt_logprobs" in inspect.signature(tinker.SamplingClient.sample).parameters


def has_rest_client() -> bool:
    """Return whether this SDK has a client for runs and checkpoints that opens no session."""
    import tinker

    return hasattr(tinker, "RestClient")


def rest_client_of(service_client: tinker.ServiceClient) -> tinker.RestClient:
    """Return an SDK client for runs and checkpoints that shares the connections of another."""
    import tinker

    if has_rest_client():  # `create_rest_client` gives a warning in these versions
        return tinker.RestClient(_holder=service_client._get_rest_holder())
    return service_client.create_rest_client()


def known_base_model(client: object) -> str | None:
    """Return the base model of a sampling client, if the client tells it without a request."""
    known = getattr(client, "_base_model", None)
    return known if isinstance(known, str) else None


async def model_path_of(sampling_client: object) -> str | None:
    """Return the checkpoint that a sampling client was made from, as the service records it.

    None for a base model, for weights without a path, and for clients that cannot tell.
    """
    ask = getattr(sampling_client, "_get_sampler_submit", None)
    return None if ask is None else getattr(await awaitable(ask()), "model_path", None)


def is_refusal(error: Exception) -> bool:
    """Return whether this is an error of the SDK that says that a request was at fault."""
    import tinker

    if isinstance(error, tinker.APIStatusError):
        return 400 <= error.status_code < 500
    return (
        isinstance(error, tinker.RequestFailedError)
        and error.category == tinker.types.RequestErrorCategory.User
    )


def hide_reported_errors() -> None:
    """Drop the line that the SDK logs before it raises the error of a request.

    Programs report what is raised; with it, a batch of refused requests would fill the screen.
    """
    logger = logging.getLogger("tinker.lib.retry_handler")
    if _is_not_reported not in logger.filters:
        logger.addFilter(_is_not_reported)


def _is_not_reported(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Request failed with non-retryable error")


def service_message(error: Exception) -> str:
    """Return what the service said, without the SDK's description of the request around it."""
    body = getattr(error, "body", None)  # only HTTP errors have one
    if isinstance(body, dict) and isinstance(body.get("detail"), str):
        return body["detail"].rstrip(". ") + "."
    text = str(error).partition(" for self.request_id=")[0]
    return text.removeprefix("Request failed: ").rstrip(". ") + "."
