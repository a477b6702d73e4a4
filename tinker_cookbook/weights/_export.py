"""Merging a model and its parts, under the module name of the original cookbook."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.model_files import resolve_model_folder
from tinker_cookbook.weights.base_weights import BaseWeights
from tinker_cookbook.weights.merge import build_hf_model, copy_small_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "build_hf_model",
    "cleanup_on_failure",
    "is_multimodal",
    "is_multimodal_from_dict",
    "load_config_dict",
    "resolve_trust_remote_code",
    "save_tokenizer_and_processor",
]


def resolve_trust_remote_code(trust_remote_code: bool | None) -> bool:
    """Return whether code of a model may run: as given, or as HF_TRUST_REMOTE_CODE says."""
    if trust_remote_code is not None:
        return trust_remote_code
    return os.environ.get("HF_TRUST_REMOTE_CODE", "").lower() in ("1", "true", "yes")


def load_config_dict(
    model_dir_or_name: str | Path, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return a model's config.json; no code of the model is run.

    Raises:
        ConfigurationError: if there is no such model.
    """
    del trust_remote_code
    return dict(BaseWeights(resolve_model_folder(str(model_dir_or_name))).config)


def is_multimodal(config: PretrainedConfig) -> bool:
    """Return whether a model reads images or sounds."""
    return is_multimodal_from_dict(config.to_dict())


def is_multimodal_from_dict(config_dict: Mapping[str, Any]) -> bool:
    """Return whether a config.json has an encoder of images or sounds."""
    return any(config_dict.get(key) for key in ("vision_config", "audio_config"))


def save_tokenizer_and_processor(base_model: str, output_path: Path, multimodal: bool) -> None:
    """Copy tokenizer, chat template, processor and generation settings.

    Args:
        base_model: Name or folder of the model.
        output_path: An existing folder.
        multimodal: Accepted for older programs; the files of a processor are copied if they exist.
    """
    del multimodal
    copy_small_files(resolve_model_folder(base_model), output_path)


def cleanup_on_failure(out: Path) -> None:
    """Remove an incomplete output folder."""
    shutil.rmtree(out, ignore_errors=True)
