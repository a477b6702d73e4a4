"""Fixtures: a real local service with a tiny random model, shared by all tests, and SDK clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tinker_cookbook.utils.sdk_sessions import close_session

if TYPE_CHECKING:
    import tinker

START_SECONDS = 60
OLD_SDK = "TINKER_COOKBOOK_TEST_OLD_SDK"
"""Names the folder of an older SDK that comes first on the path; see `tests.e2e.protocol_table`."""
TEST_KEY = "tml-only-for-tests-0123456789abcdef"

for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = "127.0.0.1,localhost"
os.environ.setdefault("TINKER_TELEMETRY", "0")
# By default the processor decides; `TINKER_COOKBOOK_DTYPE=bfloat16 pytest` runs all in the other.
os.environ.setdefault("TINKER_COOKBOOK_DTYPE", "float32")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads would only wait for each other
# A generated example takes as long as the machine is busy: time does not make it wrong.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@dataclass
class ServiceProcess:
    """A running service."""

    process: subprocess.Popen[bytes]
    base_url: str
    model: str
    state_dir: Path
    api_key: str = TEST_KEY
    clients: list[tinker.ServiceClient] = field(default_factory=list)

    def connect(self, **options: Any) -> tinker.ServiceClient:
        import tinker

        client = tinker.ServiceClient(base_url=self.base_url, api_key=self.api_key, **options)
        self.clients.append(client)
        return client

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, then wait."""
        self.process.terminate()
        return self.process.wait(seconds)

    def release_clients(self) -> None:
        """End what the clients do in the background, which would go on without the service."""
        for client in self.clients:
            session = getattr(client, "_session_holder", None)
            if session is not None:
                session.close()
        self.clients.clear()

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.state_dir / "logs").glob("*.log"))


def _service_environment() -> dict[str, str]:
    """This process's, without the folder of an older SDK: only the clients use that one."""
    environment = dict(os.environ)
    if OLD_SDK in environment:
        folders = environment.pop("PYTHONPATH", "").split(os.pathsep)
        kept = [folder for folder in folders if folder and folder != environment[OLD_SDK]]
        if kept:
            environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment


def start_service(
    model: Path | str,
    state_dir: Path,
    *arguments: str,
    api_key: str = TEST_KEY,
    environment: dict[str, str] | None = None,
    wrapper: Sequence[str] = (),
) -> ServiceProcess:
    """Start a service process, behind a command such as `setpriv`, and wait until it answers."""
    ready = state_dir.parent / f"{state_dir.name}-ready-{time.monotonic_ns()}.json"
    command = [*wrapper, sys.executable, "-m", "tinker_cookbook.local", "--model", str(model)]
    command += ["--state-dir", str(state_dir), "--ready-file", str(ready)]
    command += ["--parent-pid", str(os.getpid()), *arguments]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    settings = threads | {"TINKER_API_KEY": api_key} | (environment or {})
    process = subprocess.Popen(command, env=_service_environment() | settings)
    deadline = time.monotonic() + START_SECONDS
    while not ready.exists():
        assert process.poll() is None, f"the service exited with {process.returncode}"
        assert time.monotonic() < deadline, "the service did not become ready"
        time.sleep(0.01)
    base_url = json.loads(ready.read_text())["base_url"]
    return ServiceProcess(process, base_url, str(model), state_dir, api_key)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """`@pytest.mark.anyio` tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model_folder() -> Path:
    """A random two-layer model with a real tokenizer."""
    from tests.tiny_models import tiny_model

    return tiny_model(tied=False)  # tied random embeddings make it repeat one token


@pytest.fixture(scope="session")
def local_service(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """The service that most tests share."""
    service = start_service(tiny_model_folder, tmp_path_factory.mktemp("service") / "state")
    yield service
    service.release_clients()
    service.stop()


@pytest.fixture
def service_factory(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Start services of one's own; they are stopped at the end of the test."""
    started: list[ServiceProcess] = []

    def start(
        model: Path | str, *arguments: str, state: str = "state", **options: Any
    ) -> ServiceProcess:
        started.append(start_service(model, tmp_path / state, *arguments, **options))
        return started[-1]

    yield start
    for service in started:
        service.release_clients()
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()


@pytest.fixture(scope="session")
def shared_client(local_service: ServiceProcess) -> tinker.ServiceClient:
    """One SDK client for tests that do not look at sessions."""
    return local_service.connect()


@pytest.fixture
def service_client(local_service: ServiceProcess) -> Iterator[tinker.ServiceClient]:
    """An SDK client, and so a session, of the test's own."""
    client = local_service.connect()
    yield client
    close_session(client, "success")
