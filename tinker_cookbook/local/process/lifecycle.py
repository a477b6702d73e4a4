"""The life of a service process: bind, announce, watch the parent, stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import ipaddress
import json
import logging
import logging.handlers
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.local.app import build_app
from tinker_cookbook.local.errors import OTHER_STATE_DIR, UserError
from tinker_cookbook.local.service.protocol.connections import HttpProtocol
from tinker_cookbook.local.service.protocol.request_ids import (
    JsonFormatter,
    RequestIdFilter,
    TextFormatter,
)
from tinker_cookbook.local.service.settings import ServiceSettings
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.retention import log_path, prune_logs
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.processes import is_running
from tinker_cookbook.utils.terminal_text import escape_controls

__all__ = ["bind", "is_loopback", "serve", "write_ready_file"]

logger = logging.getLogger(__name__)

BACKLOG = 4096
PARENT_POLL_SECONDS = 1.0
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a program that Ctrl-C ended."""
EMBEDDED_DRAIN_SECONDS = 8.0
PR_SET_PDEATHSIG = 1
LOG_PARTS = 4
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def write_ready_file(path: Path, values: dict[str, object]) -> None:
    """Write a JSON file in one step, so that a reader does not see a part of it."""
    write_atomically(path, json.dumps(values) + "\n")


def set_up_logging(settings: ServiceSettings) -> Path:
    """Log to a file of this process in the state folder, and warnings also to stderr.

    Raises:
        ConfigurationError: the state folder cannot be written.
    """
    path = log_path(settings.state_dir, os.getpid())
    kept = settings.retention
    part_bytes = kept.log_bytes // LOG_PARTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prune_logs(path.parent, max_bytes=kept.log_bytes, before=time.time() - kept.keep_seconds)
        to_file = _LogFile(path, maxBytes=part_bytes, backupCount=LOG_PARTS - 1)
    except OSError as error:
        raise ConfigurationError(
            f"state_dir={settings.state_dir} cannot be written: {error}; {OTHER_STATE_DIR}"
        ) from error
    if settings.log_format == "json":
        to_file.setFormatter(JsonFormatter())
    else:
        to_file.setFormatter(TextFormatter(TEXT_FORMAT))
    to_file.addFilter(RequestIdFilter())
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(_BriefFormatter())
    to_stderr.setLevel(logging.WARNING)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.handlers[:] = [to_file, to_stderr]
    return path


class _BriefFormatter(TextFormatter):
    """Writes errors that the user can fix without a traceback. The log file has the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, TinkerCookbookError | UserError):
            return escape_controls(f"{record.getMessage()}: {error}")
        return super().format(record)


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file that reports a full disk once, instead of with a traceback for every line."""

    _complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            error = sys.exc_info()[1]
            print(f"{self.baseFilename} cannot be written: {error}", file=sys.stderr)


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address, or raise ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit this. An answer is written in two parts, its head and its body; otherwise
    # the second part waits up to 40 ms until the client confirms the first one.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        other = "--port, or 0" if error.args[0] == errno.EADDRINUSE else "--host or --port"
        cause = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"host={host!r} port={port} cannot be bound: {cause}; choose another {other}"
        ) from error
    bound.listen(BACKLOG)
    return bound


def _raise_file_limit() -> None:
    """Allow as many open files as possible: each waiting poll needs a file descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _base_url(host: str, bound: socket.socket) -> str:
    """Return the URL that this machine uses for the service."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{bound.getsockname()[1]}"


def serve(
    settings: ServiceSettings,
    *,
    announce: Callable[[Service, str], None],
    say: Callable[[str], None] | None = None,
    parent_pid: int | None = None,
) -> int:
    """Run a service until it is told to stop.

    After the first Ctrl-C or SIGTERM, running work is finished. Another Ctrl-C ends the process at
    once, with exit status 130. With a parent, the first Ctrl-C does that already.

    Args:
        announce: called with the service and its base URL when it accepts connections.
        say: called with messages for the operator while the service stops.
        parent_pid: process whose end stops the service.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: the address or the state folder cannot be used.
    """
    if parent_pid is not None:
        _die_with_parent(parent_pid)
    _raise_file_limit()
    bound = bind(settings.host, settings.port)
    log_file = set_up_logging(settings)
    service = Service(settings)
    logger.info("service %s, log %s", service.store.instance, log_file)
    url = _base_url(settings.host, bound)
    try:
        stopping = _Stopping(service, say or (lambda _: None), parent_pid)
        return asyncio.run(_serve(service, bound, lambda: announce(service, url), stopping))
    finally:
        bound.close()


async def _serve(
    service: Service,
    bound: socket.socket,
    announce: Callable[[], None],
    stopping: _Stopping,
) -> int:
    config = uvicorn.Config(
        build_app(service),
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    server = _Server(config)
    stopping.listen()
    service.start()
    running = asyncio.create_task(server.serve(sockets=[bound]))
    orphaned = asyncio.create_task(_wait_for_orphaning(stopping.parent_pid))
    failed = asyncio.create_task(service.engine.wait_for_failure())
    has_failed = False
    try:
        while not server.started and not running.done():
            await asyncio.sleep(0.005)
        announce()
        reasons = {asyncio.create_task(stopping.told.wait()), running, orphaned, failed}
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        has_failed = failed.done()  # check now: a model that is loading fails when the engine stops
        await service.drain(0.0 if has_failed else stopping.drain_seconds)
    finally:
        orphaned.cancel()
        server.should_exit = True
        await running
        await service.close()
        logger.info("stopped")
    return 1 if has_failed else 0


class _Stopping:
    """Reacts to signals: the first starts an orderly stop, another Ctrl-C ends the process."""

    def __init__(
        self, service: Service, say: Callable[[str], None], parent_pid: int | None
    ) -> None:
        self.told = asyncio.Event()
        self.parent_pid = parent_pid
        self._service = service
        self._say = say

    @property
    def drain_seconds(self) -> float:
        """Time limit for running work. A parent process ends its child after 15 seconds."""
        limits = self._service.limits
        return limits.drain_seconds if self.parent_pid is None else EMBEDDED_DRAIN_SECONDS

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._hear, number)

    def _hear(self, number: signal.Signals) -> None:
        # Process managers repeat SIGTERM, so only Ctrl-C counts. A parent process got it first.
        if number == signal.SIGINT and (self.told.is_set() or self.parent_pid is not None):
            self._end_now()
        if not self.told.is_set():
            self.told.set()
            work = self._service.describe_work()
            if work:
                self._say(
                    f"Stopping. Waiting up to {self.drain_seconds:.0f} s for {work}; "
                    "Ctrl-C again stops at once. Saved checkpoints stay."
                )
            else:
                self._say("Stopping; nothing is running. Ctrl-C again stops at once.")

    def _end_now(self) -> None:
        """End the process without waiting for threads. Saved checkpoints stay."""
        work = self._service.describe_work() or "nothing"
        logger.warning("stopped at once by Ctrl-C; unfinished: %s", work)
        self._service.abandon()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(INTERRUPTED)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, so that running work can be finished first."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


async def _wait_for_orphaning(parent_pid: int | None) -> None:
    while parent_pid is None or os.getppid() == parent_pid or is_running(parent_pid):
        await asyncio.sleep(PARENT_POLL_SECONDS)
    logger.warning("parent process %d is gone; stopping", parent_pid)


def _die_with_parent(parent_pid: int) -> None:
    """Ask Linux for SIGTERM when the parent dies. Other systems rely on polling."""
    if sys.platform == "linux" and os.getppid() == parent_pid:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
