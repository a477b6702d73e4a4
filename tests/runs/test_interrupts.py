"""Ctrl-C at any moment: one line, exit status 130, and soon; a second one does no harm."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.recipe_process import ROOT, count_lines, recipe_environment, start_recipe

LIMIT_SECONDS = 12
"""Far above what it takes, far below what the waits in these programs would take."""
SETTINGS = ("renderer_name=chatml", "batch_size=2", "max_length=128", "test_size=2", "lora_rank=2")
SETTINGS += ("learning_rate=1e-3", "infrequent_eval_every=0", "eval_every=0")

IMPORTING = """
from tinker_cookbook import cli_utils
import slow
"""
WAITING_FOR_A_THREAD = """
import asyncio, time, chz
from tinker_cookbook import cli_utils

@chz.chz
class Config:
    pass

async def wait():
    waiting = asyncio.create_task(asyncio.to_thread(time.sleep, 60))
    await asyncio.sleep(0.1)
    print("ready", flush=True)
    await waiting

def main(config: Config) -> None:
    asyncio.run(wait())

cli_utils.entrypoint(main)
"""
LISTING_COMMANDS = """
import ast, sys, time
from tinker_cookbook import cli

def wait(tree):
    print("ready", flush=True)
    time.sleep(60)

ast.get_docstring = wait
sys.exit(cli.main(["check", "chat.jsonl"]))
"""
IN_A_FINALIZER = """
import chz, time
from tinker_cookbook import cli_utils
from tinker_cookbook.runs import interrupts

class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)

@chz.chz
class Config:
    pass

def main(config: Config) -> None:
    interrupts.mark_begun()
    Slow()
    time.sleep(60)

cli_utils.entrypoint(main)
"""
TWO_THREADS_TELL = """
import time
from tinker_cookbook.runs import interrupts

def describe():
    time.sleep(0.5)  # the main thread tells meanwhile
    return "interrupted"

with interrupts.end_on_interrupt(describe, lambda: None):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(interrupts.GRACE_SECONDS + 0.25)
        interrupts.tell("interrupted")
        time.sleep(60)
"""
NO_RECIPE = """
from tinker_cookbook import cli_utils
import time

def work():
    print("ready", flush=True)
    time.sleep(60)

work()
"""


def start_program(code: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "slow.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    (folder / "program.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        env=recipe_environment(None, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def interrupt(process: subprocess.Popen[str], times: int = 1) -> str:
    """Send Ctrl-C, see that the process ends soon, and return what it says on stderr."""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    try:
        _, error = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    return error


def test_while_modules_are_imported(tmp_path: Path):
    process = start_program(IMPORTING, tmp_path)
    error = interrupt(process)
    assert error == "\ninterrupted before the run began; the same command starts it\n"
    assert process.returncode == 130


@pytest.mark.parametrize("times", [1, 2, 4])
def test_while_a_thread_cannot_be_stopped(tmp_path: Path, times: int):
    process = start_program(WAITING_FOR_A_THREAD, tmp_path)
    error = interrupt(process, times)
    assert error == "\ninterrupted before the run began; the same command starts it\n"
    assert process.returncode == 130


def test_two_threads_that_tell_at_once_print_one_line(tmp_path: Path):
    process = start_program(TWO_THREADS_TELL, tmp_path)
    assert interrupt(process) == "\ninterrupted\n"
    assert process.returncode == 130


def test_where_python_drops_the_exception(tmp_path: Path):
    process = start_program(IN_A_FINALIZER, tmp_path)
    error = interrupt(process)
    assert error == "\ninterrupted before the run began; the same command starts it\n"
    assert process.returncode == 130


def test_before_a_command_is_found(tmp_path: Path):
    process = start_program(LISTING_COMMANDS, tmp_path)
    assert interrupt(process) == "\ninterrupted\n"
    assert process.returncode == 130


def test_programs_without_an_entry_point_keep_their_traceback(tmp_path: Path):
    process = start_program(NO_RECIPE, tmp_path)
    assert "KeyboardInterrupt" in interrupt(process)


@pytest.mark.parametrize("recipe", ["sl_basic", "sl_loop"])
@pytest.mark.parametrize("times", [1, 2])
def test_while_the_service_loads(recipe: str, times: int, tiny_model_folder: Path, tmp_path: Path):
    (tmp_path / "temporary").mkdir()
    env = recipe_environment(None, tmp_path) | {"TMPDIR": str(tmp_path / "temporary")}
    settings = [word for word in SETTINGS if recipe == "sl_basic" or "eval_every" not in word]
    log_path = tmp_path / "runs" / "new"
    model = f"model_name={tiny_model_folder}"
    process = start_recipe(f"recipes.{recipe}", *settings, model, f"log_path={log_path}", env=env)
    assert process.stdout is not None
    while not any((tmp_path / "temporary").glob("tinker-cookbook-service-*/service.log")):
        assert process.poll() is None
        time.sleep(0.005)
    error = interrupt(process, times)
    assert error == "\ninterrupted; nothing is saved yet: the same command starts over\n"
    assert process.returncode == 130
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "temporary").glob("tinker-cookbook-service-*"))


def test_after_a_checkpoint_the_line_names_it(local_service, tmp_path: Path):
    env = recipe_environment(local_service, tmp_path)
    settings = (*SETTINGS, f"model_name={local_service.model}", f"log_path={tmp_path / 'run'}")
    process = start_recipe(
        "recipes.sl_basic", *settings, "max_steps=3000", "num_epochs=100", "save_every=2", env=env
    )
    while count_lines(tmp_path / "run" / "checkpoints.jsonl") < 1:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    last = (tmp_path / "run" / "checkpoints.jsonl").read_text().splitlines()[-1]
    name = last.partition('"name": "')[2][:6]
    assert f"\ninterrupted; the same command resumes from checkpoint {name}\n" in error
    assert "Traceback" not in error
    assert process.returncode == 130


def test_a_command_too(tmp_path: Path, tiny_model_folder: Path):
    (tmp_path / "temporary").mkdir()
    env = recipe_environment(None, tmp_path) | {"TMPDIR": str(tmp_path / "temporary")}
    words = ["sample", str(tiny_model_folder), "--base-url", "local", "--renderer", "chatml"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinker_cookbook.cli", *words],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any((tmp_path / "temporary").glob("tinker-cookbook-service-*/service.log")):
        assert process.poll() is None
        time.sleep(0.005)
    assert interrupt(process).strip() == "interrupted"
    assert process.returncode == 130
