"""Read a LoRA adapter folder, whichever Tinker service wrote it.

An adapter has two matrices for each adapted weight W [out, in]: A [rank, in] and B [out, rank]. The
adapted weight is W + scale * B A. Services name matrices differently; here they get the names of
the weights in the base model's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import WeightsAdapterError

if TYPE_CHECKING:
    import torch

__all__ = ["Adapter", "LoraMatrices", "open_adapter"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<weight>.+)\.lora_(?P<part>[AB])(?:\.default)?(?:\.weight)?")
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "use_dora": (),
    "bias": ("none",),
    "lora_bias": (),
    "modules_to_save": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "layer_replication": (),
    "megatron_config": (),
    # These change the base model's weights when training starts.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}
"""Settings of PEFT that change what an adapter is, and the values that do not."""
_FROZEN_COPY = ".base_layer.weight"
"""PEFT adds the frozen weight to the file if the adapter adapts an embedding."""
_OTHER_NAMES = {"model.unembed_tokens": "lm_head", "unembed_tokens": "lm_head"}
"""Names of modules in adapters of the hosted service, and those of transformers."""
_EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""The three matrices of an expert, as adapters of the hosted service name them."""


@dataclass(frozen=True)
class LoraMatrices:
    """The update of one weight."""

    a: torch.Tensor
    """float32 [rank, in]."""
    b: torch.Tensor
    """float32 [out, rank]."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter."""

    folder: Path
    rank: int
    alpha: float
    base_model: str
    """Base model named in its configuration; empty if none is."""
    matrices: Mapping[str, LoraMatrices]
    """By the name of the adapted weight without `.weight`, e.g. `model.layers.0.mlp.up_proj`."""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank


@contextmanager
def open_adapter(folder: str | Path) -> Iterator[Adapter]:
    """Open an adapter folder; its matrices are in memory inside the block.

    Raises:
        WeightsAdapterError: if a file is missing or damaged, or a matrix has no partner.
    """
    path = Path(folder).expanduser()
    config = _read_config(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise WeightsAdapterError(
            f"{path / CONFIG_FILE}: r={rank!r} and lora_alpha={alpha!r} must be positive numbers."
        )
    _refuse_other_methods(config, path / CONFIG_FILE)
    if config.get("use_rslora"):  # the factor of B A is alpha / sqrt(r)
        alpha *= rank**0.5
    matrices = _pair_matrices(_read_tensors(path), path)
    base = config.get("base_model_name_or_path") or ""
    yield Adapter(path, rank, float(alpha), str(base), matrices)


def _refuse_other_methods(config: Mapping[str, object], path: Path) -> None:
    """Refuse configurations under which the weights are not W + scale * B A."""
    method = config.get("peft_type", "LORA")
    if method != "LORA":
        raise WeightsAdapterError(f"{path}: peft_type={method!r} is not supported; only LORA is.")
    for key, plain in _PLAIN.items():
        value = config.get(key)
        if value and value not in plain:
            raise WeightsAdapterError(
                f"{path}: {key}={value!r} is not supported; only plain LoRA matrices of one rank "
                "and scale are. Train the adapter without it, or merge it into its base model with "
                "PEFT first."
            )


def _read_config(folder: Path) -> dict[str, object]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsAdapterError(
            f"{folder / CONFIG_FILE} cannot be read ({error.strerror}); give the folder of a LoRA "
            "adapter, as `tinker checkpoint download` writes it."
        ) from error
    except ValueError as error:
        raise WeightsAdapterError(f"{folder / CONFIG_FILE} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise WeightsAdapterError(f"{folder / CONFIG_FILE} is not a JSON object.")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise WeightsAdapterError(f"{folder / WEIGHTS_FILE} cannot be read: {error}.") from error


def _pair_matrices(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, LoraMatrices]:
    """Return A and B of every adapted weight."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_FROZEN_COPY):
            continue
        found = _PART.fullmatch(name.removeprefix(_PEFT_PREFIX))
        if found is None:
            raise WeightsAdapterError(
                f"{folder / WEIGHTS_FILE}: {name!r} is not part of a LoRA matrix."
            )
        for weight, part in _split_experts(_rename(found["weight"]), tensor.float()):
            halves.setdefault(weight, {})[found["part"]] = part
    _share_single_experts(halves)
    for weight, parts in halves.items():
        if set(parts) != {"A", "B"}:
            raise WeightsAdapterError(
                f"{folder / WEIGHTS_FILE}: {weight} has only matrix {', '.join(parts)}."
            )
    return {weight: LoraMatrices(parts["A"], parts["B"]) for weight, parts in halves.items()}


def _rename(weight: str) -> str:
    return _OTHER_NAMES.get(weight, weight)


def _split_experts(weight: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of a stack [experts, ., .] under the names of single experts."""
    if tensor.ndim == 2:
        yield weight, tensor
        return
    stem, _, part = weight.rpartition(".")
    if tensor.ndim != 3 or part not in _EXPERT_PARTS:
        raise WeightsAdapterError(f"{weight} has the shape {tuple(tensor.shape)}; need a matrix.")
    for number, matrix in enumerate(tensor):
        # A stack of one is shared by all experts; `_share_single_experts` copies it.
        place = "*" if len(tensor) == 1 else str(number)
        yield f"{stem}.{place}.{_EXPERT_PARTS[part]}", matrix


def _share_single_experts(halves: dict[str, dict[str, torch.Tensor]]) -> None:
    """Give every expert the matrix that all experts of a layer share."""
    for shared in [name for name in halves if ".*." in name]:
        stem, _, part = shared.partition(".*.")
        single = re.compile(re.escape(stem) + r"\.\d+\." + re.escape(part))
        for name in halves:
            if single.fullmatch(name):
                halves[name] = {**halves[shared], **halves[name]}
        del halves[shared]
