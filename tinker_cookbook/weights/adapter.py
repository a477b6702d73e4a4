"""Convert an adapter to PEFT's format, for transformers with PEFT, vLLM and SGLang."""

from __future__ import annotations

import json

from tinker_cookbook.exceptions import WeightsAdapterError
from tinker_cookbook.model_files import resolve_model_folder
from tinker_cookbook.weights.adapter_files import open_adapter
from tinker_cookbook.weights.base_weights import BaseWeights
from tinker_cookbook.weights.output_folder import complete_folder

__all__ = ["build_lora_adapter"]


def build_lora_adapter(
    *,
    base_model: str,
    adapter_path: str,
    output_path: str,
    trust_remote_code: bool | None = None,
) -> None:
    """Write an adapter with PEFT's names and configuration.

    Args:
        base_model: Name or folder of the model that the adapter was trained on.
        adapter_path: Folder of the adapter, from any Tinker service.
        output_path: Folder to create.
        trust_remote_code: Accepted for older programs; no code of a model is run here.

    Raises:
        ConfigurationError: if the output folder is not empty.
        WeightsAdapterError: if the adapter cannot be read, or it adapts the output embedding: vLLM
            and SGLang refuse such adapters or ignore that part, which gives another model.
        WeightsMergeError: if the base model does not have the adapted weights.
    """
    base = BaseWeights(resolve_model_folder(base_model))
    with complete_folder(output_path) as output, open_adapter(adapter_path) as adapter:
        if "lm_head" in adapter.matrices:
            raise WeightsAdapterError(
                f"{adapter.folder} adapts lm_head, which vLLM and SGLang do not load. Write a "
                "merged model with build_hf_model, or train with train_unembed=False."
            )
        targets = base.find(adapter.matrices)
        from safetensors.torch import save_file

        tensors = {}
        for module, matrices in adapter.matrices.items():
            name = targets[module].removesuffix(".weight")
            tensors[f"base_model.model.{name}.lora_A.weight"] = matrices.a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = matrices.b.contiguous()
        save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "fan_in_fan_out": all(base.is_transposed(target) for target in targets.values()),
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted({module.rpartition(".")[2] for module in adapter.matrices}),
        }
        text = json.dumps(config, indent=2) + "\n"
        (output / "adapter_config.json").write_text(text, encoding="utf-8")
