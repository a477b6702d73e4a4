"""A service as a process: start, address, key, parent, shutdown, restart."""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tinker

from tests.conftest import TEST_KEY
from tests.e2e.sdk import batch, datum, forward, logprobs_of, tokens, train_step
from tests.local.service.disks import fill, small_disk, without_special_rights
from tinker_cookbook import cli
from tinker_cookbook.commands import serve, status
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.process.launch import build_settings, check_arguments
from tinker_cookbook.local.process.lifecycle import bind
from tinker_cookbook.local.service.storage.store import Store
from tinker_cookbook.utils.sdk_sessions import close_session


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


HOLD_TORCH = """
import importlib.machinery, os, sys, time

class HoldTorch:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def wait_and_execute(module):
            while not os.path.exists(os.environ["TORCH_MAY_LOAD"]):
                time.sleep(0.01)
            execute(module)

        spec.loader.exec_module = wait_and_execute
        return spec

sys.meta_path.insert(0, HoldTorch())
"""


def test_it_answers_before_torch_is_loaded(service_factory, tiny_model_folder, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOLD_TORCH)
    may_load = tmp_path / "torch may load"
    environment = {"PYTHONPATH": str(tmp_path), "TORCH_MAY_LOAD": str(may_load)}
    service = service_factory(tiny_model_folder, environment=environment)
    with urllib.request.urlopen(f"{service.base_url}/api/v1/healthz") as reply:
        assert json.load(reply) == {"status": "ok"}
    assert "libtorch" not in Path(f"/proc/{service.process.pid}/maps").read_text()
    may_load.touch()
    client = service.connect()
    run = client.create_lora_training_client(base_model=service.model, rank=2).result()
    train_step(run, batch())
    assert "libtorch" in Path(f"/proc/{service.process.pid}/maps").read_text()
    assert service.stop() == 0


def test_state_and_logs_are_the_owners_alone(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    assert stat.S_IMODE(service.state_dir.stat().st_mode) == 0o700
    request = urllib.request.Request(
        f"{service.base_url}/api/v1/sessions", headers={"X-API-Key": "tml-guess"}
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    assert "GET /sessions 401" in service.log()
    assert service.api_key not in service.log()


def test_a_child_stops_with_its_parent(tmp_path, tiny_model_folder) -> None:
    ready = tmp_path / "ready.json"
    program = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-m', 'tinker_cookbook.local', *sys.argv[1:],"
        " '--parent-pid', str(os.getpid())])\n"
        "time.sleep(600)\n"
    )
    arguments = ["--model", str(tiny_model_folder), "--state-dir", str(tmp_path / "state")]
    parent = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--ready-file", str(ready)]
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = json.loads(ready.read_text())["pid"]
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


HOLD_HASHES = """
import hashlib, os, time

digest = hashlib.file_digest

def wait_and_digest(file, *arguments):
    if os.path.exists(os.environ["HASHES_WAIT"]):
        open(os.environ["HASHES_WAIT"] + " here", "w").close()
    while os.path.exists(os.environ["HASHES_WAIT"]):
        time.sleep(0.01)
    return digest(file, *arguments)

hashlib.file_digest = wait_and_digest
"""


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
def test_checking_a_large_checkpoint_holds_up_its_run_only(
    service_factory, tiny_model_folder, tmp_path
) -> None:
    """Others are answered meanwhile; what the run was asked for after it comes after it."""
    (tmp_path / "sitecustomize.py").write_text(HOLD_HASHES)
    wait = tmp_path / "wait"
    environment = {"PYTHONPATH": str(tmp_path), "HASHES_WAIT": str(wait)}
    service = service_factory(tiny_model_folder, environment=environment)
    client = service.connect()
    run = client.create_lora_training_client(base_model=service.model, rank=4).result()
    train_step(run, batch())
    saved = np.concatenate(forward(run, batch()))
    path = run.save_state("kept").result().path
    train_step(run, batch())
    wait.touch()
    loading = run.load_state_with_optimizer(path)
    computed = run.forward(batch(), "cross_entropy")
    while not (tmp_path / "wait here").exists():
        time.sleep(0.01)
    with urllib.request.urlopen(f"{service.base_url}/api/v1/healthz", timeout=2) as reply:
        assert json.load(reply) == {"status": "ok"}
    other = client.create_lora_training_client(base_model=service.model, rank=4).result()
    train_step(other, batch())
    time.sleep(0.2)
    assert not loading.future().done()
    assert not computed.future().done()
    wait.unlink()
    loading.result()
    np.testing.assert_array_equal(np.concatenate(logprobs_of(computed.result())), saved)


def start_and_fail(
    tmp_path: Path, *arguments: str, key: str | None = None, wrapper: Sequence[str] = ()
) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TINKER_API_KEY"}
    if key is not None:
        environment["TINKER_API_KEY"] = key
    done = subprocess.run(
        [
            *(*wrapper, sys.executable, "-m", "tinker_cookbook.local"),
            *("--state-dir", str(tmp_path), *arguments),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_another_address_needs_a_key_that_is_set(tmp_path) -> None:
    assert "TINKER_API_KEY is not set" in start_and_fail(tmp_path, "--host", "0.0.0.0")
    error = start_and_fail(tmp_path, "--host", "0.0.0.0", key="tml-short-key-0123456")
    assert "at least 32" in error
    assert "must start with 'tml-'" in start_and_fail(tmp_path, key="sk-something-else-0123456789")
    assert not (tmp_path / "index.sqlite3").exists()


def test_a_taken_port_is_named(tmp_path, local_service) -> None:
    port = local_service.base_url.rpartition(":")[2]
    error = start_and_fail(tmp_path, "--port", port, key="tml-0123456789abcdef")
    assert f"port={port} cannot be bound" in error
    assert "port=70000" in start_and_fail(tmp_path, "--port", "70000", key="tml-0123456789abcdef")


@pytest.mark.parametrize("is_used", [False, True])
def test_a_state_folder_that_cannot_be_written_is_one_line(
    tmp_path, tiny_model_folder, is_used: bool
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    if is_used:
        Store(state).close()
    state.chmod(0o500)
    error = start_and_fail(
        *(state, "--model", str(tiny_model_folder)),
        key=TEST_KEY,
        wrapper=without_special_rights(),
    )
    assert f"state_dir={state} cannot be written" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("room", [0, 64 * 1024, 200 * 1024])
def test_a_full_disk_is_one_line(tmp_path, tiny_model_folder, room: int) -> None:
    """Also where the index still fits, but not everything that is written after it."""
    with small_disk(tmp_path / "disk", "2m"):
        fill(tmp_path / "disk", leaving=room)
        state = tmp_path / "disk" / "state"
        if room == 200 * 1024:
            Store(state).close()
            fill(tmp_path / "disk", leaving=0)
        error = start_and_fail(state, "--model", str(tiny_model_folder), key=TEST_KEY)
        assert str(state) in error
        assert "choose another --state-dir, or set TINKER_COOKBOOK_HOME" in error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--num-threads", "0"], "num_threads=0"),
        (["--spill-after", "nan"], "spill_after=nan"),
        (["--log-mib", "0"], "log_mib=0"),
        (["--keep-days", "inf"], "keep_days=inf"),
        (["--models-dir", "missing"], "models_dir=missing"),
        (["--assets-dir", "missing"], "assets_dir=missing"),
        (["--state-dir", "FILE"], "state_dir=.*FILE is a file"),
        (["--state-dir", "FILE/x"], "state_dir=.*FILE/x cannot be written"),
        (["--host", "203.0.113.1"], "cannot be bound: Cannot assign requested address"),
        (["--state-dir", "SHARED"], "SHARED is also used for other things"),
    ],
)
def test_settings_that_cannot_be_are_named(
    tmp_path, monkeypatch, options: list[str], problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINKER_API_KEY", "tml-0123456789abcdef")
    (tmp_path / "FILE").write_text("")
    (tmp_path / "SHARED").mkdir()
    (tmp_path / "SHARED").chmod(0o1777)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--state-dir", "state", *options])
    with pytest.raises(ConfigurationError, match=problem):
        build_settings(args)
    assert stat.S_IMODE((tmp_path / "SHARED").stat().st_mode) == 0o1777


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("", "host='0.0.0.0' can be reached from other machines, and TINKER_API_KEY is not set"),
        ("tml-0123456789abcdef", "at least 32 ASCII characters"),
    ],
)
def test_an_open_service_needs_a_key_before_a_model_is_loaded(
    monkeypatch, key: str, problem: str
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", key)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with pytest.raises(ConfigurationError, match=problem):
        check_arguments(parser.parse_args(["--host", "0.0.0.0", "--port", "0"]))


def test_a_device_that_cannot_be_used_ends_the_service(tmp_path, tiny_model_folder) -> None:
    options = ["--model", str(tiny_model_folder), "--state-dir", str(tmp_path / "state")]
    done = subprocess.run(
        [sys.executable, "-m", "tinker_cookbook.local", *options, "--device", "nonsense"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "device='nonsense' is not usable" in done.stderr
    assert "Traceback" not in done.stderr
    (log,) = (tmp_path / "state" / "logs").iterdir()
    assert "Traceback" in log.read_text()


def test_a_stop_while_the_model_is_loaded_is_no_failure(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    assert service.stop() == 0
    assert "ERROR" not in service.log()


def test_a_restart_finds_what_was_saved(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    client = service.connect(display_name="before")
    run = client.create_lora_training_client(base_model=service.model, rank=4).result()
    train_step(run, batch())
    expected = np.concatenate(forward(run, batch()))
    path = run.save_state("kept").result().path
    session = client.holder.get_session_id()
    assert service.stop() == 0
    again = service_factory(tiny_model_folder)
    rest = tinker.RestClient(base_url=again.base_url, api_key=again.api_key)
    assert rest.get_session(session).result().training_run_ids == [run.model_id]
    other = again.connect()
    loaded = other.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_array_equal(np.concatenate(forward(loaded, batch())), expected)
    run.holder._session_id = session


def test_a_shutdown_finishes_what_is_in_flight(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    client = service.connect()
    run = client.create_lora_training_client(base_model=service.model, rank=4).result()
    running = [run.forward_backward(batch(40, seed=n), "cross_entropy") for n in range(5)]
    saving = run.save_state("last")
    deadline = time.monotonic() + 30
    while "POST /save_weights 200" not in service.log() and time.monotonic() < deadline:
        time.sleep(0.02)
    service.process.send_signal(signal.SIGTERM)
    for future in running:
        assert future.result(timeout=30).metrics["loss:sum"] > 0
    path = saving.result(timeout=30).path
    assert service.process.wait(30) == 0
    again = service_factory(tiny_model_folder)
    loaded = again.connect().create_training_client_from_state(path).result()
    assert loaded.get_info().lora_rank == 4


class ServeCommand:
    """`tinker-cookbook serve` as a user starts it, and what it prints."""

    def __init__(self, model: Path, state_dir: Path, *options: str, key: str | None = None):
        program = "import sys; from tinker_cookbook.cli import main; sys.exit(main())"
        arguments = ["serve", "--model", str(model), "--port", "0", "--state-dir", str(state_dir)]
        environment = {k: v for k, v in os.environ.items() if k != "TINKER_API_KEY"}
        if key is not None:
            environment["TINKER_API_KEY"] = key
        self.state_dir = state_dir
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.shown = ""
        for line in self.process.stdout:
            self.shown += line
            if line.startswith("Stop with"):
                break
        self.base_url = self.exported("TINKER_BASE_URL")
        self.api_key = key or (state_dir / "key").read_text().strip()

    def exported(self, name: str) -> str:
        """What a shell has in a variable after the printed `export` lines."""
        lines = [line for line in self.shown.splitlines() if line.strip().startswith("export ")]
        script = "\n".join([*lines, f'printf %s "${name}"'])
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout

    def connect(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.base_url, api_key=self.api_key)

    def get(self, path: str) -> dict:
        request = urllib.request.Request(
            f"{self.base_url}/api/v1/{path}", headers={"X-API-Key": self.api_key}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    def read_error_line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def test_a_second_ctrl_c_stops_at_once(tiny_model_folder, tmp_path) -> None:
    """The first says what it waits for; after the second all that was saved is there."""
    with ServeCommand(tiny_model_folder, tmp_path / "state") as service:
        client = service.connect()
        model = str(tiny_model_folder)
        run = client.create_lora_training_client(base_model=model, rank=4).result()
        train_step(run, batch())
        expected = np.concatenate(forward(run, batch()))
        path = run.save_state("kept").result().path
        data = [datum(tokens(500, seed=n)) for n in range(60)]
        work = [run.forward_backward(data, "cross_entropy") for _ in range(4)]
        while service.get("local/status")["queue"]["unfinished"] < len(work):
            time.sleep(0.02)
        service.process.send_signal(signal.SIGINT)
        said = service.read_error_line()
        assert re.search(r"Waiting up to 60 s for \d+ forward_backward;", said)
        assert "Ctrl-C again stops at once" in said
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert service.process.poll() is None, "SIGTERM, which managers repeat, changes nothing"
        began = time.monotonic()
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(10) == 130
        assert time.monotonic() - began < 8, "not the 60 s that a first signal waits"
        assert not list((service.state_dir / "running").iterdir())
        assert not list((service.state_dir / "staging").rglob("*.safetensors"))
    with ServeCommand(tiny_model_folder, tmp_path / "state") as again:
        loaded = again.connect().create_training_client_from_state_with_optimizer(path).result()
        np.testing.assert_array_equal(np.concatenate(forward(loaded, batch())), expected)
        again.process.send_signal(signal.SIGINT)
        assert again.read_error_line().startswith("Stopping; nothing is running")
        assert again.process.wait(30) == 0


def test_two_services_share_a_state_folder(service_factory, tiny_model_folder) -> None:
    one, two = service_factory(tiny_model_folder), service_factory(tiny_model_folder)
    run = one.connect().create_lora_training_client(base_model=one.model, rank=4).result()
    path = run.save_state("shared").result().path
    loaded = two.connect().create_training_client_from_state(path).result()
    assert loaded.get_info().lora_rank == 4
    assert one.stop() == 0
    again = loaded.save_state("other").result().path
    assert again.startswith(f"tinker://{loaded.model_id}/")


@pytest.mark.parametrize("key", [None, "tml-from-the-environment-0123456789"])
def test_the_serve_command_says_how_to_use_it(tmp_path, tiny_model_folder, key) -> None:
    """Where the key is, not what it is; neither do logs, notes or errors hold it."""
    with ServeCommand(tiny_model_folder, tmp_path / "my state", key=key) as service:
        assert service.exported("NO_PROXY") == "127.0.0.1,localhost"
        assert service.api_key not in service.shown
        if key is None:
            assert service.exported("TINKER_API_KEY") == service.api_key
        else:
            assert "Key: the value of TINKER_API_KEY" in service.shown
        (model,) = service.get("get_server_capabilities")["supported_models"]
        assert model["model_name"] == str(tiny_model_folder)
        work_and_fail(service)
        shown = status_of(service.state_dir)
        assert service.base_url in shown
        service.process.send_signal(signal.SIGINT)
        rest = "".join(service.process.communicate(timeout=30))
        assert service.process.returncode == 0
    written = [path for path in service.state_dir.rglob("*") if path.is_file()]
    assert any("401" in path.read_text() for path in written if path.suffix == ".log")
    kept = [path.name for path in written if service.api_key.encode() in path.read_bytes()]
    assert kept == (["key"] if key is None else [])
    assert service.api_key not in shown + rest


def work_and_fail(service: ServeCommand) -> None:
    """What makes a service write: a run, a checkpoint, refusals of each kind."""
    client = service.connect()
    model = service.get("get_server_capabilities")["supported_models"][0]["model_name"]
    run = client.create_lora_training_client(base_model=model, rank=4).result()
    train_step(run, batch())
    run.save_state("kept").result()
    for path, header in (
        ("sessions", {"X-API-Key": f"{service.api_key}x"}),
        (f"sessions/{service.api_key}", {"X-API-Key": service.api_key}),
        (f"{service.api_key}", {"Authorization": f"Bearer {service.api_key}"}),
    ):
        request = urllib.request.Request(f"{service.base_url}/api/v1/{path}", headers=header)
        with pytest.raises(urllib.error.HTTPError, match=r"40[14]"):
            urllib.request.urlopen(request)
    close_session(client, "success")


def status_of(state_dir: Path) -> str:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status.run(parser.parse_args(["--state-dir", str(state_dir)]))
    return shown.getvalue()


def test_what_others_can_reach_is_shown_with_an_address(tmp_path, tiny_model_folder) -> None:
    key = "tml-from-the-environment-0123456789"
    with ServeCommand(
        tiny_model_folder, tmp_path / "state", "--host", "0.0.0.0", key=key
    ) as service:
        assert service.base_url.startswith("http://127.0.0.1:")
        assert "From other machines: http://ADDRESS:" in service.shown
        assert service.get("get_server_capabilities")


def test_a_wrong_port_is_said_before_a_model_is_looked_for(capsys, local_service) -> None:
    port = local_service.base_url.rpartition(":")[2]
    for wrong, problem in (("70000", "is not a port"), (port, "Address already in use")):
        assert cli.main(["serve", "--model", "no/such-model", "--port", wrong]) == 2
        assert f"port={wrong} " in (said := capsys.readouterr().err)
        assert problem in said


def test_the_serve_command_refuses_an_unknown_model(tmp_path) -> None:
    program = "import sys; from tinker_cookbook.cli import main; sys.exit(main())"
    arguments = ["serve", "--model", str(tmp_path / "missing")]
    arguments += ["--state-dir", str(tmp_path / "state")]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "missing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "state").exists()


def test_the_status_of_a_folder_with_any_name(tmp_path, capsys) -> None:
    folder = tmp_path / "état #1 50%41?"
    Store(folder).close()
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    assert status.run(parser.parse_args(["--state-dir", str(folder)])) == 3
    assert "Saved runs: 0, checkpoints: 0" in capsys.readouterr().out


def test_answers_do_not_wait_until_the_client_confirms_their_heads() -> None:
    """Head and body are two writes; TCP holds back the second one unless told otherwise."""
    listener = bind("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
