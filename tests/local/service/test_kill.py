"""SIGKILL at random moments loses nothing that was acknowledged and leaves nothing half-written."""

import os
import random
import threading
import time

import httpx
import pytest

from tests.conftest import ServiceProcess
from tinker_cookbook.local.service.storage.store import Store

NUM_KILLS = int(os.environ.get("TINKER_COOKBOOK_TEST_KILLS", "4"))


class Saver:
    """A client that saves as fast as it can and remembers what was acknowledged."""

    def __init__(self, service: ServiceProcess, life: int) -> None:
        self.http = httpx.Client(
            base_url=f"{service.base_url}/api/v1",
            headers={"X-API-Key": service.api_key},
            timeout=60,
        )
        self.life = life
        self.seq_id = 0
        self.acknowledged: dict[str, str] = {}
        self.steps = 0
        self.samples = 0
        session = self.post("/create_session", {"tags": [], "sdk_version": "x"})["session_id"]
        lora = {"rank": 8}
        create = {"session_id": session, "model_seq_id": 0, "base_model": service.model}
        self.run_id = self.resolve("/create_model", create | {"lora_config": lora})["model_id"]
        self.session_id = session
        sampling = {"session_id": session, "sampling_session_seq_id": 0}
        opened = self.post("/create_sampling_session", sampling | {"base_model": service.model})
        self.sampler_id = opened["sampling_session_id"]

    def post(self, path: str, body: dict) -> dict:
        response = self.http.post(path, json=body)
        response.raise_for_status()
        return response.json()

    def resolve(self, path: str, body: dict) -> dict:
        request_id = self.post(path, body)["request_id"]
        result = self.post("/retrieve_future", {"request_id": request_id})
        assert "error" not in result, result
        return result

    def train(self) -> None:
        self.seq_id += 1
        adam = {"learning_rate": 1e-4}
        self.post(
            "/optim_step", {"model_id": self.run_id, "seq_id": self.seq_id, "adam_params": adam}
        )
        self.steps += 1

    def sample(self) -> None:
        """Begin a sample that nobody waits for."""
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
        request = {"sampling_session_id": self.sampler_id, "seq_id": self.samples}
        params = {"max_tokens": 100, "stop": []}
        self.post(
            "/asample",
            request | {"num_samples": 4, "prompt": prompt, "sampling_params": params},
        )
        self.samples += 1

    def save(self) -> None:
        self.seq_id += 1
        body = {"model_id": self.run_id, "seq_id": self.seq_id, "overwrite": True}
        name = f"life{self.life}-{self.seq_id % 7}"
        kind = "save_weights" if self.seq_id % 3 else "save_weights_for_sampler"
        metadata = {"number": str(self.seq_id)}
        result = self.resolve(f"/{kind}", body | {"path": name, "user_metadata": metadata})
        self.acknowledged[result["path"]] = str(self.seq_id)

    def work(self) -> None:
        try:
            while True:
                self.train()
                self.sample()
                self.save()
        except httpx.HTTPError:
            return  # killed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments(service_factory, tiny_model_folder) -> None:
    rng = random.Random(0)
    acknowledged: dict[str, str] = {}
    sessions: dict[str, str] = {}
    for life in range(NUM_KILLS):
        service = service_factory(tiny_model_folder)
        saver = Saver(service, life)
        thread = threading.Thread(target=saver.work)
        thread.start()
        time.sleep(rng.uniform(0.05, 1.5))
        service.process.kill()
        service.process.wait()
        thread.join()
        acknowledged |= saver.acknowledged
        sessions[saver.session_id] = saver.run_id
        check(service, acknowledged, sessions)
        print(
            f"kill {life + 1}: {saver.steps} steps, {saver.samples} samples, "
            f"{len(saver.acknowledged)} names saved; {len(acknowledged)} in all"
        )
    assert len(acknowledged) >= NUM_KILLS
    load_all(service_factory(tiny_model_folder), acknowledged)


def load_all(service: ServiceProcess, acknowledged: dict[str, str]) -> None:
    """A start after the last kill serves every checkpoint."""
    loader = Saver(service, NUM_KILLS)
    for number, path in enumerate(sorted(acknowledged)):
        if "/weights/" in path:
            create = {"session_id": loader.session_id, "model_seq_id": number + 1}
            loader.resolve("/load_weights", create | {"path": path, "optimizer": True})
        else:
            opened = {"session_id": loader.session_id, "sampling_session_seq_id": number + 1}
            loader.post("/create_sampling_session", opened | {"model_path": path})


def check(service: ServiceProcess, acknowledged: dict[str, str], sessions: dict[str, str]) -> None:
    store = Store(service.state_dir)
    for session_id, run_id in sessions.items():
        assert store.index.session(session_id) is not None
        run = store.index.run(run_id)
        assert run is not None
        assert run.session_id == session_id
    rows, total = store.index.checkpoints()
    found = {row.tinker_path: row for row in rows}
    assert total == len(found)
    for path, number in acknowledged.items():
        metadata = found[path].user_metadata
        assert metadata is not None
        # the save after the last acknowledged one may have been complete, too
        assert int(metadata["number"]) >= int(number), path
    for row in rows:
        store.verify(row)
    folders = {path.name for path in (service.state_dir / "checkpoints").iterdir()}
    assert folders == {row.folder for row in rows}
    assert [path.name for path in (service.state_dir / "staging").iterdir()] == [store.instance]
    store.close()
