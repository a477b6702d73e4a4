"""`tinker-cookbook sample`, and what `chat` shares with it: the model, and mistakes by name."""

# pyright: reportArgumentType=false

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import ServiceProcess, start_service
from tests.e2e.sdk import batch, train_step
from tests.tiny_models import tiny_model
from tests.vision_models import picture, tiny_vision_model
from tinker_cookbook import cli, model_files, service
from tinker_cookbook.local.service.storage.rows import RunRow
from tinker_cookbook.local.service.storage.store import NewCheckpoint, Store
from tinker_cookbook.service.embedded import find_saved_model


@pytest.fixture(scope="module")
def checkpoints(local_service: ServiceProcess) -> tuple[str, str]:
    """For sampling and for training on."""
    client = local_service.connect()
    run = client.create_lora_training_client(base_model=local_service.model, rank=2).result()
    train_step(run, batch())
    sampled = run.save_weights_for_sampler("sampled").result().path
    return sampled, run.save_state("state").result().path


@pytest.fixture
def sample(local_service: ServiceProcess, monkeypatch, capsys):
    """Run the command against a service of one model, which is not named."""
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(["sample", "--renderer", "chatml", "--max-tokens", "3", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_an_unknown_renderer_is_told_before_anything_starts(sample) -> None:
    status, shown, problem = sample("--prompt", "a", "--renderer", "chatmll")
    assert (status, shown) == (2, "")
    assert "'chatmll' is unknown. Did you mean 'chatml'?" in problem


def test_the_only_model_and_a_checkpoint_need_no_name(sample, local_service, checkpoints) -> None:
    for target in ((), *((path,) for path in checkpoints)):
        status, shown, problem = sample(*target, "--prompt", "What is it?")
        assert (status, problem) == (0, "")
        assert f"model    {local_service.model}" in shown
        assert "> What is it?" in shown


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tinker://nope"], "PATH=tinker://nope is not a checkpoint that can be sampled"),
        (["tinker://a/external_weights/b"], "is not a checkpoint that can be sampled"),
        (["tinker://a/weights/b"], "does not exist; it may have expired"),
        (["no/model"], "model_name=no/model is not offered"),
        (["--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--temperature", "nan"], "temperature=nan is out of range"),
        (["--max-tokens", "0"], "max_tokens=0 is too small"),
        (["--num-samples", "0"], "num_samples=0 is too small"),
        (["--max-tokens", "999999"], "exceed the context length"),
        (["--renderer", "nope"], "renderer name='nope' is unknown"),
    ],
)
def test_mistakes_are_named_without_a_traceback(sample, words: list[str], problem: str) -> None:
    status, _, said = sample(*words)
    assert status == 2
    assert said.startswith("error: ")
    assert problem in said
    for noise in ("Error code", "self.request_id", "{'detail'"):
        assert noise not in said


def test_a_checkpoint_on_this_machine_tells_its_model(tmp_path, monkeypatch, capsys) -> None:
    """Before anything is started for it."""
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path))
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    assert model_files.cookbook_home() == tmp_path
    path = "tinker://s:train:0/weights/kept"
    assert cli.main(["sample", path, "--base-url", "local"]) == 2
    assert "nothing of that name is saved in" in capsys.readouterr().err
    store = Store(tmp_path / "service")
    store.index.insert(RunRow("s:train:0", "s", "some/model", {}, None, 1.0, 1.0, True))
    staged = store.stage()
    (staged / "adapter_model.safetensors").write_bytes(b"weights")
    store.commit(staged, NewCheckpoint("s:train:0", "weights", "kept", has_optimizer=False))
    store.close()
    assert find_saved_model(path) == "some/model"
    assert cli.main(["sample", f"{path}2", "--base-url", "local"]) == 2
    assert f"{path}2 does not exist" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Serves one model, and those of a folder: `other` and `team/third`; `broken` is none."""
    folder = tmp_path_factory.mktemp("folders")
    models = folder / "models"
    shutil.copytree(tiny_model("qwen2"), models / "other")
    shutil.copytree(tiny_model("qwen3"), models / "team" / "third")
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_text("[")
    (models / "outside").symlink_to(tiny_model("llama"))
    state = folder / "state"
    service = start_service(tiny_model(tied=False), state, "--models-dir", str(models))
    yield service
    service.stop()


def test_models_of_a_folder_are_listed(folder_service, monkeypatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", folder_service.api_key)
    models = folder_service.state_dir.parent / "models"
    expected = [folder_service.model, str(models / "other"), str(models / "team" / "third")]
    connection = service.connect(folder_service.base_url, expected[0])
    answer = httpx.get(
        f"{folder_service.base_url}/oai/api/v1/models",
        headers={"X-API-Key": folder_service.api_key},
    )
    assert connection.supported_models() == sorted(expected)
    listed = [model["id"] for model in answer.json()["data"]]
    assert listed[: len(expected)] == expected
    answer = httpx.post(
        f"{folder_service.base_url}/oai/api/v1/chat/completions",
        headers={"X-API-Key": folder_service.api_key},
        json={"model": "absent", "messages": [{"role": "user", "content": "hi"}]},
    )
    assert answer.status_code == 404
    served = f"this service has {folder_service.model}, the models in {models}."
    assert served in answer.json()["error"]["message"]


@pytest.mark.parametrize("form", ["{models}/other", "other", "team/third", "third", "other/"])
def test_models_of_a_folder_can_be_sampled(folder_service, monkeypatch, capsys, form: str) -> None:
    """By their path, by its end, or as they lie below the folder."""
    monkeypatch.setenv("TINKER_BASE_URL", folder_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", folder_service.api_key)
    models = folder_service.state_dir.parent / "models"
    name = form.format(models=models)
    words = ["--renderer", "chatml", "--max-tokens", "3", "--prompt", "What is it?"]
    assert cli.main(["sample", "--model", name, *words]) == 0
    shown = capsys.readouterr().out
    assert f"model    {models}/" in shown
    assert cli.main(["sample", "--model", "absent", *words]) != 0
    assert "is not offered" in capsys.readouterr().err


def test_a_text_model_reads_no_images(sample, local_service) -> None:
    status, _, problem = sample("--image", "x.png")
    assert status == 2
    assert f"model={local_service.model} does not read images; leave out --image" in problem


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (
            "qwen2_5_vl",
            "renderer=chatml cannot write images. For {} use --renderer qwen3_vl_instruct.",
        ),
        ("llava", "model={} reads images, but no renderer writes them in its format"),
    ],
)
def test_a_vision_folder_names_the_renderer_of_images(
    service_factory, monkeypatch, capsys, tmp_path, kind: str, problem: str
) -> None:
    folder = tiny_vision_model(kind)
    served = service_factory(folder)
    monkeypatch.setenv("TINKER_BASE_URL", served.base_url)
    monkeypatch.setenv("TINKER_API_KEY", served.api_key)
    file = tmp_path / "picture.png"
    file.write_bytes(picture(28, 28))
    words = ["sample", "--image", str(file), "--max-tokens", "2", "--renderer"]
    assert cli.main([*words, "chatml"]) == 2
    assert problem.format(folder) in capsys.readouterr().err
    if kind == "qwen2_5_vl":
        assert cli.main([*words, "qwen3_vl_instruct"]) == 0
