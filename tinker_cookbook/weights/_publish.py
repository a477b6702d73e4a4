"""`weights.publish` under the module name of the original cookbook."""

from tinker_cookbook.weights.publish import publish_to_hf_hub

__all__ = ["publish_to_hf_hub"]
