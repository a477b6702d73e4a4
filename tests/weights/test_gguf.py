"""Exports as GGUF: llama.cpp reads the same tokens and computes the same log probabilities.

The comparisons need the package llama-cpp-python, and the converter of llama.cpp, which is fetched
from the package index once.
"""

# pyright: reportCallIssue=false

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.assets import tokenizer_folder
from tests.tiny_models import build_tiny_model, tiny_model
from tinker_cookbook.exceptions import ConfigurationError, WeightsAdapterError, WeightsMergeError
from tinker_cookbook.weights import build_gguf, build_gguf_adapter, build_hf_model
from tinker_cookbook.weights.gguf import QUANTISATIONS, convert_base
from tinker_cookbook.weights.gguf_model import GgufModel
from tinker_cookbook.weights.llama_tools import find_quantiser, has_library
from tinker_cookbook.weights.verify import open_scorer

needs_llama_cpp = pytest.mark.skipif(not has_library(), reason="needs llama-cpp-python")
pytestmark = pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`")

ODD_TEXTS = (
    "Hello, world!  Two  spaces\tand\ttabs\n\n\nnew lines \r\n",
    "It's we'll I'd 'TIS don't CAN'T",
    "1234567 3.14159 1e-5 0x1F ١٢٣",
    "naïve café Zürich ﬁ 你好，世界 こんにちは 한국어 עברית العربية हिन्दी",
    "🙂👍🏽👨‍👩‍👧‍👦 \u200b\ufeff\u00a0",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return {'a': [x ** 2, -x]}  # comment\n\n\n",
    " leading and trailing ",
    "a" * 100 + " " * 50 + "!" * 20,
)
FAMILIES = {
    "llama tied": ("llama", True, "smollm2"),
    "qwen2": ("qwen2", False, "qwen2_5"),
    "qwen3 tied": ("qwen3", True, "qwen3"),
}
LARGEST_KL = {"f32": 1e-6, "f16": 1e-3, "q8_0": 3e-2, "q4_0": 3.0}
"""Nats per token. Small random models with large logits lose more than trained models do."""


def build_model(folder: Path, architecture: str, *, tied: bool, tokenizer: str) -> Path:
    """Write a small random model with a real tokenizer, which llama.cpp knows."""
    source = tokenizer_folder(tokenizer)
    vocabulary = json.loads((source / "tokenizer.json").read_text("utf-8"))
    size = max(
        [*vocabulary["model"]["vocab"].values(), *(t["id"] for t in vocabulary["added_tokens"])]
    )
    sizes = {"vocab_size": size + 1, "hidden_size": 64, "num_attention_heads": 8}
    build_tiny_model(folder, architecture, tied=tied, sizes=sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return folder


def write_adapter(folder: Path, model: Path, *, head: bool = False) -> Path:
    """Write a random adapter for all matrices of a tiny model."""
    from tinker_cookbook.weights.base_weights import BaseWeights

    generator = torch.Generator().manual_seed(0)
    base = BaseWeights(model)
    modules = [name.removesuffix(".weight") for name in base.file_of if "_proj.weight" in name]
    shapes = {module: _shape(base, f"{module}.weight") for module in modules}
    if head:
        shapes["lm_head"] = _shape(base, base.embedding)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6}))
    return folder


def _shape(base, name: str) -> tuple[int, int]:
    from safetensors import safe_open

    with safe_open(base.folder / base.file_of[name], framework="pt") as opened:
        return tuple(opened.get_slice(name).get_shape())


def logprobs(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    """Return KL(p || q), the mean over positions."""
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@needs_llama_cpp
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_gives_the_merged_models_logprobs(family: str, tmp_path: Path):
    architecture, tied, tokenizer = FAMILIES[family]
    model = build_model(tmp_path / "base", architecture, tied=tied, tokenizer=tokenizer)
    adapter = write_adapter(tmp_path / "adapter", model, head=tied)
    paths: dict[str, Any] = {"base_model": str(model), "adapter_path": str(adapter)}
    build_hf_model(**paths, output_path=str(tmp_path / "merged"), dtype="float32")
    tokens = np.random.default_rng(0).integers(300, 4000, 24).tolist()
    with open_scorer(tmp_path / "merged", model) as scorer:
        wanted = logprobs(scorer.logits(tokens))
    for form in ("f32", "q8_0", "q4_0") if family == "llama tied" else ("f16",):
        file = build_gguf(**paths, output_path=str(tmp_path / form), quantisation=form)
        assert [path.name for path in (tmp_path / form).iterdir()] == [file.name]
        with GgufModel(file) as opened:
            found = logprobs(opened.logits(tokens))
        assert mean_kl(wanted, found) < LARGEST_KL[form], form


@needs_llama_cpp
@pytest.mark.parametrize("tokenizer", ["smollm2", "qwen3", "llama3_1"])
def test_llama_cpp_reads_the_same_tokens(tokenizer: str, tmp_path: Path):
    from tokenizers import Tokenizer

    model = build_model(tmp_path / "base", "llama", tied=True, tokenizer=tokenizer)
    reference = Tokenizer.from_file(str(model / "tokenizer.json"))
    file = convert_base(model, tmp_path / "base.gguf", "f16")
    with GgufModel(file) as opened:
        for text in ODD_TEXTS:
            wanted = reference.encode(text, add_special_tokens=False).ids
            assert opened.tokenize(text) == wanted, text
        template = (model / "chat_template.jinja").exists() or json.loads(
            (model / "tokenizer_config.json").read_text("utf-8")
        ).get("chat_template")
        assert bool(opened.chat_template) == bool(template)


@needs_llama_cpp
def test_an_adapter_alone_gives_the_merged_models_logprobs(tmp_path: Path):
    model = build_model(tmp_path / "base", "llama", tied=True, tokenizer="smollm2")
    adapter = write_adapter(tmp_path / "adapter", model)
    paths: dict[str, Any] = {"base_model": str(model), "adapter_path": str(adapter)}
    build_hf_model(**paths, output_path=str(tmp_path / "merged"), dtype="float32")
    tokens = np.random.default_rng(0).integers(300, 4000, 24).tolist()
    build_gguf_adapter(**paths, output_path=str(tmp_path / "lora"))
    with open_scorer(tmp_path / "merged", model) as scorer:
        wanted = logprobs(scorer.logits(tokens))
    with open_scorer(tmp_path / "lora", model) as scorer:
        found = logprobs(scorer.logits(tokens))
    assert mean_kl(wanted, found) < LARGEST_KL["f32"]


@needs_llama_cpp
def test_a_mixture_of_experts_is_converted(tmp_path: Path):
    model = build_model(tmp_path / "base", "llama", tied=True, tokenizer="smollm2")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    _write_experts(model, size)
    adapter = write_adapter(tmp_path / "adapter", model)
    paths: dict[str, Any] = {"base_model": str(model), "adapter_path": str(adapter)}
    build_hf_model(**paths, output_path=str(tmp_path / "merged"), dtype="float32")
    tokens = np.random.default_rng(0).integers(300, 4000, 24).tolist()
    with open_scorer(tmp_path / "merged", model) as scorer:
        wanted = logprobs(scorer.logits(tokens))
    file = build_gguf(**paths, output_path=str(tmp_path / "f32"), quantisation="f32")
    with GgufModel(file) as opened:
        assert mean_kl(wanted, logprobs(opened.logits(tokens))) < LARGEST_KL["f32"]


def _write_experts(folder: Path, vocab_size: int) -> None:
    """Replace a model by a small Qwen3 mixture of experts, and keep its tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


def test_an_adapter_of_the_output_embedding_is_refused(tmp_path: Path):
    model = tiny_model(tied=True)
    adapter = write_adapter(tmp_path / "adapter", model, head=True)
    with pytest.raises(WeightsAdapterError, match="adapts lm_head"):
        build_gguf_adapter(
            base_model=str(model), adapter_path=str(adapter), output_path=str(tmp_path / "out")
        )
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def export(model: Path, adapter: Path, output: Path, **options: str) -> Path:
    return build_gguf(
        base_model=str(model), adapter_path=str(adapter), output_path=str(output), **options
    )


def fake_llama_cpp(folder: Path, program: str) -> str:
    """Write a stand-in for llama.cpp's converter, which is another program."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(program)
    return str(folder)


def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path: Path):
    model = tiny_model(tied=True)
    adapter = write_adapter(tmp_path / "adapter", model)
    output = tmp_path / "results" / "out"
    with pytest.raises(ConfigurationError, match="quantisation='int3' is unknown; use one of f32"):
        export(model, adapter, output, quantisation="int3")
    with pytest.raises(ConfigurationError, match=r"does not contain convert_hf_to_gguf\.py"):
        export(model, adapter, output, llama_cpp=str(tmp_path))
    words = "import sys\nopen(sys.argv[3], 'w').write('half')\n"
    full = fake_llama_cpp(tmp_path / "full", words + "raise OSError(28, 'No space left on device')")
    with pytest.raises(WeightsMergeError, match=r"status 1:\n(.*\n)*.*No space left on device"):
        export(model, adapter, output, llama_cpp=full)
    unknown = fake_llama_cpp(
        tmp_path / "unknown",
        words + "raise NotImplementedError('BPE pre-tokenizer was not recognized')",
    )
    with pytest.raises(WeightsMergeError, match="does not know how this tokenizer splits text"):
        export(model, adapter, output, llama_cpp=unknown)
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.skipif(has_library(), reason="llama-cpp-python is installed")
def test_a_missing_quantiser_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="pip install llama-cpp-python"):
        find_quantiser()


def test_ctrl_c_leaves_nothing(tmp_path: Path):
    model = tiny_model(tied=True)
    adapter = write_adapter(tmp_path / "adapter", model)
    slow = fake_llama_cpp(
        tmp_path / "slow",
        "import sys, time\nopen(sys.argv[3], 'w').write('half')\ntime.sleep(60)\n",
    )
    output = tmp_path / "results" / "out"
    program = (
        "from tinker_cookbook.weights import build_gguf\n"
        f"build_gguf(base_model={str(model)!r}, adapter_path={str(adapter)!r}, "
        f"output_path={str(output)!r}, quantisation='f16', llama_cpp={slow!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "results").glob(".out-*/*.gguf")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert list((tmp_path / "results").iterdir()) == []


def test_the_command_offers_the_formats_that_exist():
    from tinker_cookbook.commands.export import QUANTS

    assert tuple(QUANTISATIONS) == QUANTS
