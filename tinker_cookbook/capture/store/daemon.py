"""A small server that keeps rows of several processes in one SQLite database.

`client.ensure_daemon` starts it. It listens on the loopback address, and ends when no request came
for a while. Only programs that can read the file `daemon.json` know its key.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["DATABASE", "INFO", "main"]

DATABASE = "captures.sqlite"
INFO = "daemon.json"
"""File with the address, the key and the process id."""
MAX_BODY_BYTES = 64 * 2**20
_CREATE = """
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    run_id TEXT,
    iteration INTEGER,
    group_idx INTEGER,
    traj_idx INTEGER,
    row TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS rows_of_run ON rows (run_id, iteration, group_idx, traj_idx);
"""
_KEYS = ("run_id", "iteration", "group_idx", "traj_idx")
_INSERT = (
    "INSERT INTO rows (kind, run_id, iteration, group_idx, traj_idx, row) VALUES (?,?,?,?,?,?)"
)


class _Server(ThreadingHTTPServer):
    """Keeps the database and when the last request came."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key = secrets.token_hex(16)
        self.last_request = time.monotonic()
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            folder / DATABASE, check_same_thread=False, isolation_level=None
        )
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(_CREATE)

    def keep(self, rows: list[dict[str, object]]) -> None:
        """Write rows in one transaction."""
        values = [
            (str(row.get("kind")), *(row.get(key) for key in _KEYS), json.dumps(row))
            for row in rows
        ]
        with self._lock:
            self._database.execute("BEGIN")
            try:
                self._database.executemany(_INSERT, values)
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


class _Handler(BaseHTTPRequestHandler):
    """Answers `GET /healthz` and `POST /rows`."""

    server: _Server

    def do_GET(self) -> None:
        """Tell that the server lives."""
        self.server.last_request = time.monotonic()
        self._answer(200 if self.path == "/healthz" else 404)

    def do_POST(self) -> None:
        """Keep the rows of the body; the answer comes after they are kept."""
        self.server.last_request = time.monotonic()
        key = self.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(key.encode(), self.server.key.encode()):
            self._answer(401)
            return
        length = int(self.headers.get("content-length", 0))
        if length > MAX_BODY_BYTES:
            self._answer(413)
            return
        try:
            rows = json.loads(self.rfile.read(length))
            self.server.keep(rows)
        except (ValueError, AttributeError, sqlite3.Error):
            self._answer(400)
            return
        self._answer(200)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def main(argv: list[str] | None = None) -> int:
    """Serve until idle; return the exit status."""
    parser = argparse.ArgumentParser(description="Keeps captured rows in a database.")
    parser.add_argument("folder", type=Path, help="Folder of the database.")
    parser.add_argument("--idle-minutes", type=float, default=0.0, help="0: never stop.")
    arguments = parser.parse_args(argv)
    server = _Server(arguments.folder)
    _write_info(arguments.folder / INFO, server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    idle = 60 * arguments.idle_minutes or float("inf")
    while time.monotonic() - server.last_request < idle:
        time.sleep(min(1.0, idle / 4))
    (arguments.folder / INFO).unlink(missing_ok=True)
    server.shutdown()
    return 0


def _write_info(path: Path, server: _Server) -> None:
    port = server.server_address[1]
    info = {"base_url": f"http://127.0.0.1:{port}", "key": server.key, "pid": os.getpid()}
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(info, file)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
