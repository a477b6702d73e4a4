"""The two forms of `save_weights_for_sampler` each read only their own fields."""

from typing import Any

import httpx
import pytest

from tests.conftest import ServiceProcess


class Client:
    """A run on the service, and requests that the SDK would not send."""

    def __init__(self, service: ServiceProcess) -> None:
        headers = {"X-API-Key": service.api_key}
        self._http = httpx.Client(base_url=f"{service.base_url}/api/v1", headers=headers)
        self._seq_id = 0
        session = self.post("/create_session", {"tags": [], "sdk_version": "x"})
        body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": service.model}
        created = self.result("/create_model", body | {"lora_config": {"rank": 2}})
        self.model_id = created["model_id"]

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._http.post(path, json=body, timeout=60).raise_for_status().json()

    def result(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.post("/retrieve_future", {"request_id": self.post(path, body)["request_id"]})

    def save(self, **fields: Any) -> dict[str, Any]:
        self._seq_id += 1
        body = {"model_id": self.model_id, "seq_id": self._seq_id} | fields
        return self.result("/save_weights_for_sampler", body)


@pytest.fixture(scope="module")
def client(local_service: ServiceProcess) -> Client:
    return Client(local_service)


def test_a_sampler_of_unsaved_weights_ignores_the_settings_of_a_checkpoint(client: Client):
    answer = client.save(sampling_session_seq_id=3, path="a/b", ttl_seconds=-1)
    assert answer["sampling_session_id"].endswith(":sample:3")


def test_a_checkpoint_ignores_the_kind_of_a_sampler(client: Client):
    assert client.save(path="saved", kind="other")["path"].endswith("/sampler_weights/saved")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"path": "a/b"}, "a/b"),
        ({"ttl_seconds": -1}, "ttl_seconds=-1"),
        ({"sampling_session_seq_id": -1}, "sampling_session_seq_id=-1"),
        ({"sampling_session_seq_id": 4, "kind": "other"}, "kind='other'"),
    ],
)
def test_what_a_form_reads_is_checked(client: Client, fields: dict[str, Any], named: str):
    answer = client.save(**fields)
    assert answer["category"] == "user"
    assert named in answer["error"]
