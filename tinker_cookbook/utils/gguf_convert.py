"""Convert a GGUF file of a Llama-architecture model to a Hugging Face model folder.

Writes config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json and
tokenizer_config.json. Only NumPy is required.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.utils.gguf_file import GgufFile, Metadata

__all__ = ["convert_gguf"]

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a special token."""


def convert_gguf(
    source: Path, folder: Path, *, on_progress: Callable[[float], None] | None = None
) -> None:
    """Write the model folder.

    Args:
        on_progress: called with the share of tensors written, from 0 to 1.

    Raises:
        WeightsError: if the file is damaged or has an unsupported architecture or tokenizer.
    """
    with GgufFile(source) as gguf:
        metadata = gguf.metadata
        if metadata.get("general.architecture") != "llama":
            raise WeightsError(
                f"{source.name}: architecture {metadata.get('general.architecture')!r} is not "
                "supported; use a GGUF file of a llama model"
            )
        config = _model_config(metadata, tied="output.weight" not in gguf.tensors)
        _write_json(folder / "config.json", config)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "generation_config.json", generation)
        _write_tokenizer(metadata, folder)
        _write_weights(gguf, config, folder / "model.safetensors", on_progress)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(metadata: Metadata, *, tied: bool) -> dict[str, object]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal of a float32 value: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value)))


def _write_tokenizer(metadata: Metadata, folder: Path) -> None:
    """Write a byte-level BPE tokenizer; `smollm` splits digits before the GPT-2 pattern applies."""
    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise WeightsError(
            f"the GGUF file has tokenizer {kind}; only ('gpt2', 'smollm') is supported"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [
        index
        for index, token_type in enumerate(metadata["tokenizer.ggml.token_type"])
        if token_type == _CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, tokens[index]) for index in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens, special))


def _added_token(index: int, content: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}


def _tokenizer_config(
    metadata: Metadata, tokens: list[str], special: list[int]
) -> dict[str, object]:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        "extra_special_tokens": [tokens[index] for index in special],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        config[f"{name}_token"] = tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
    return config


def _write_weights(
    gguf: GgufFile,
    config: Metadata,
    path: Path,
    on_progress: Callable[[float], None] | None,
) -> None:
    """Write the tensors one at a time in the safetensors format, which needs little memory."""
    names = {_hf_name(name): name for name in gguf.tensors}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, gguf_name in names.items():
        shape = gguf.tensors[gguf_name].shape
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for count, (name, gguf_name) in enumerate(names.items(), 1):
            values = gguf.read(gguf_name)
            if name.endswith("q_proj.weight"):
                values = _unpermute(values, config["num_attention_heads"])
            elif name.endswith("k_proj.weight"):
                values = _unpermute(values, config["num_key_value_heads"])
            file.write(_to_bfloat16(values).tobytes())
            if on_progress is not None:
                on_progress(count / len(names))


def _hf_name(name: str) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    try:
        block, index, part, suffix = name.split(".")
        if (block, suffix) != ("blk", "weight"):
            raise KeyError(name)
        return f"model.layers.{index}.{_BLOCK_NAMES[part]}.weight"
    except (ValueError, KeyError) as error:
        raise WeightsError(f"GGUF tensor {name} is not part of a Llama model") from error


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of the two halves that rotary embedding rotates together."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows, columns)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 (nearest, ties to even), as its uint16 bit pattern."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
