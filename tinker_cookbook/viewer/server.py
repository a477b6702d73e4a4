"""Serve the page on this machine. It only reads; the standard library is enough for it."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.viewer.answers import Answers
from tinker_cookbook.viewer.page import build_page

__all__ = ["LOOPBACK", "open_server"]

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOCAL_NAMES = (LOOPBACK, "localhost", "[::1]")
MAX_BODY = 1_000_000
PACKED_ABOVE = 2_000
"""Answers above this number of bytes are compressed."""
MAX_PARTS = 5_000
Words = dict[str, list[str]]


def open_server(
    answers: Answers, *, host: str = LOOPBACK, port: int = 0, shows_all: bool = False
) -> ThreadingHTTPServer:
    """Return a server that is bound to its address; `serve_forever` starts it.

    Args:
        answers: Answers about the runs.
        host: Address to listen on.
        port: Port; 0: a free one.
        shows_all: Whether the page shows all runs at first, not only the newest.

    Raises:
        ConfigurationError: if the address is in use or not an address of this machine.
    """
    page, policy = build_page(answers.place(), shows_all=shows_all)

    class Handler(_Handler):
        pass

    Handler.answers, Handler.page, Handler.policy = answers, page.encode(), policy
    Handler.checks_host = host == LOOPBACK
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ConfigurationError(
            f"port={port} of host={host} cannot be used ({error.strerror}); choose another one "
            "with --port, or leave it out."
        ) from error
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: Answers
    page: bytes
    policy: str
    checks_host: bool

    def do_GET(self) -> None:
        """Send the page."""
        if not self._is_from_here():
            self._send_text(403, "this page is for the browser of this machine")
        elif self.path.partition("?")[0] == "/":
            headers = {"Content-Security-Policy": self.policy}
            self._send(200, "text/html; charset=utf-8", self.page, headers)
        else:
            self._send_text(404, "not found")

    def do_POST(self) -> None:
        """Answer a question of the page."""
        if not self._is_from_here():
            self._send_text(403, "this page is for the browser of this machine")
            return
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= MAX_BODY:
            self.close_connection = True
            self._send_text(413, "the question is too long")
            return
        words = parse_qs(self.rfile.read(length).decode("utf-8", "replace"))
        question = _QUESTIONS.get(self.path.removeprefix("/api/"))
        if question is None:
            self._send_text(404, "not found")
            return
        try:
            content = json.dumps(question(self.answers, words), ensure_ascii=False).encode()
        except (ConfigurationError, KeyError, ValueError, FileNotFoundError) as error:
            # A run that was deleted a moment ago, or a question that no page asks.
            self._send_text(400, f"{error}")
            return
        self._send(200, "application/json", content)

    def log_message(self, format: str, *args: object) -> None:
        """Write requests to the debug log only."""
        logger.debug(format, *args)

    def _is_from_here(self) -> bool:
        """Refuse names of other machines: a foreign page could use them to read this one."""
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        origin = self.headers.get("Origin")
        same = origin is None or origin.partition("://")[2] == self.headers.get("Host")
        return same and (not self.checks_host or name in LOCAL_NAMES)

    def _send_text(self, status: int, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", text.encode())

    def _send(
        self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        if len(content) > PACKED_ABOVE and "gzip" in (self.headers.get("Accept-Encoding") or ""):
            content = gzip.compress(content, 1)
            self.send_header("Content-Encoding", "gzip")
        fixed = {"Content-Type": kind, "Content-Length": str(len(content))}
        fixed |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for name, value in (fixed | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def _curves(answers: Answers, words: Words) -> object:
    between = None
    if "first" in words:
        between = int(words["first"][0]), int(words["last"][0])
    parts = min(MAX_PARTS, max(1, int(words["parts"][0])))
    return answers.curves(words.get("run", []), words.get("metric", []), parts, between)


_QUESTIONS: dict[str, Callable[[Answers, Words], object]] = {
    "runs": lambda answers, _: answers.runs(),
    "keys": lambda answers, words: answers.keys(words.get("run", [])),
    "curves": _curves,
    "run": lambda answers, words: answers.run(words["run"][0]),
    "rollouts": lambda answers, words: answers.rollouts(
        words["run"][0], int(words["step"][0]), words["split"][0]
    ),
    "spans": lambda answers, words: answers.spans(words["run"][0], int(words["step"][0])),
    "evaluations": lambda answers, _: answers.evaluations(),
}
