"""Whether a model folder can be served, before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path

from tinker_cookbook.local.engine.model.architecture import read_arch

__all__ = ["check_model"]


def check_model(folder: Path) -> None:
    """Refuse what the engine could not run. Imports torch only for models that need transformers.

    Raises:
        WeightsError: in one line.
    """
    if read_arch(folder) is None:
        from tinker_cookbook.local.engine.model.hf_support import read_hf_config

        read_hf_config(folder)
