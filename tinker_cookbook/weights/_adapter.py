"""`weights.adapter` under the module name of the original cookbook."""

from tinker_cookbook.weights.adapter import build_lora_adapter

__all__ = ["build_lora_adapter"]
