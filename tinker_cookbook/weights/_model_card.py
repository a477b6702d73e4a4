"""`weights.model_card` under the module name of the original cookbook."""

from tinker_cookbook.weights.model_card import ModelCardConfig, generate_model_card

__all__ = ["ModelCardConfig", "generate_model_card"]
