"""Loading tokenizers: names, folders, the registry, and errors that say what to do."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook import tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.tokenizer_utils import get_tokenizer, strip_variant


def test_the_same_object_on_every_call_and_from_every_thread() -> None:
    folder = str(tokenizer_folder("qwen3"))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tokenizers = list(pool.map(get_tokenizer, [folder] * 16))
    assert all(tokenizer is tokenizers[0] for tokenizer in tokenizers)


def test_the_default_model_by_name() -> None:
    tokenizer = get_tokenizer(DEFAULT_MODEL)
    assert tokenizer.name_or_path == DEFAULT_MODEL
    assert tokenizer.eos_token == "<|im_end|>"
    assert get_tokenizer(f"{DEFAULT_MODEL}:beta").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "smollm2"])
def test_equal_to_what_transformers_loads(name: str) -> None:
    from transformers import AutoTokenizer

    slow: Any = AutoTokenizer.from_pretrained(tokenizer_folder(name))
    fast = load_tokenizer(name)
    for text in ("Hello  world\n\n", "日本 é 👩‍👧 1234", "<|im_end|><think>a", " x\t"):
        assert fast.encode(text, add_special_tokens=False) == slow.encode(
            text, add_special_tokens=False
        )
    assert fast.chat_template == slow.chat_template
    assert (fast.eos_token, fast.bos_token) == (slow.eos_token, slow.bos_token)


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("Qwen/Qwen3-8B:beta", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3.6-35B-A3B:peft:262144", "Qwen/Qwen3.6-35B-A3B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("C:\\models\\x", "C:\\models\\x"),
        ("a:b/c", "a:b/c"),
        (":x", ":x"),
    ],
)
def test_variants_are_stripped(name: str, stripped: str) -> None:
    assert strip_variant(name) == stripped


def test_a_folder_with_a_colon_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run:final"
    folder.mkdir()
    assert strip_variant(str(folder)) == str(folder)


def test_registered_tokenizers() -> None:
    made: list[object] = []

    def factory() -> Any:
        made.append(load_tokenizer("qwen3"))
        return made[-1]

    other = load_tokenizer("qwen3")
    tokenizer_utils.register_tokenizer("mine", factory)
    try:
        assert load_tokenizer("qwen3") is other
        assert tokenizer_utils.is_tokenizer_registered("mine")
        assert tokenizer_utils.get_registered_tokenizer_names() == ["mine"]
        assert get_tokenizer("mine") is get_tokenizer("mine")
        assert get_tokenizer("mine:variant") is made[0]
        assert len(made) == 2  # once for each name asked for
    finally:
        assert tokenizer_utils.unregister_tokenizer("mine")
    assert not tokenizer_utils.unregister_tokenizer("mine")
    with pytest.raises(TinkerCookbookError):
        get_tokenizer("mine")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        get_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_model(tmp_path: Path) -> None:
    """Repositories of a tokenizer alone have no config.json."""
    origin = tokenizer_folder("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).symlink_to(origin / name)
    tokenizer = get_tokenizer(str(tmp_path))
    expected = load_tokenizer("qwen3")
    assert tokenizer.encode("Hi\n<think>") == expected.encode("Hi\n<think>")
    assert tokenizer.chat_template == expected.chat_template
    renderer = load_renderer("qwen3", str(tmp_path))
    assert renderer.get_stop_sequences() == [expected.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    source = tokenizer_folder("qwen3")
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ConfigurationError, match=f"/{name} does not hold a JSON object; copy or download"
    ):
        get_tokenizer(str(tmp_path))


def test_a_cached_repository_of_a_tokenizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--only-a-tokenizer"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to(tokenizer_folder("qwen3") / "tokenizer.json")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get_tokenizer("someone/only-a-tokenizer").encode("Hi") == [13048]


def test_a_missing_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TinkerCookbookError, match=r"Qwen/Qwen3-0\.6B-nowhere") as raised:
        get_tokenizer("Qwen/Qwen3-0.6B-nowhere")
    assert "folder" in str(raised.value)


def test_encoding_without_special_tokens() -> None:
    class Ordinary:
        def encode_ordinary(self, text: str) -> list[int]:
            return [len(text)]

    assert tokenizer_utils.encode_without_special_tokens(Ordinary(), "abc") == [3]
    tokenizer = load_tokenizer("qwen3")
    ids = tokenizer_utils.encode_without_special_tokens(tokenizer, "abc")
    assert tokenizer.decode(ids) == "abc"
