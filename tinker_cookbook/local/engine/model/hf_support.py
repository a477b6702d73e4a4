"""Which models can run through transformers: asked of the configuration, then of the loaded model.

Attention to both sides would give a loss and samples that mean nothing without any error, so that a
model shows at load that its predictions do not change with what comes after them.
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
"""Tokens that a loaded model is tried with."""


def read_hf_config(folder: Path) -> Any:
    """The configuration of a model folder that transformers can run as a causal language model.

    Raises:
        WeightsError: in one line, if it is anything else.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as names

    raw = read_config_json(folder)
    kind = raw.get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configurations check what they like
        raise WeightsError(f"{folder} cannot be read by transformers: {_line(error)}") from error
    if has_vision(raw):
        return config
    refusal = None
    if config.is_encoder_decoder:
        refusal = "has an encoder besides its decoder"
    elif kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder"):
        refusal = "fills in masks and reads the text on both sides of them"
    elif kind not in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        refusal = "is no causal language model that this version of transformers has"
    if refusal is not None:
        raise WeightsError(f"{folder}: a model of type {kind!r} {refusal}; use {_ACCEPTED}")
    _check_keeps_keys(folder, config)
    return config


def _check_keeps_keys(folder: Path, config: Any) -> None:
    """Refuse models without any attention, which go on from a state instead of keys and values."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=config.get_text_config()).get_seq_length()
    except ValueError as error:
        raise WeightsError(
            f"{folder}: a model of type {config.model_type!r} keeps a state instead of keys and "
            f"values, which is not supported; use {_ACCEPTED}"
        ) from error


def model_on_meta(folder: Path) -> Any:
    """The model with all its modules and shapes, and without any numbers.

    Raises:
        WeightsError: as `read_hf_config`, or if transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = read_hf_config(folder)
    reads_images = has_vision(read_config_json(folder))
    loader = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the numbers, of which there are none
            model = loader.from_config(config)
    except Exception as error:
        raise WeightsError(f"transformers cannot build {folder}: {_line(error)}") from error
    check_cache(folder, model)
    return model


def check_cache(folder: Path, model: Any) -> None:
    """Refuse a model whose forward pass takes no cache.

    Raises:
        WeightsError: in one line.
    """
    names = inspect.signature(model.forward).parameters
    if not {"past_key_values", "cache"} & set(names):
        raise WeightsError(
            f"{folder}: {type(model).__name__} does not go on from keys and values, which sampling "
            f"needs; use {_ACCEPTED}"
        )


@torch.no_grad()
def check_is_causal(folder: Path, model: Any) -> None:
    """Compare what a loaded text model predicts before a token when only that token changes.

    Raises:
        WeightsError: if it changes, or the model does not run.
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
    # experts may compute rows in other groups, which changes how they round
    tolerance = 1e-3 if logits[0].dtype == torch.float32 else 5e-2
    if float((before - after).abs().max()) > tolerance * float(before.std()):
        raise WeightsError(
            f"{folder}: what {type(model).__name__} predicts changes with the text behind it, so "
            f"it is no causal language model; use {_ACCEPTED}"
        )


def _line(error: Exception) -> str:
    """The first line of an error, which may go on for pages."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
