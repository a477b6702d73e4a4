"""Check whether a model folder can be served, before the model is loaded."""

from __future__ import annotations

from pathlib import Path

from tinker_cookbook.local.engine.model.architecture import read_arch

__all__ = ["check_model"]


def check_model(folder: Path) -> None:
    """Refuse a model that the engine cannot run. Imports torch only if transformers runs the model.

    Raises:
        WeightsError: the message says what is not supported.
    """
    if read_arch(folder) is None:
        from tinker_cookbook.local.engine.model.hf_support import read_hf_config

        read_hf_config(folder)
