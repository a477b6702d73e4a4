"""Which config.json files the engine runs itself, and what it reads from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.architecture import FAMILIES, ArchConfig, read_arch

LLAMA: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def read(folder: Path, **changes: object) -> ArchConfig | None:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return read_arch(folder)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_decides_bias_and_norm(tmp_path: Path, model_type: str) -> None:
    arch = read(tmp_path, model_type=model_type)
    assert arch is not None
    family = FAMILIES[model_type]
    assert (arch.qkv_bias, arch.qk_norm) == (family.qkv_bias, family.qk_norm)
    assert (arch.head_dim, arch.q_size, arch.kv_size) == (8, 48, 16)


@pytest.mark.parametrize(
    ("changes", "is_native"),
    [
        ({}, True),
        ({"model_type": "gemma3"}, False),
        ({"hidden_act": "gelu"}, False),
        ({"mlp_bias": True}, False),
        ({"attention_bias": True}, False),
        ({"attention_bias": True, "model_type": "qwen2"}, True),
        ({"attention_out_bias": True}, False),
        ({"quantization_config": {"bits": 4}}, False),
        ({"sliding_window": 64, "model_type": "mistral"}, False),
        ({"sliding_window": None, "model_type": "mistral"}, True),
        ({"sliding_window": 64, "use_sliding_window": False, "model_type": "mistral"}, True),
        ({"sliding_window": 64, "model_type": "qwen2"}, True),
        ({"sliding_window": 64, "use_sliding_window": True, "model_type": "qwen2"}, False),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, True),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, False),
    ],
)
def test_options_that_the_block_lacks_send_a_model_to_transformers(
    tmp_path: Path, changes: dict[str, object], is_native: bool
) -> None:
    assert (read(tmp_path, **changes) is not None) == is_native


def test_both_spellings_of_rotary_embeddings_are_read(tmp_path: Path) -> None:
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    parameters = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    new = read(tmp_path, rope_parameters=parameters)
    assert old is not None
    assert new is not None
    assert old.rope == new.rope
    assert (new.rope.theta, new.rope.kind, new.rope.factor) == (5e5, "linear", 2.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "has no config.json"),
        ("[1]", "a JSON object is expected"),
        ("{", "is not valid JSON"),
        (json.dumps(LLAMA | {"architectures": ["LlamaForSequenceClassification"]}), "causal"),
        (json.dumps({"model_type": "llama"}), "lacks 'hidden_size'"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    tmp_path: Path, text: str | None, problem: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=problem):
        read_arch(tmp_path)
