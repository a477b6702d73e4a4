"""Small random models in Hugging Face format, with a real byte-level tokenizer, for tests.

    folder = tiny_model("llama")          # or "qwen2", "qwen3"; built once a session

The folders load in this project's engine and in transformers alike. Weights are random but fixed.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["CHATML_TEMPLATE", "TINY_ARCHITECTURES", "build_tiny_model", "tiny_model"]

TINY_ARCHITECTURES = ("llama", "qwen2", "qwen3")

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CORPUS = (
    "user\nassistant\nsystem\n",
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs on.",
    "What is the capital of France? The capital of France is Paris.",
    "Call me Ishmael. Some years ago I thought I would sail about and see the watery world.",
    "1 + 1 = 2, 2 + 3 = 5, 10 - 4 = 6. Zwölf Boxkämpfer jagen Viktor über den Deich. 你好，世界",
)


@functools.cache
def tiny_model(
    architecture: str = "llama", *, tied: bool = True, num_layers: int = 2, seed: int = 0
) -> Path:
    """Folder of a tiny random model, built once per process and kept until it ends."""
    folder = Path(_session_folder().name) / f"tiny-{architecture}-{tied}-{num_layers}-{seed}"
    build_tiny_model(folder, architecture, tied=tied, num_layers=num_layers, seed=seed)
    return folder


@functools.cache
def _session_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-models-", ignore_cleanup_errors=True)


def build_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    tied: bool = True,
    num_layers: int = 2,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer files of a tiny model.

    Args:
        sizes: keys of config.json to set otherwise, such as `hidden_size`.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size, token_ids = _write_tokenizer(folder)
    config = _config(architecture, vocab_size, token_ids, tied=tied, num_layers=num_layers)
    config |= sizes or {}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generation = {"eos_token_id": token_ids["<|im_end|>"], "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})


def _config(
    architecture: str,
    vocab_size: int,
    token_ids: dict[str, int],
    *,
    tied: bool,
    num_layers: int,
) -> dict:
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{names[architecture]}ForCausalLM"],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "torch_dtype": "float32",
    }


def _weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random weights, large enough that logits differ clearly between tokens."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden, gain=3.0)}
    shapes = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(*shape)
            if config["model_type"] == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                bias = rng.standard_normal(shape[0]).astype(np.float32) * np.float32(0.1)
                tensors[f"{prefix}{name}.bias"] = bias
        if config["model_type"] == "qwen3":
            tensors[f"{prefix}self_attn.q_norm.weight"] = norm(head_dim)
            tensors[f"{prefix}self_attn.k_norm.weight"] = norm(head_dim)
        tensors[f"{prefix}input_layernorm.weight"] = norm(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = norm(hidden)
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden, gain=3.0)
    return tensors


def _write_tokenizer(folder: Path) -> tuple[int, dict[str, int]]:
    """Train a byte-level BPE tokenizer on a few sentences; returns its size and special ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer.get_vocab_size(), {token: i for i, token in enumerate(_SPECIAL_TOKENS)}
