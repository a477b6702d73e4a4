"""Show the running services of a state folder, their work and the saved checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.byte_sizes import format_bytes
from tinker_cookbook.utils.durations import format_duration
from tinker_cookbook.utils.terminal_text import escape_controls

__all__ = ["add_arguments", "read_notes", "run"]

Status = dict[str, Any]
"""JSON of the service's status route, or of the note that a service writes when it starts."""

NOT_RUNNING = 3
"""Exit status if no service is running, following service managers."""
TIMEOUT_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="state folder (default: service in ~/.tinker-cookbook, or in $TINKER_COOKBOOK_HOME)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=10,
        metavar="N",
        help="maximum runs and checkpoints listed (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the state as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the state; return 0 if a service answers, 3 if none does."""
    if not 0 <= args.limit <= 500:
        raise ConfigurationError(f"limit={args.limit} is out of range; use 0 to 500.")
    from tinker_cookbook.model_files import cookbook_home

    state_dir = (args.state_dir or cookbook_home() / "service").expanduser().resolve()
    found = [_ask(note, args.limit) for note in read_notes(state_dir)]
    if args.json:
        print(json.dumps({"state_dir": str(state_dir), "services": found}, indent=1))
    else:
        print(f"State folder: {state_dir}")
        for service in found:
            print()
            # clients choose names, which may contain control characters
            print("\n".join(map(escape_controls, _describe(service))))
        if not any(service["answers"] for service in found):
            print(_describe_saved(state_dir, args.limit))
    return 0 if any(service["answers"] for service in found) else NOT_RUNNING


def read_notes(state_dir: Path) -> list[Status]:
    """Return the notes of running services; a service writes one when it starts."""
    notes = []
    for path in sorted((state_dir / "running").glob("*.json")):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            is_alive = _is_locked(state_dir / "locks" / path.stem)
        except (OSError, ValueError) as error:
            print(f"{path} cannot be read: {error}", file=sys.stderr)
            continue
        if is_alive:
            notes.append(note)
    return notes


def _is_locked(path: Path) -> bool:
    """Return whether a service holds its lock; the system releases it when the process ends."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _ask(note: Status, limit: int) -> Status:
    """Return the status that a service reports; if it does not answer, only its note."""
    import httpx

    known = {key: note.get(key) for key in ("pid", "base_url", "models", "started_at")}
    headers = {"Authorization": f"Bearer {note.get('status_token')}"}
    url = f"{note.get('base_url')}/api/v1/local/status?limit={limit}"
    try:
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            answer = client.get(url, headers=headers)
        answer.raise_for_status()
        return known | {"answers": True, "status": answer.json()}
    except (httpx.HTTPError, ValueError) as error:
        problem = str(error) or type(error).__name__
        return known | {"answers": False, "problem": problem}


def _describe(service: Status) -> list[str]:
    """Return the lines about one service."""
    where = f"{service['base_url']} (process {service['pid']})"
    if not service["answers"]:
        return [f"A service on {where} does not answer: {service['problem']}"]
    status = service["status"]
    queue, memory, totals = status["queue"], status["memory"], status["totals"]
    models = [f"{m['name']} ({_model_state(m)})" for m in status["models"]]
    free = memory["available_bytes"]
    return [
        f"A service on {where}, up {format_duration(status['uptime_seconds'])}"
        + (", stopping" if status["is_stopping"] else ""),
        f"  models       {', '.join(models)}",
        f"  queue        {queue['unfinished']} unfinished, {queue['operations']:.0f} waiting for "
        f"the engine; {queue['sampling_running']:.0f} sampling, "
        f"{queue['sampling_waiting']:.0f} waiting to",
        f"  done         {totals['optimizer_steps']} optimizer steps, "
        f"{totals['trained_tokens']:,} tokens trained, {totals['sampled_tokens']:,.0f} sampled",
        f"  memory       {format_bytes(memory['resident_bytes'])}"
        + ("" if free is None else f", {format_bytes(free)} free on this machine"),
        f"  sessions     {status['num_sessions']}, with {status['num_samplers']} samplers",
        f"  runs         {status['num_runs']}",
        *(_run_line(run) for run in status["runs"]),
        f"  checkpoints  {status['num_checkpoints']}",
        *(_checkpoint_line(item) for item in status["checkpoints"]),
    ]


def _model_state(model: Status) -> str:
    if not model["is_loaded"]:
        return "not loaded"
    return f"{model['dtype']} on {model['device']}"


def _run_line(run: Status) -> str:
    state = "ended" if not run["is_live"] else "working" if run["is_busy"] else "in memory"
    if run.get("continued_by"):
        state += ", continued by a newer run"
    num_steps = run.get("first_step", 0) + run["num_steps"]
    if num_steps:
        state += f", {num_steps} steps"
    name = f"{run['name']}  " if run["name"] else ""
    return (
        f"    {name}{run['run_id']}  rank {run['lora_rank']}, {state}, {_ago(run['last_request'])}"
    )


def _checkpoint_line(item: Status) -> str:
    size = format_bytes(item["size_bytes"] or 0)
    return f"    {item['tinker_path']}  {size}, {_ago(item['time'])}"


def _describe_saved(state_dir: Path, limit: int) -> str:
    """Return what the index lists, opened read-only."""
    path = state_dir / "index.sqlite3"
    if not path.exists():
        return "No service is running, and nothing is saved."
    import sqlite3

    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            num_runs = connection.execute("SELECT COUNT(*) FROM runs").fetchone()[0]
            rows = connection.execute(
                "SELECT run_id, segment, name, size_bytes, created_at FROM checkpoints "
                "WHERE expires_at IS NULL OR expires_at > ? ORDER BY created_at DESC",
                (datetime.now(UTC).timestamp(),),
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    lines = [f"No service is running. Saved runs: {num_runs}, checkpoints: {len(rows)}."]
    for run_id, segment, name, size_bytes, created_at in rows[:limit]:
        age = format_duration(datetime.now(UTC).timestamp() - created_at)
        path = escape_controls(f"tinker://{run_id}/{segment}/{name}")
        lines.append(f"  {path}  {format_bytes(size_bytes)}, {age} ago")
    return "\n".join(lines)


def _ago(time: str) -> str:
    return (
        f"{format_duration((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())} ago"
    )
