"""A local service as a child process: start it, wait until it answers, stop it."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.runs import interrupts
from tinker_cookbook.utils.processes import is_running

__all__ = ["EmbeddedService", "add_to_no_proxy", "find_saved_model"]

NEEDED_MODULES = ("torch", "safetensors", "starlette", "uvicorn")
START_SECONDS = 180.0
STOP_SECONDS = 15.0
LOG_TAIL_LINES = 20
FOLDER_PREFIX = "tinker-cookbook-service-"
"""Start of the names of temporary folders; the id of the process that made them follows."""


class EmbeddedService:
    """A running local service that belongs to this process.

    Attributes:
        api_key: A random key that only this process knows.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, api_key: str) -> None:
        self.api_key = api_key
        self._process = process
        self._folder = folder
        self._stopping = False
        self._ready: dict[str, Any] = {}
        self._reading = threading.Lock()
        self._interrupt = threading.Event()
        self._has_ended = interrupts.kill_with_process(self.kill)
        atexit.register(self.stop)

    @classmethod
    def start(cls, model: str) -> EmbeddedService:
        """Start a service for one model, without waiting until it can be used.

        Raises:
            ConfigurationError: if the extra `local` is not installed, or the model is unknown.
        """
        check_local_extra()
        from tinker_cookbook.model_files import cookbook_home, resolve_model_folder

        resolve_model_folder(model)
        add_to_no_proxy("127.0.0.1", "localhost")
        api_key = f"tml-{secrets.token_hex(24)}"
        _remove_orphans()
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
        state = cookbook_home() / "service"
        try:
            service = cls(_launch(model, state, folder, api_key), folder, api_key)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        threading.Thread(target=service._watch, name="service-watch", daemon=True).start()
        return service

    @property
    def log_path(self) -> Path:
        """The log of the service; removed when the service is stopped."""
        return self._folder / "service.log"

    @property
    def _ready_file(self) -> Path:
        return self._folder / "ready.json"

    @property
    def pid(self) -> int:
        """The process id of the service."""
        return self._process.pid

    def wait_until_ready(self) -> str:
        """Wait until the service accepts connections, and return its address.

        Raises:
            TrainingError: if it stops or does not answer; the message ends with its log.
        """
        started = last_note = time.monotonic()
        while not self._ready_file.exists():
            crash = self.crash_report()
            if crash is not None or self._stopping:
                raise TrainingError(crash or "the local service has been stopped.")
            now = time.monotonic()
            if now - started > START_SECONDS:
                raise TrainingError(
                    f"the local service has not answered for {START_SECONDS:.0f} s.{self._tail()}"
                )
            if now - last_note > 10:
                last_note = now
                waited = f"{now - started:.0f} s"
                print(f"waiting for the local service ({waited}) ...", file=sys.stderr, flush=True)
            time.sleep(0.02)
        with self._reading:
            if not self._ready:
                self._ready = json.loads(self._ready_file.read_text(encoding="utf-8"))
                for note in self._ready["notes"]:
                    print(f"note: {note}", file=sys.stderr, flush=True)
        return self._ready["base_url"]

    def dashboard_link(self) -> str:
        """Return an address of the dashboard that signs in once, within an hour."""
        base_url = self.wait_until_ready()
        return f"{base_url}/#ticket={self._ready['ticket']}"

    def stop(self, *, at_once: bool = False) -> None:
        """Ask the service to stop, kill it after a timeout, and remove its temporary files.

        Args:
            at_once: Stop without finishing the requests in progress. Saved checkpoints are kept
                in any case.
        """
        self._stopping = True
        atexit.unregister(self.stop)
        if at_once and not self._ready_file.exists():
            self._process.kill()  # it has nothing to save, and would finish its imports first
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if at_once else signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._forget()

    def kill(self) -> None:
        """Kill the service; checkpoints that it has acknowledged are safe."""
        self._stopping = True
        self._process.kill()
        self._forget()

    def _forget(self) -> None:
        self._has_ended()
        shutil.rmtree(self._folder, ignore_errors=True)

    def crash_report(self) -> str | None:
        """Return what happened if the service stopped by itself; None while it runs."""
        if self._stopping or self._process.poll() is None:
            return None
        return f"the local service stopped ({_exit_text(self._process.returncode)}).{self._tail()}"

    def interrupt_main_thread_on_crash(self) -> None:
        """Raise KeyboardInterrupt in the main thread if the service stops by itself.

        Otherwise the SDK would repeat failed requests for minutes. `Connection.__exit__` turns the
        interrupt into an error that shows the service's log.
        """
        if threading.current_thread() is threading.main_thread():
            self._interrupt.set()

    def _watch(self) -> None:
        self._process.wait()
        # A real signal also wakes a main thread that waits for a lock.
        if self.crash_report() is not None and self._interrupt.is_set():
            interrupts.announce_interrupt()
            signal.pthread_kill(_main_thread_id(), signal.SIGINT)

    def _tail(self) -> str:
        try:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        lines = text.strip().splitlines()[-LOG_TAIL_LINES:]
        return " The end of its log:\n  " + "\n  ".join(lines) if lines else " Its log is empty."


def find_saved_model(checkpoint: str) -> str | None:
    """Return the base model of a checkpoint that is saved on this machine.

    Returns:
        None if the index of the saved checkpoints cannot be read.

    Raises:
        ConfigurationError: if no checkpoint of that name is saved here.
    """
    import sqlite3

    from tinker_cookbook.model_files import cookbook_home

    path = cookbook_home().resolve() / "service" / "index.sqlite3"
    query = (
        "SELECT base_model FROM checkpoints JOIN runs USING (run_id) "
        "WHERE 'tinker://' || run_id || '/' || segment || '/' || name = ?"
    )
    found = None
    if path.exists():
        try:
            with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as index:
                found = index.execute(query, (checkpoint,)).fetchone()
        except sqlite3.Error:
            return None  # the service reports the problem with its index
    if found is None:
        raise ConfigurationError(
            f"{checkpoint} does not exist; nothing of that name is saved in {path.parent}. "
            "`tinker-cookbook status` lists the saved checkpoints. For a checkpoint on another "
            "service give its base_url (--base-url)."
        )
    return found[0]


def _remove_orphans() -> None:
    """Remove the temporary folders of processes that were killed before their cleanup."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(FOLDER_PREFIX).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def check_local_extra() -> None:
    """Raise an error if packages of the extra `local` are missing."""
    missing = _find_missing_modules()
    if missing:
        raise ConfigurationError(
            f"the local service needs {', '.join(missing)}, which this environment does not have; "
            'install them with: pip install "tinker-cookbook[local]". To use a service elsewhere, '
            "give base_url=http://... or set TINKER_API_KEY"
        )


def _find_missing_modules() -> list[str]:
    """Return the modules of the extra `local` that are not installed."""
    return [name for name in NEEDED_MODULES if importlib.util.find_spec(name) is None]


def add_to_no_proxy(*hosts: str) -> None:
    """Keep requests to `hosts` away from any HTTP proxy, in this process and its children."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(known + [host for host in hosts if host not in known])


def _launch(model: str, state: Path, folder: Path, api_key: str) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "tinker_cookbook.local"),
        *("--model", model, "--host", "127.0.0.1", "--port", "0", "--state-dir", str(state)),
        *("--ready-file", str(folder / "ready.json"), "--parent-pid", str(os.getpid())),
    ]
    with (folder / "service.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TINKER_API_KEY": api_key},
            # Ctrl-C in a terminal then reaches only the recipe, which still needs the service.
            process_group=0,
        )


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name
    hint = "; perhaps the machine ran out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _main_thread_id() -> int:
    ident = threading.main_thread().ident
    assert ident is not None, "the main thread has been started"
    return ident
