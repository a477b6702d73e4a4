"""Which service is chosen and why; the embedded one as a real process, from start to crash."""

# pyright: reportOptionalMemberAccess=false, reportPossiblyUnboundVariable=false

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest
import tinker

from tests.conftest import TEST_KEY, ServiceProcess
from tests.e2e.sdk import text, tokens
from tests.e2e.test_service import search, session_id
from tinker_cookbook import cli, service, tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError, TrainingError, WeightsDownloadError
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.service import embedded
from tinker_cookbook.tokenizer_utils import get_tokenizer


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, tmp_path: Path):
    """No key, no address, and a home of the test's own."""
    for name in ("TINKER_BASE_URL", "TINKER_API_KEY", "TINKER_CREDENTIAL_CMD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "home" / "cookbook"))


def store_key(home: Path, content: object) -> None:
    path = home / ".tinker" / "credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


STORED = {
    "version": 1,
    "default": "a",
    "keys": {"a": {"type": "manual", "key": "tml-stored", "name": "n"}},
}


def test_without_anything_it_is_local():
    choice = service.choose_service()
    assert (choice.kind, choice.base_url) == ("local", None)
    assert "no base_url and no API key" in choice.describe("m")
    assert service.default_model() == DEFAULT_MODEL


def test_a_key_means_the_hosted_service(monkeypatch, tmp_path: Path):
    store_key(tmp_path / "home", STORED)
    choice = service.choose_service()
    assert choice.kind == "hosted"
    assert "credentials.json" in choice.reason
    assert service.find_api_key() == "tml-stored"
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", "echo tml-x")
    assert service.choose_service().reason == "TINKER_CREDENTIAL_CMD is set"
    assert service.find_api_key() is None
    monkeypatch.setenv("TINKER_API_KEY", "tml-env")
    assert service.choose_service().reason == "TINKER_API_KEY is set"
    assert service.find_api_key() == "tml-env"


def test_an_address_wins_over_a_key_and_an_argument_over_the_environment(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-env")
    monkeypatch.setenv("TINKER_BASE_URL", "http://one:1/")
    choice = service.choose_service()
    assert (choice.kind, choice.base_url) == ("remote", "http://one:1")
    assert choice.reason == "TINKER_BASE_URL is set"
    assert service.choose_service("http://two:2").base_url == "http://two:2"
    assert service.choose_service("local").kind == "local"


def test_the_sdk_finds_the_same_stored_key(tmp_path: Path):
    credentials = pytest.importorskip("tinker.lib.credentials")
    store_key(tmp_path / "home", STORED)
    stored = credentials.JsonCredentialStore(credentials.default_credentials_path())
    record = stored.get_default_key()
    assert record is not None
    assert record.key == service.find_api_key()


@pytest.mark.parametrize("content", ["{nonsense", "[]", '{"default": "a", "keys": []}'])
def test_damaged_stored_keys_are_named(tmp_path: Path, content: str):
    store_key(tmp_path / "home", content)
    with pytest.raises(ConfigurationError, match=r"credentials\.json cannot be read"):
        service.choose_service()


def test_stored_keys_without_a_default_are_none(tmp_path: Path):
    store_key(tmp_path / "home", {"version": 1, "default": None, "keys": {}})
    assert service.choose_service().kind == "local"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "Local"])
def test_an_address_that_is_none_is_refused(url: str):
    with pytest.raises(ConfigurationError, match="base_url="):
        service.connect(url)


def test_a_key_of_the_wrong_form_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "sk-secret")
    with pytest.raises(ConfigurationError, match="tml-") as caught:
        service.connect("http://127.0.0.1:1")
    assert "secret" not in str(caught.value)


def test_no_key_for_an_address_is_refused():
    with pytest.raises(ConfigurationError, match="needs a key"):
        service.connect("http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_dead_address_is_reported_at_once(monkeypatch, url: str):
    monkeypatch.setenv("TINKER_API_KEY", TEST_KEY)
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match="does not answer"):
        service.connect(url)
    assert time.monotonic() - started < 15


def test_a_remote_service_answers_for_its_models(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    with service.connect(local_service.base_url, local_service.model) as connection:
        assert connection.kind == "remote"
        assert connection.model_name == local_service.model
        assert connection.supported_models() == [local_service.model]
        [model] = connection.capabilities().supported_models
        assert model.model_name == local_service.model
    assert service.connect(local_service.base_url).model_name == local_service.model
    assert service.default_model(local_service.base_url) == local_service.model
    with pytest.raises(ConfigurationError, match="Did you mean"):
        service.connect(local_service.base_url, local_service.model[:-1])


def test_the_services_tokenizer_where_no_hub_is(
    monkeypatch, tmp_path: Path, service_factory, tiny_model_folder: Path
):
    """The service found the model in a cache of its own; the client has neither that nor a hub."""
    name = "meta-llama/Tiny-for-tests"
    cache = tmp_path / "cache"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(tiny_model_folder)
    served = service_factory(name, environment={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    with pytest.raises(WeightsDownloadError, match="is not on this machine"):
        get_tokenizer(name)
    monkeypatch.setenv("TINKER_API_KEY", served.api_key)
    with service.connect(served.base_url, name):
        tokenizer = get_tokenizer(name)
        with pytest.raises(WeightsDownloadError, match="is not on this machine"):
            get_tokenizer("meta-llama/Another-for-tests")
    assert tokenizer.get_vocab() == get_tokenizer(str(tiny_model_folder)).get_vocab()
    assert tokenizer.name_or_path == name
    monkeypatch.setattr(tokenizer_utils, "_loaded", {})
    monkeypatch.setenv("TINKER_BASE_URL", served.base_url)  # a program with clients of its own
    assert get_tokenizer(name).get_vocab() == tokenizer.get_vocab()


def test_of_several_models_one_must_be_named():
    class Several(service.Connection):
        def supported_models(self) -> list[str]:
            return ["a/big", "a/small"]

    choice = service.ServiceChoice("remote", "http://there", "TINKER_BASE_URL is set")
    with pytest.raises(ConfigurationError, match=r"not set .*; its models are a/big, a/small"):
        Several(choice, None, model_name="").check_model(None)


def test_a_refused_key_is_reported(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_API_KEY", "tml-some-other-key")
    with pytest.raises(ConfigurationError, match="refuses the key"):
        service.connect(local_service.base_url, local_service.model)


def test_something_else_at_the_address_is_reported(monkeypatch, tmp_path: Path):
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        monkeypatch.setenv("TINKER_API_KEY", TEST_KEY)
        with pytest.raises(ConfigurationError, match="like a Tinker service"):
            service.connect(f"http://127.0.0.1:{port}", "m")
    finally:
        server.kill()
        server.communicate()


def test_a_local_service_starts_answers_and_stops(tiny_model_folder: Path):
    with service.connect(model_name=str(tiny_model_folder)) as connection:
        assert connection.kind == "local"
        assert "127.0.0.1" in os.environ["NO_PROXY"]
        assert connection.supported_models() == [str(tiny_model_folder)]
        embedded = connection._embedded
        assert embedded is not None
        log = embedded.log_path
        assert log.exists()
    assert embedded._process.returncode is not None
    assert not log.parent.exists()
    connection.close()


def test_the_dashboard_opens_without_the_key_where_the_service_was_started_here(
    tiny_model_folder: Path,
):
    with service.connect("local", str(tiny_model_folder)) as connection:
        told = connection.describe_dashboard()
        assert told is not None
        link, _, how = told.partition(" ")
        assert how == "(signs in once, while this command runs)"
        address, _, ticket = link.partition("#ticket=")
        assert address == f"{connection.base_url}/"
        body = json.dumps({"ticket": ticket}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}dashboard/token", body, headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert json.loads(answer.read())["token"]


def test_the_dashboard_of_another_service_asks_for_the_key(monkeypatch, local_service):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    with service.connect(local_service.base_url) as connection:
        told = connection.describe_dashboard()
    assert told == f"{local_service.base_url}/ (asks for the service's key)"


def test_a_missing_compiler_is_told_with_what_it_costs(
    monkeypatch, tiny_model_folder: Path, capsys
):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with service.connect("local", str(tiny_model_folder)) as connection:
        assert connection.base_url
        assert connection.base_url
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    if sys.platform != "linux" or Path("/dev/nvidia0").exists():
        assert lines == []
        return
    [line] = lines
    assert line.startswith("note: no C compiler (cc or gcc) is found: ")
    assert "twice as long" in line


def test_an_interrupted_program_does_not_wait_for_what_is_in_flight(tiny_model_folder: Path):
    """Ctrl-C, which cancels an event loop's main task: the service stops at once."""
    connection = service.connect("local", str(tiny_model_folder))
    connection.__enter__()
    client = connection.service_client()
    run = client.create_lora_training_client(connection.model_name, rank=4).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=200, stop=[])
    work = [sampler.sample(text(tokens(9)), 500, params) for _ in range(20)]
    time.sleep(0.5)
    assert not any(sample.future().done() for sample in work)
    began = time.monotonic()
    connection.__exit__(asyncio.CancelledError, asyncio.CancelledError(), None)
    assert time.monotonic() - began < 6, "it would finish what it can in 8 seconds"


def test_an_unknown_model_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ConfigurationError, OSError, RuntimeError), match="no-such/model"):
        service.connect(model_name="no-such/model")


def test_a_missing_extra_names_the_command(monkeypatch):
    monkeypatch.setattr(embedded, "NEEDED_MODULES", ("torch", "a_module_not_installed"))
    with pytest.raises(ConfigurationError) as caught:
        service.connect("local")
    assert 'pip install "tinker-cookbook[local]"' in str(caught.value)
    assert "a_module_not_installed" in str(caught.value)


@pytest.mark.parametrize("option", ["--model", "--plan"])
def test_serve_names_a_missing_extra_before_all_else(monkeypatch, capsys, option: str):
    monkeypatch.setattr(embedded, "NEEDED_MODULES", ("a_module_not_installed",))
    assert cli.main(["serve", option, "no/such-model"]) == 2
    error = capsys.readouterr().err
    assert "the local service needs a_module_not_installed" in error
    assert 'pip install "tinker-cookbook[local]"' in error


PROGRAM = """
import sys
from tinker_cookbook import service
with service.connect(model_name=sys.argv[1]) as connection:
    connection.base_url
    print(connection._embedded.pid, flush=True)
    sys.stdin.readline()
"""


def start_program(source: str, model: Path, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_service_ends_with_its_parent_however_that_ends(tiny_model_folder: Path, kill):
    program = start_program(PROGRAM, tiny_model_folder)
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    assert is_alive(pid)
    if kill is None:
        program.communicate("\n", timeout=30)
    else:
        program.send_signal(kill)
        program.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_folders_of_killed_processes_are_removed(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    prefix = embedded.FOLDER_PREFIX
    names = [f"{prefix}{gone.pid}-a", f"{prefix}{os.getpid()}-b", f"{prefix}old", "other-1-c"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "service.log").write_text("")
    embedded._remove_orphans()
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


@pytest.mark.parametrize("waiting", ["blocked in a lock", "in asyncio"])
def test_a_crash_of_the_service_is_an_error_with_its_log(tiny_model_folder: Path, waiting: str):
    wait = {
        "blocked in a lock": "threading.Event().wait()",
        "in asyncio": "asyncio.run(asyncio.sleep(1000))",
    }[waiting]
    program = start_program(
        f"""
        import asyncio, os, signal, sys, threading
        from tinker_cookbook import service
        with service.connect(model_name=sys.argv[1]) as connection:
            connection.base_url
            os.kill(connection._embedded.pid, signal.SIGSEGV)
            {wait}
        """,
        tiny_model_folder,
    )
    _, err = program.communicate(timeout=60)
    assert program.returncode == 1
    assert "TrainingError: the local service stopped (killed by SIGSEGV)." in err
    assert "log" in err


def test_a_service_that_cannot_start_shows_why(monkeypatch, tmp_path: Path, tiny_model_folder):
    (tmp_path / "home" / "cookbook").mkdir(parents=True)
    (tmp_path / "home" / "cookbook" / "service").write_text("a file where the folder should be")
    connection = service.connect(model_name=str(tiny_model_folder))
    with pytest.raises(TrainingError, match=r"(?s)stopped \(exit status [12]\).*log"):
        _ = connection.base_url
    connection.close()


@pytest.mark.parametrize("end", ["success", "errored"])
def test_sessions_end_with_the_connection(local_service, monkeypatch, end: str):
    """No request of the SDK is in flight any more when the interpreter ends."""
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    opened = service.connect(local_service.base_url)
    with contextlib.suppress(ZeroDivisionError), opened as connection:
        client = connection.service_client()
        session = session_id(client)
        if end == "errored":
            raise ZeroDivisionError
    rest = tinker.RestClient(base_url=local_service.base_url, api_key=local_service.api_key)
    (found,) = search(rest, session_id=session).sessions
    assert found.status.type == "client_finished"
    assert found.status.reason.type == end
