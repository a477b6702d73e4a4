"""Runs and samplers of the shared service."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import tinker

from tests.conftest import OLD_SDK, ServiceProcess

if OLD_SDK in os.environ:
    # It returns clients where newer ones return futures of clients; the tests wait for futures.
    for made in (tinker.TrainingClient, tinker.SamplingClient):
        made.result = lambda self: self  # type: ignore[attr-defined]

NewRun = Callable[..., tinker.TrainingClient]


@pytest.fixture(scope="module")
def module_client(local_service: ServiceProcess) -> Iterator[tinker.ServiceClient]:
    """A session of the module's own: its runs leave the engine when the module is done."""
    client = local_service.connect()
    yield client
    client.close("success").result()


@pytest.fixture(scope="module")
def new_run(module_client: tinker.ServiceClient, local_service: ServiceProcess) -> NewRun:
    """Make a training client; rank 4 and seed 0 unless told otherwise."""

    def make(client: tinker.ServiceClient = module_client, **options: Any) -> tinker.TrainingClient:
        options = {"rank": 4, "seed": 0, "base_model": local_service.model} | options
        return client.create_lora_training_client(**options).result()

    return make


@pytest.fixture(scope="module")
def base_sampler(
    module_client: tinker.ServiceClient, local_service: ServiceProcess
) -> tinker.SamplingClient:
    """Samples from the base model."""
    return module_client.create_sampling_client(base_model=local_service.model).result()


@pytest.fixture(scope="module")
def rest(local_service: ServiceProcess) -> tinker.RestClient:
    return rest_client(local_service)


def rest_client(service: ServiceProcess) -> tinker.RestClient:
    """A client for runs and checkpoints; older SDKs make it from a session."""
    if not hasattr(tinker, "RestClient"):
        return service.connect().create_rest_client()
    return tinker.RestClient(base_url=service.base_url, api_key=service.api_key)


ABSENT = re.compile(
    r"(module 'tinker[\w.]*'|'(Service|Training|Sampling|Rest)Client' object) has no attribute"
    r"|(Client\.\w+|Client\.__init__)\(\) got an unexpected keyword argument"
    r"|ServiceClient ignored unknown keyword"
    r"|object (TrainingClient|SamplingClient|Future) can't be used in 'await' expression"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With an older SDK, a test of something that it does not have is skipped."""
    report = yield
    if OLD_SDK in os.environ and call.excinfo is not None and report.failed:
        missing = ABSENT.search(str(call.excinfo.value))
        if missing is not None:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"not in this SDK: {call.excinfo.value}")
    return report
