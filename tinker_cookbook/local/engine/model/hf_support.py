"""Checks whether transformers can run a model: first its configuration, then the loaded model.

A model that attends to both sides would silently give meaningless losses and samples. So a loaded
model is run once to see that its predictions do not depend on later tokens.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch

from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.architecture import read_config_json
from tinker_cookbook.local.engine.model.vision import has_vision

__all__ = ["check_cache", "check_is_causal", "model_on_meta", "read_hf_config"]

_ACCEPTED = "a decoder-only language model (llama, qwen, mistral, gemma, phi, gpt2 and such)"
_PROBE = 6
"""Number of tokens in that run."""


def read_hf_config(folder: Path) -> Any:
    """Return the configuration of a folder that transformers can run as a causal language model.

    Raises:
        WeightsError: in one line, for any other folder.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as names

    raw = read_config_json(folder)
    kind = raw.get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each configuration class has its own checks
        raise WeightsError(f"{folder} cannot be read by transformers: {_line(error)}") from error
    if has_vision(raw):
        return config
    refusal = None
    if config.is_encoder_decoder:
        refusal = "has an encoder as well as a decoder"
    elif kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder"):
        refusal = "fills in masks and reads the text on both sides of them"
    elif kind not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        refusal = "is not a causal language model of this version of transformers"
    if refusal is not None:
        raise WeightsError(f"{folder}: a model of type {kind!r} {refusal}; use {_ACCEPTED}")
    _check_keeps_keys(folder, config)
    return config


def _check_keeps_keys(folder: Path, config: Any) -> None:
    """Refuse models without attention, which continue from a state instead of keys and values."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=config.get_text_config()).get_seq_length()
    except ValueError as error:
        raise WeightsError(
            f"{folder}: a model of type {config.model_type!r} keeps a state instead of keys and "
            f"values, which is not supported; use {_ACCEPTED}"
        ) from error


def model_on_meta(folder: Path) -> Any:
    """Return the model with all its modules and shapes, but without numbers.

    Raises:
        WeightsError: as for `read_hf_config`, or if transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_hf_config(folder)
    reads_images = has_vision(read_config_json(folder))
    loader = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initializing numbers, which do not exist
            model = loader.from_config(config)
    except Exception as error:
        raise WeightsError(f"transformers cannot build {folder}: {_line(error)}") from error
    check_cache(folder, model)
    return model


def check_cache(folder: Path, model: Any) -> None:
    """Refuse a model whose forward pass does not accept a key-value cache.

    Raises:
        WeightsError: in one line.
    """
    names = inspect.signature(model.forward).parameters
    if not {"past_key_values", "cache"} & set(names):
        raise WeightsError(
            f"{folder}: {type(model).__name__} does not accept a key-value cache, which sampling "
            f"needs; use {_ACCEPTED}"
        )


@torch.no_grad()
def check_is_causal(folder: Path, model: Any) -> None:
    """Check that a loaded text model's predictions do not change when only a later token does.

    Raises:
        WeightsError: if they change, or the model does not run.
    """
    size = int(model.get_output_embeddings().weight.shape[0])
    tokens = (torch.arange(_PROBE, device=model.device) + 3) % size
    other = tokens.clone()
    other[-1] = (tokens[-1] + size // 2) % size
    try:
        logits = [model(input_ids=t[None], use_cache=False).logits[0] for t in (tokens, other)]
    except Exception as error:
        raise WeightsError(f"{folder} does not run: {_line(error)}") from error
    before, after = (rows[:-1].float() for rows in logits)
    # Experts may compute the rows in other groups, which changes the rounding.
    tolerance = 1e-3 if logits[0].dtype == torch.float32 else 5e-2
    if float((before - after).abs().max()) > tolerance * float(before.std()):
        raise WeightsError(
            f"{folder}: what {type(model).__name__} predicts changes with the text after it, so "
            f"it is not a causal language model; use {_ACCEPTED}"
        )


def _line(error: Exception) -> str:
    """Return the first line of an error, which may have many."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
