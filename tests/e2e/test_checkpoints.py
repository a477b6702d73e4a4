"""Saving, loading, listing and exporting weights (CKP)."""

from __future__ import annotations

import io
import json
import tarfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import tinker
from safetensors.numpy import load_file
from tinker.types import ParsedCheckpointTinkerPath

from tests.conftest import ServiceProcess
from tests.e2e.sdk import (
    ADAM,
    batch,
    datum,
    fails_as_user_error,
    forward,
    is_alive,
    prompt_logprobs,
    tokens,
    train_step,
)
from tests.number_format import by_format


@pytest.fixture(scope="module")
def trained(new_run) -> tinker.TrainingClient:
    """A run with momentum."""
    run = new_run(rank=8)
    for _ in range(2):
        train_step(run, batch())
    return run


def flat(run: tinker.TrainingClient) -> np.ndarray:
    return np.concatenate(forward(run, batch(3, seed=5)))


def checkpoint_ids(rest: tinker.RestClient, run: tinker.TrainingClient) -> list[str]:
    return [item.checkpoint_id for item in rest.list_checkpoints(run.model_id).result().checkpoints]


def test_ckp_01_paths(trained) -> None:
    paths = {
        "training": trained.save_state("ckp-01").result().path,
        "sampler": trained.save_weights_for_sampler("ckp-01").result().path,
        "external": trained.save_weights_external("ckp-01").result().path,
    }
    for kind, path in paths.items():
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        assert parsed.training_run_id == trained.model_id
        assert parsed.checkpoint_type == kind
        assert parsed.checkpoint_id.endswith("/ckp-01")


def test_ckp_02_load_weights_only(trained, module_client) -> None:
    path = trained.save_state("ckp-02").result().path
    loaded = module_client.create_training_client_from_state(path).result()
    assert loaded.model_id != trained.model_id
    assert loaded.get_info().lora_rank == 8
    np.testing.assert_array_equal(flat(loaded), flat(trained))


def test_ckp_03_and_04_resume(new_run, module_client) -> None:
    data = [batch(3, seed=number) for number in range(4)]
    unbroken = new_run()
    for item in data[:2]:
        train_step(unbroken, item)
    path = unbroken.save_state("ckp-03").result().path
    for item in data[2:]:
        train_step(unbroken, item)
    create = module_client.create_training_client_from_state_with_optimizer
    resumed = create(path).result()
    bare = module_client.create_training_client_from_state(path).result()
    before = flat(bare)
    bare.optim_step(ADAM).result()
    np.testing.assert_array_equal(flat(bare), before)
    for run in (resumed, bare):
        for item in data[2:]:
            train_step(run, item)
    np.testing.assert_array_equal(flat(resumed), flat(unbroken))
    assert np.abs(flat(bare) - flat(unbroken)).max() > 1e-4


@pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")
def test_ckp_05_load_state_into_a_fresh_run(trained, new_run) -> None:
    path = trained.save_state("ckp-05").result().path
    weights_only, resumed = new_run(rank=8, seed=9), new_run(rank=8, seed=9)
    weights_only.load_state(path).result()
    resumed.load_state_with_optimizer(path).result()
    for run in (weights_only, resumed):
        np.testing.assert_array_equal(flat(run), flat(trained))
    before = flat(resumed)
    resumed.optim_step(ADAM).result()
    assert np.abs(flat(resumed) - before).max() > 1e-4, "the momentum came along"


def test_ckp_06_a_checkpoint_is_a_snapshot(new_run, module_client) -> None:
    run = new_run()
    train_step(run, batch())
    then = flat(run)
    saving = run.save_state("ckp-06")
    train_step(run, batch())
    loaded = module_client.create_training_client_from_state(saving.result().path).result()
    np.testing.assert_array_equal(flat(loaded), then)


def test_ckp_07_list_of_a_run(new_run, rest) -> None:
    run = new_run()
    began = datetime.now(UTC) - timedelta(seconds=1)
    run.save_state("a", user_metadata={"step": "1"}).result()
    run.save_weights_for_sampler("b", ttl_seconds=7200).result()
    found = {
        item.checkpoint_id: item
        for item in rest.list_checkpoints(run.model_id).result().checkpoints
    }
    assert set(found) == {"weights/a", "sampler_weights/b"}
    training, sampler = found["weights/a"], found["sampler_weights/b"]
    assert training.checkpoint_type == "training"
    assert training.tinker_path == f"tinker://{run.model_id}/weights/a"
    assert began <= training.time <= datetime.now(UTC)
    assert training.size_bytes is not None
    assert training.size_bytes > 2 * (sampler.size_bytes or 0) > 0, "it has two moments too"
    assert training.user_metadata == {"step": "1"}
    assert training.expires_at is None
    assert not training.public
    assert sampler.expires_at is not None
    assert abs((sampler.expires_at - sampler.time).total_seconds() - 7200) < 5


def test_ckp_08_user_listing_pages(new_run, rest) -> None:
    run = new_run()
    for number in range(3):
        run.save_state(f"page-{number}").result()
    first = rest.list_user_checkpoints(limit=2).result()
    assert [item.checkpoint_id for item in first.checkpoints] == [
        "weights/page-2",
        "weights/page-1",
    ]
    assert first.cursor is not None
    assert first.cursor.total_count >= 3
    second = rest.list_user_checkpoints(limit=2, offset=2).result()
    assert second.checkpoints[0].checkpoint_id == "weights/page-0"


def test_ckp_09_run_lookup(new_run, rest, local_service) -> None:
    run = new_run(rank=8)
    run.save_state("one").result()
    path = run.save_state("two").result().path
    run.save_weights_for_sampler("three").result()
    found = rest.get_training_run_by_tinker_path(path).result()
    assert found.training_run_id == run.model_id
    assert found.base_model == local_service.model
    assert found.lora_rank == 8
    assert found.is_lora
    assert not found.corrupted
    assert found.last_checkpoint is not None
    assert found.last_checkpoint.checkpoint_id == "weights/two"
    assert found.last_sampler_checkpoint is not None
    assert found.last_sampler_checkpoint.checkpoint_id == "sampler_weights/three"
    assert datetime.now(UTC) - found.last_request_time < timedelta(seconds=30)


def test_ckp_10_runs_page(new_run, rest) -> None:
    runs = [new_run() for _ in range(3)]
    page = rest.list_training_runs(limit=2).result()
    assert [item.training_run_id for item in page.training_runs] == [
        runs[2].model_id,
        runs[1].model_id,
    ]
    assert page.cursor.total_count >= 3
    rest_page = rest.list_training_runs(limit=2, offset=2).result()
    assert rest_page.training_runs[0].training_run_id == runs[0].model_id


def test_ckp_11_weights_info(new_run, rest, local_service) -> None:
    run = new_run(rank=8, train_unembed=False)
    path = run.save_state("info").result().path
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.is_lora, info.lora_rank) == (local_service.model, True, 8)
    assert (info.train_unembed, info.train_mlp, info.train_attn) == (False, True, True)


def find(rest: tinker.RestClient, path: str) -> tinker.Checkpoint:
    run_id = path.split("/")[2]
    checkpoints = rest.list_checkpoints(run_id).result().checkpoints
    return next(item for item in checkpoints if item.tinker_path == path)


def test_ckp_12_and_13_publish(trained, rest) -> None:
    path = trained.save_state("ckp-12").result().path
    for _ in range(2):
        began = time.monotonic()
        rest.publish_checkpoint_from_tinker_path(path).result()
        assert time.monotonic() - began < 10
        assert find(rest, path).public
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
        assert not find(rest, path).public


def test_ckp_14_time_to_live(trained, rest) -> None:
    path = trained.save_state("ckp-14").result().path
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    assert find(rest, path).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    expires = find(rest, path).expires_at
    assert expires is not None
    assert expires - datetime.now(UTC) > timedelta(seconds=7000)
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert find(rest, path).expires_at is None
    with pytest.raises(tinker.BadRequestError, match="ttl_seconds=5"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 5).result()


def test_ckp_15_delete(trained, rest, module_client) -> None:
    path = trained.save_state("ckp-15").result().path
    trained.save_weights_for_sampler("ckp-15").result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert "weights/ckp-15" not in checkpoint_ids(rest, trained)
    assert "sampler_weights/ckp-15" in checkpoint_ids(rest, trained)
    fails_as_user_error(
        lambda: module_client.create_training_client_from_state(path).result(), "does not exist"
    )
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(path).result()


def test_ckp_16_and_17_names(new_run, rest, module_client) -> None:
    run = new_run()
    path = run.save_state("name", user_metadata={"old": "1"}).result().path
    fails_as_user_error(lambda: run.save_state("name").result(), "already exists")
    train_step(run, batch())
    assert run.save_state("name", overwrite=True).result().path == path
    assert find(rest, path).user_metadata is None
    loaded = module_client.create_training_client_from_state(path).result()
    np.testing.assert_array_equal(flat(loaded), flat(run))
    assert is_alive(run)


def test_ckp_18_copies(trained, rest, module_client) -> None:
    path = trained.save_state("ckp-18").result().path
    copy = rest.copy_weights(path, "gamma").result()
    assert copy != path
    assert copy.endswith("/weights/ckp-18")
    rest.delete_checkpoint_from_tinker_path(path).result()
    loaded = module_client.create_training_client_from_state_with_optimizer(copy).result()
    np.testing.assert_array_equal(flat(loaded), flat(trained))
    runs = rest.list_training_runs(project_id="gamma").result().training_runs
    assert [item.training_run_id for item in runs] == [copy.split("/")[2]]


def download(rest: tinker.RestClient, path: str, folder: Path) -> Path:
    response = rest.get_external_weights_urls(path).result()
    assert response.expires > datetime.now(UTC) + timedelta(minutes=5)
    for name, url in response.urls.items():
        assert name == Path(name).name
        with urllib.request.urlopen(url) as reply:
            body = reply.read()
            assert int(reply.headers["Content-Length"]) == len(body)
        (folder / name).write_bytes(body)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
def test_ckp_19_to_21_exports(trained, rest, tmp_path, local_service) -> None:
    path = trained.save_weights_external("ckp-19").result().path
    folder = download(rest, path, tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert find(rest, path).size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] == 32
    assert config["peft_type"] == "LORA"
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {min(value.shape) for value in tensors.values()}
    assert ranks == {8}
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in tensors)
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        local_service.model, dtype=torch.float32
    )
    # the service holds the base's weights in its format, and sums the scores up in float32
    dtype = by_format(float32=torch.float32, bfloat16=torch.bfloat16)
    base = base.to(dtype).float()
    model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()
    ids = tokens(12, seed=3)
    from tests.e2e.sdk import datum

    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    expected = torch.log_softmax(logits, -1)[range(11), ids[1:]].numpy()
    atol = by_format(float32=1e-4, bfloat16=2e-3)  # the adapter's factors are rounded too
    np.testing.assert_allclose(forward(trained, [datum(ids)])[0], expected, atol=atol)


def test_ckp_22_external_checkpoints_are_managed(trained, rest) -> None:
    path = trained.save_weights_external("ckp-22", ttl_seconds=3600).result().path
    assert find(rest, path).checkpoint_type == "external"
    (url, *_) = rest.get_external_weights_urls(path).result().urls.values()
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url)
    token = url.split("/download/")[1].split("/")[0]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url.replace(token, token[:-3] + "AAA"))


def test_older_sdks_download_one_archive(trained, local_service) -> None:
    run_id, segment, name = trained.save_state("archive").result().path[9:].split("/")
    url = f"{local_service.base_url}/api/v1/training_runs/{run_id}/checkpoints/{segment}/{name}"
    request = urllib.request.Request(f"{url}/archive", headers={"X-API-Key": local_service.api_key})
    with urllib.request.urlopen(request) as reply:
        assert "/download/" in reply.url, "it is redirected"
        with tarfile.open(fileobj=io.BytesIO(reply.read())) as tar:
            names = sorted(tar.getnames())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"]


def test_ckp_22_encryption_is_refused(trained) -> None:
    fails_as_user_error(
        lambda: trained.save_weights_external(
            "ckp-22b", age_encryption_recipients=["age1xyz"]
        ).result(),
        "age_encryption_recipients",
    )


def test_ckp_23_saving_is_quick(trained, module_client) -> None:
    began = time.monotonic()
    path = trained.save_state("ckp-23").result().path
    module_client.create_training_client_from_state_with_optimizer(path).result()
    assert time.monotonic() - began < 5


def test_a_sampler_of_a_deleted_checkpoint_goes_on(trained, rest, module_client) -> None:
    path = trained.save_weights_for_sampler("deleted").result().path
    sampler = module_client.create_sampling_client(model_path=path).result()
    before = prompt_logprobs(sampler, tokens(6))
    rest.delete_checkpoint_from_tinker_path(path).result()
    np.testing.assert_allclose(prompt_logprobs(sampler, tokens(6)), before, atol=1e-5)


NOISE = 0.2
"""Between scores of two packings in bfloat16; the weights that are compared differ by nats."""


def scores_of(run: tinker.TrainingClient) -> np.ndarray:
    """Logprobs of all tokens of a text but the first, by the run itself."""
    return forward(run, [datum(tokens(12))])[0]


def endpoint_scores(service: ServiceProcess, path: str) -> np.ndarray:
    """The same by the OpenAI endpoint."""
    body = {"model": path, "prompt": tokens(12), "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = httpx.post(
        f"{service.base_url}/oai/api/v1/completions",
        json=body,
        headers={"X-API-Key": service.api_key},
    )
    return np.array(answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:])


@pytest.mark.parametrize("again", ["overwrite", "delete"])
def test_a_new_sampler_of_a_path_has_what_was_saved_last(
    new_run, module_client, rest, local_service, again: str
) -> None:
    """A name that is saved again stands for the new weights; samplers of the old ones keep them."""
    run = new_run()
    opened = []
    for step in range(3):
        if step and again == "delete":
            rest.delete_checkpoint_from_tinker_path(opened[0][2]).result()
        path = run.save_state("latest", overwrite=again == "overwrite").result().path
        expected = scores_of(run)
        sampler = module_client.create_sampling_client(model_path=path).result()
        np.testing.assert_allclose(prompt_logprobs(sampler, tokens(12)), expected, atol=NOISE)
        np.testing.assert_allclose(endpoint_scores(local_service, path), expected, atol=NOISE)
        opened.append((sampler, expected, path))
        train_step(run, [datum(tokens(12))], tinker.AdamParams(learning_rate=0.05))
    assert len({path for _, _, path in opened}) == 1
    assert np.abs(opened[1][1] - opened[0][1]).max() > 4 * NOISE
    for sampler, expected, _ in opened:
        np.testing.assert_allclose(prompt_logprobs(sampler, tokens(12)), expected, atol=NOISE)
