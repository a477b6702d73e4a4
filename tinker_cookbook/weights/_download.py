"""`weights.download` under the module name of the original cookbook."""

from tinker_cookbook.weights.download import download

__all__ = ["download"]
