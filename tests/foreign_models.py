"""Small random models of architectures that the engine leaves to transformers, or refuses."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_model

__all__ = ["RUN_THROUGH_TRANSFORMERS", "foreign_model"]

_SIZE: dict[str, Any] = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2}
_SIZE |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
_HEADS: dict[str, Any] = {
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
_HEADS |= {"max_position_embeddings": 1024}

RUN_THROUGH_TRANSFORMERS = ("mistral", "gemma3", "phi3", "gpt2", "mixtral", "qwen3_moe")


@functools.cache
def foreign_model(kind: str) -> Path:
    """Folder of such a model with the tokenizer of the other tiny ones, built once per process."""
    import torch

    text = tiny_model(tied=False)
    folder = text.parent / f"tiny-foreign-{kind}"
    torch.manual_seed(0)
    model = _BUILDERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(text / name, folder / name)
    return folder


def _mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZE, **_HEADS, sliding_window=64))


def _gemma3(**options: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**_SIZE, **_HEADS, head_dim=8, sliding_window=64, **options)
    return Gemma3ForCausalLM(config)


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_SIZE, **_HEADS))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_embd=48, n_layer=2, n_head=6, n_positions=1024)
    return GPT2LMHeadModel(config)


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_SIZE, **_HEADS, num_local_experts=4))


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZE, **_HEADS, **experts))


def _bert(**options: Any) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    size: dict[str, Any] = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 6, "intermediate_size": 96}
    return BertForMaskedLM(BertConfig(**size, **options))


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=320, d_model=48, d_kv=8, d_ff=96, num_layers=2, num_heads=6)
    return T5ForConditionalGeneration(config)


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(**_SIZE, state_size=8))


_BUILDERS: dict[str, Callable[[], Any]] = {
    "mistral": _mistral,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "bert": _bert,
    "t5": _t5,
    "mamba": _mamba,
    "gemma3_both_sides": lambda: _gemma3(use_bidirectional_attention=True),
}
