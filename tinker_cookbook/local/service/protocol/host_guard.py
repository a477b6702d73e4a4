"""Refuse requests whose Host header names another site.

A web page can make its own name resolve to 127.0.0.1 (DNS rebinding). A browser then treats this
service as part of the page's origin. The Host header of such requests still has the page's name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tinker_cookbook.local.service.protocol.failures import Failure, render_failure

__all__ = ["HostGuard", "host_name"]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


_HOST = re.compile(
    r"(?:\[(?P<literal>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::[0-9]{1,5})?|(?P<bare>[0-9a-f:]+)"
)


def host_name(header: str) -> str | None:
    """Return the name in a Host header, without port and brackets; None if it is malformed."""
    found = _HOST.fullmatch(header.strip().lower())
    return None if found is None else found["literal"] or found["name"] or found["bare"]


class HostGuard:
    """Middleware that lets a request through if its Host header names this service."""

    def __init__(self, app: ASGIApp, *, listens_on: str, allowed: Collection[str] = ()) -> None:
        """Wrap an application.

        Args:
            listens_on: the address that the service is bound to. This name and every literal
                address are accepted, because only names can be rebound.
            allowed: more accepted names, such as the name of a reverse proxy.
        """
        self._app = app
        self._names = {name.lower() for name in (*LOOPBACK_NAMES, listens_on, *allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hosts = Headers(scope=scope).getlist("host")
        if len(hosts) == 1 and self._is_ours(host_name(hosts[0])):
            await self._app(scope, receive, send)
            return
        shown = ", ".join(hosts)[:100]
        refusal = Failure(
            421,
            f"Host={shown!r} is not a name of this service; use its address, or start it with "
            "--allowed-host NAME",
        )
        await render_failure(refusal)(scope, receive, send)

    def _is_ours(self, name: str | None) -> bool:
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
