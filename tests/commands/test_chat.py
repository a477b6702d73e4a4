"""`tinker-cookbook chat`, as a user runs it: on a pipe, on a terminal, stopped by Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, train_step
from tinker_cookbook import cli
from tinker_cookbook.commands import chat as chat_command

PROGRAM = "import sys; from tinker_cookbook.cli import main; sys.exit(main())"
SECONDS = 90


def command(service: ServiceProcess, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = os.environ | {"TINKER_API_KEY": service.api_key, "TERM": "dumb"}
    words = ["chat", *arguments, "--base-url", service.base_url, "--renderer", "chatml"]
    return [sys.executable, "-c", PROGRAM, *words], environment


def chat(service: ServiceProcess, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words, environment = command(service, *arguments)
    return subprocess.run(
        words, env=environment, input=text, capture_output=True, text=True, timeout=SECONDS
    )


@pytest.fixture(scope="module")
def checkpoint(local_service: ServiceProcess) -> str:
    client = local_service.connect()
    run = client.create_lora_training_client(base_model=local_service.model, rank=2).result()
    train_step(run, batch())
    return run.save_weights_for_sampler("chatted-with").result().path


def test_a_conversation_on_a_pipe(local_service: ServiceProcess, checkpoint: str) -> None:
    text = "Hello\nWho are\\\nyou?\n/help\n/reset\n/retry\nHello\n/nonsense\n/exit\nnever read\n"
    options = ("--temperature", "0", "--max-tokens", "6")
    done = chat(local_service, text, checkpoint, "--model", local_service.model, *options)
    assert done.returncode == 0, done.stderr
    _, _, talk = done.stdout.partition("Ctrl-D exits.\n")
    lines = talk.splitlines()
    assert "/system TEXT" in talk
    assert "(conversation forgotten)" in lines
    assert "(there is nothing to answer yet)" in lines
    assert "/nonsense is not a command; use one of these." in lines
    first = talk.partition("\n")[0]
    after = talk.partition("(there is nothing to answer yet)\n")[2]
    assert after.partition("\n")[0] == first, "a forgotten conversation begins as the first did"
    log = local_service.log()
    assert "POST /oai/api/v1/completions 200" in log


def test_the_whole_conversation_is_sent(local_service: ServiceProcess) -> None:
    """A prompt that outgrows the context shows it; the talk goes on after the refusal."""
    long = "word " * 150
    done = chat(
        local_service,
        f"{long}\n{long}\n{long}\n/reset\nHi\n",
        local_service.model,
        "--max-tokens",
        "4",
        "--system",
        "Be brief.",
    )
    assert done.returncode == 0, done.stderr
    assert "(refused: " in done.stdout
    assert "context length" in done.stdout
    _, forgotten, answer = done.stdout.partition("(conversation forgotten)\n")
    assert forgotten
    assert "(refused: " not in answer


def test_mistakes_are_told(local_service: ServiceProcess, capsys) -> None:
    done = chat(
        local_service,
        "",
        "tinker://nothing:train:0/sampler_weights/x",
        "--model",
        local_service.model,
    )
    assert done.returncode == 2
    assert "cannot be sampled" in done.stderr
    assert cli.main(["chat", "--max-tokens", "0"]) == 2
    assert "max_tokens=0 is too small" in capsys.readouterr().err


def read_until(terminal: int, pattern: str, seen: str = "") -> str:
    deadline = time.monotonic() + SECONDS
    while not re.search(pattern, seen):
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def interrupt_until(pid: int, terminal: int, pattern: str) -> str:
    """Press Ctrl-C until it is heard.

    A signal that arrives after input() has written its prompt and before it waits for a key is
    not seen by Python until the next key or signal.
    """
    seen, deadline = "", time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        os.kill(pid, signal.SIGINT)
        pause = time.monotonic() + 2.0
        while time.monotonic() < pause:
            if select.select([terminal], [], [], 0.2)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
            if re.search(pattern, seen):
                return seen
    raise AssertionError(seen)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(local_service: ServiceProcess) -> None:
    words, environment = command(local_service, local_service.model, "--max-tokens", "900")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in background
        os.execvpe(words[0], words, environment)
    seen = read_until(terminal, r"> $")
    for _ in range(20):  # a random model may end its answer before the signal comes
        os.write(terminal, b"Hello\n")
        read_until(terminal, r"(?s)Hello\r\n.+")
        seen = interrupt_until(pid, terminal, r"\((stopped|Ctrl-D exits)\)[^>]*> $")
        if "(stopped)" in seen:
            break
    assert "(stopped)" in seen
    interrupt_until(pid, terminal, r"\(Ctrl-D exits\)[^>]*> $")
    time.sleep(1.5)  # a program that Ctrl-C should end would be ended by now
    os.write(terminal, b"/reset\n")
    seen = read_until(terminal, r"forgotten\)\s+> $", seen)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert "Traceback" not in seen


def test_any_tinker_service_will_do(local_service: ServiceProcess, monkeypatch, capsys) -> None:
    """Without the endpoint, whole answers come through the SDK."""
    monkeypatch.setattr(chat_command, "_find_stream", lambda connection, target: None)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    words = [local_service.model, "--base-url", local_service.base_url, "--max-tokens", "5"]
    assert cli.main(["chat", *words, "--renderer", "chatml"]) == 0
    out = capsys.readouterr().out
    assert out.partition("Ctrl-D exits.\n")[2].strip()
    assert Path(local_service.model).name in out
