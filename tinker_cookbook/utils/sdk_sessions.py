"""Close sessions of the `tinker` SDK when a program no longer needs them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from tinker_cookbook.utils.sdk_compat import can_close_sessions

if TYPE_CHECKING:
    import tinker

__all__ = ["SessionEnd", "close_session"]

logger = logging.getLogger(__name__)

SessionEnd = Literal["success", "errored", "interrupted"]
PATIENCE_SECONDS = {"success": 10.0, "errored": 2.0, "interrupted": 1.0}


def close_session(client: tinker.ServiceClient, status: SessionEnd) -> None:
    """Tell the service how the session ended, and stop the SDK's requests for it.

    Nothing happens if the client is closed already or the SDK cannot close one. A service that has
    stopped delays the end by at most `PATIENCE_SECONDS`.

    Without this, a request of the SDK's background thread can abort the process (exit status -6)
    while the interpreter ends, after all work is done: before Python 3.14 such threads are forced
    to exit, which crashes if compiled code is on their stack.
    Source: github.com/python/cpython/issues/87135.
    """
    import tinker

    if not can_close_sessions(client):
        return
    try:
        client.close(status).result(timeout=PATIENCE_SECONDS[status])
    except (tinker.TinkerError, TimeoutError, ValueError, RuntimeError) as error:
        logger.info("the session could not be closed: %s", error)
