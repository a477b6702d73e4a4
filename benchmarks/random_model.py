"""Write a model folder with random bfloat16 weights in the shape of a known model.

    python benchmarks/random_model.py qwen3-0.6b /tmp/qwen3-0.6b

For measurements of models whose weights are not available: speed and memory do not depend on the
values.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "base": "llama",
        "hidden": 576,
        "inner": 1536,
        "layers": 30,
        "heads": 9,
        "kv": 3,
    },
    "smollm2-360m": {
        "base": "llama",
        "hidden": 960,
        "inner": 2560,
        "layers": 32,
        "heads": 15,
        "kv": 5,
    },
    "qwen3-0.6b": {
        "base": "qwen3",
        "hidden": 1024,
        "inner": 3072,
        "layers": 28,
        "heads": 16,
        "kv": 8,
    },
    "qwen3-1.7b": {
        "base": "qwen3",
        "hidden": 2048,
        "inner": 6144,
        "layers": 28,
        "heads": 16,
        "kv": 8,
    },
    "qwen3-4b": {
        "base": "qwen3",
        "hidden": 2560,
        "inner": 9728,
        "layers": 36,
        "heads": 32,
        "kv": 8,
    },
}


def make_config(name: str) -> dict[str, Any]:
    """Return config.json of a shape."""
    shape = SHAPES[name]
    qwen = shape["base"] == "qwen3"
    return {
        "model_type": shape["base"],
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "vocab_size": 151_936 if qwen else 49_152,
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "head_dim": 128 if qwen else 64,
        "max_position_embeddings": 40_960 if qwen else 8192,
        "rms_norm_eps": 1e-6 if qwen else 1e-5,
        "rope_theta": 1e6 if qwen else 1e5,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def write_model(name: str, folder: Path, *, with_weights: bool = True) -> None:
    """Write config.json and the weights, one block at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if not with_weights:
        return
    import torch
    from safetensors.torch import save_file

    from tinker_cookbook.local.engine.model.architecture import read_arch
    from tinker_cookbook.local.engine.model.weights import BLOCKS, FUSED, module_shapes

    arch = read_arch(folder)
    assert arch is not None, "all shapes are of architectures that the engine runs itself"
    blocks = {module: BLOCKS[key] for key, modules in FUSED.items() for module in modules}

    def draw(*size: int) -> Any:
        return torch.randn(size, dtype=torch.bfloat16) * size[-1] ** -0.5

    def ones(size: int) -> Any:
        return torch.ones(size, dtype=torch.bfloat16)

    tensors = {"model.embed_tokens.weight": draw(arch.vocab_size, arch.hidden_size)}
    tensors["model.norm.weight"] = ones(arch.hidden_size)
    for index in range(arch.num_layers):
        prefix = f"model.layers.{index}"
        for module, size in module_shapes(arch).items():
            tensors[f"{prefix}.{blocks[module]}.{module}.weight"] = draw(*size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones(arch.hidden_size)
        if arch.qk_norm:
            for norm in ("q_norm", "k_norm"):
                tensors[f"{prefix}.self_attn.{norm}.weight"] = ones(arch.head_dim)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--config-only", action="store_true", help="write only config.json, for `serve --plan`"
    )
    arguments = parser.parse_args()
    write_model(arguments.shape, arguments.folder, with_weights=not arguments.config_only)


if __name__ == "__main__":
    main()
