"""Run a recipe as a separate process, kill it at chosen moments, and compare what runs leave."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.numpy import load_file

from tests.conftest import ServiceProcess
from tinker_cookbook import cli_utils, recipe

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120


def recipe_environment(service: ServiceProcess | None, home: Path) -> dict[str, str]:
    """No key or address but those of the service; `None` lets the recipe start its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    own = {
        "HOME": str(home),
        "TINKER_COOKBOOK_HOME": str(home / "cookbook"),
        "TINKER_COOKBOOK_RUNS_DIR": str(home / "runs"),
        "TINKER_TELEMETRY": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if service is not None:
        own |= {"TINKER_BASE_URL": service.base_url, "TINKER_API_KEY": service.api_key}
    return kept | own


def start_recipe(module: str, *settings: str, env: dict[str, str], cwd: Path = ROOT):
    """Start `python -m module settings...` with its output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *settings],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_recipe(module: str, *settings: str, env: dict[str, str], cwd: Path = ROOT):
    """Run to the end; the exit status is the caller's to check."""
    process = start_recipe(module, *settings, env=env, cwd=cwd)
    out, err = process.communicate(timeout=SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class ForkedRecipes:
    """Starts recipes as processes in which the slow imports are done, which saves a second.

    Each is a separate process with the recipe's own command line, and can be killed.
    """

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self._env = env
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tinker", "transformers", "recipes.sl_basic"])

    def start(self, module: str, *settings: str):
        """Start one."""
        process = self._context.Process(
            target=_run_entrypoint, args=(module, list(settings), self._env, str(self._log))
        )
        process.start()
        return process

    def run(self, module: str, *settings: str) -> None:
        """Run one to the end, which must be a good one."""
        process = self.start(module, *settings)
        process.join(SECONDS)
        assert process.exitcode == 0, self._log.read_text()

    def run_until(self, condition: Callable[[], bool], module: str, *settings: str) -> bool:
        """Run one and SIGKILL it as soon as the condition holds; False if it ended before."""
        process = self.start(module, *settings)
        deadline = time.monotonic() + SECONDS
        while process.is_alive() and not condition():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self._log.read_text()
        return process.exitcode != 0


def _run_entrypoint(module: str, settings: list[str], env: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    run_in_this_process(importlib.import_module(module), settings)


def run_in_this_process(module: ModuleType, settings: list[str]) -> None:
    """Run the command line of a recipe here."""
    if hasattr(module, "build") and hasattr(module, "main"):
        module.main(settings)
    elif hasattr(module, "build"):
        recipe.main(module.Config, module.build, argv=settings)
    else:  # a recipe that writes out its loop
        cli_utils.entrypoint(module.main, settings)


def count_lines(path: Path) -> int:
    """Lines of a file that may not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metric_rows(log_path: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock measured."""
    rows = read_jsonl(log_path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def final_adapter(log_path: Path, state_dir: Path) -> dict[str, bytes]:
    """Every tensor of the final checkpoint, weights and optimizer state, byte for byte.

    Tensors and not files: the order of the metadata in a safetensors header is random.
    """
    [final] = [row for row in read_jsonl(log_path / "checkpoints.jsonl") if row.get("final")]
    tensors = {}
    for path in (final["state_path"], final["sampler_path"]):
        folder = _folder_of(path, state_dir)
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                tensors[f"{path.split('/')[-2]}/{file.name}/{name}"] = tensor.tobytes()
    assert len({name.rpartition("/")[0] for name in tensors}) == 3, tensors.keys()
    return tensors


def _folder_of(tinker_path: str, state_dir: Path) -> Path:
    run_id, segment, name = tinker_path.removeprefix("tinker://").split("/")
    for description in (state_dir / "checkpoints").glob("*/checkpoint.json"):
        found = json.loads(description.read_text())["checkpoint"]
        if (found["run_id"], found["segment"], found["name"]) == (run_id, segment, name):
            return description.parent
    raise AssertionError(f"{tinker_path} is not in {state_dir}")
