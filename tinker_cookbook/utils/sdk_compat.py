"""What SDK calls return differs by version: 0.35 gives clients and thread futures, later ones
futures that can be awaited and waited for. Clients of programs may have half of the methods."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from typing import Any

__all__ = ["awaitable", "call", "wait_for_client"]


def awaitable(future: Any) -> Any:
    """Something to await, whichever kind of future a call returned."""
    if inspect.isawaitable(future) or not isinstance(future, concurrent.futures.Future):
        return future
    return asyncio.wrap_future(future)


def call(client: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call `method` of a client, or `method_async` where it has only that; something to await.

    The SDK has both and calls the second one deprecated. Clients that programs make, for tests or
    around others, may have either. One that passes unknown names on to a client inside is asked
    for what it defines itself first.
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
    """The client that a `create_..._client` call makes, ready to use."""
    return created.result() if hasattr(created, "result") else created
