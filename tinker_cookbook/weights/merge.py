"""Merge a LoRA adapter into its base model: a folder that transformers, vLLM and SGLang load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tinker_cookbook.exceptions import ConfigurationError, WeightsMergeError
from tinker_cookbook.model_files import resolve_model_folder
from tinker_cookbook.weights.adapter_files import Adapter, LoraMatrices, open_adapter
from tinker_cookbook.weights.base_weights import BaseWeights
from tinker_cookbook.weights.output_folder import complete_folder
from tinker_cookbook.weights.tensor_writer import TensorShape, write_tensor_file

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

__all__ = ["build_hf_model", "copy_small_files"]

KINDS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of the number formats in safetensors files."""
DTYPES = tuple(KINDS)
HEAD = "lm_head.weight"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
NOT_COPIED = ("config.json", "model.safetensors.index.json")


def build_hf_model(
    *,
    base_model: str,
    adapter_path: str,
    output_path: str,
    dtype: str = "bfloat16",
    trust_remote_code: bool | None = None,
    merge_strategy: str = "auto",
    dequantize: bool = False,
    quantize: str | None = None,
    serving_format: str | None = None,
    device: str | None = None,
) -> None:
    """Write the base model with the adapter merged into it.

    Each weight becomes W + scale * B A, computed in float32 and rounded once. One weight of the
    base model is in memory at a time. If the adapter changes the output embedding of a model that
    ties it to the input embedding, the copy has a separate output embedding and is not tied.

    Args:
        base_model: Name or folder of the model that the adapter was trained on.
        adapter_path: Folder of the adapter.
        output_path: Folder to create.
        dtype: Number format of the result: bfloat16, float16 or float32.
        trust_remote_code: Accepted for older programs; no code of a model is run here.
        merge_strategy: `auto` or `shard`, which are the same here.
        dequantize: Not supported; quantized base models are refused.
        quantize: Not supported.
        serving_format: Not supported.
        device: Device of the products, such as `cuda`; default: the CPU.

    Raises:
        ConfigurationError: if an option is not supported, or the output folder is not empty.
        WeightsAdapterError: if the adapter cannot be read.
        WeightsMergeError: if adapter and base model do not fit.
    """
    _check_options(dtype, merge_strategy, dequantize, quantize, serving_format)
    base = BaseWeights(resolve_model_folder(base_model))
    if "quantization_config" in base.config:
        raise WeightsMergeError(
            f"{base_model} is quantized; merge into its unquantized original instead."
        )
    with complete_folder(output_path) as output, open_adapter(adapter_path) as adapter:
        targets = base.find(adapter.matrices)
        updates = {targets[module]: matrices for module, matrices in adapter.matrices.items()}
        merger = _Merger(base, adapter, updates, dtype, device or "cpu")
        merger.write_weights(output)
        copy_small_files(base.folder, output)
        _write_config(base, output, dtype, untie=HEAD in updates)


def _check_options(
    dtype: str,
    merge_strategy: str,
    dequantize: bool,
    quantize: str | None,
    serving_format: str | None,
) -> None:
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
    if merge_strategy not in ("auto", "shard"):
        raise ConfigurationError(
            f"merge_strategy={merge_strategy!r} is not supported; use 'auto', which merges file by "
            "file."
        )
    for name, value in (
        ("dequantize", dequantize),
        ("quantize", quantize),
        ("serving_format", serving_format),
    ):
        if value:
            raise ConfigurationError(
                f"{name}={value!r} is not supported; merge in bfloat16 and quantize the result "
                "with the tools of your inference engine."
            )


class Slice(Protocol):
    """A tensor in a safetensors file, not read yet."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class _Merger:
    """Writes the files of a merged model."""

    def __init__(
        self,
        base: BaseWeights,
        adapter: Adapter,
        updates: Mapping[str, LoraMatrices],
        dtype: str,
        device: str,
    ) -> None:
        import torch

        self._base = base
        self._scale = adapter.scale
        self._updates = updates
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device

    def write_weights(self, output: Path) -> None:
        """Write all files and, if there are several, their index."""
        files = {source: self._shapes_in(source) for source in self._base.files}
        if self._base.is_tied and HEAD in self._updates:
            files[""] = {HEAD: self._shape_of(self._base.embedding)}
        index, total = {}, 0
        for number, (source, shapes) in enumerate(files.items(), 1):
            # A file named model.safetensors would be taken for the whole model.
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            name = name if len(files) > 1 else "model.safetensors"
            tensors = self._merge_file(source, shapes) if source else self._merge_head()
            total += write_tensor_file(output / name, shapes, tensors)
            index |= dict.fromkeys(shapes, name)
        if len(files) > 1:
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
            (output / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _open(self, name: str) -> safe_open:
        from safetensors import safe_open

        return safe_open(self._base.folder / name, framework="pt")

    def _shapes_in(self, name: str) -> dict[str, TensorShape]:
        """Return the tensors of a file as they will be written; reads no numbers."""
        with self._open(name) as opened:
            return {weight: self._written(opened.get_slice(weight)) for weight in opened.keys()}  # noqa: SIM118  (not a mapping)

    def _shape_of(self, weight: str) -> TensorShape:
        with self._open(self._base.file_of[weight]) as opened:
            return self._written(opened.get_slice(weight))

    def _written(self, found: Slice) -> TensorShape:
        kind = found.get_dtype()
        is_float = kind.startswith(("F", "BF"))
        return TensorShape(KINDS[self._dtype_name] if is_float else kind, (*found.get_shape(),))

    def _merge_head(self) -> Iterator[torch.Tensor]:
        """Yield the output embedding of a model whose files hold only the input embedding."""
        weight = self._base.embedding
        with self._open(self._base.file_of[weight]) as opened:
            yield self._merged(HEAD, opened.get_tensor(weight))

    def _merge_file(self, name: str, weights: Iterable[str]) -> Iterator[torch.Tensor]:
        with self._open(name) as opened:
            for weight in weights:
                yield self._merged(weight, opened.get_tensor(weight))

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of the result, contiguous and in its number format."""
        update = self._updates.get(name)
        if update is not None:
            product = update.b.to(self._device) @ update.a.to(self._device)
            product = product.T if self._base.is_transposed(name) else product
            if weight.shape != product.shape:
                raise WeightsMergeError(
                    f"{name} is {list(weight.shape)} in the base model, and the adapter's update "
                    f"is {list(product.shape)}; use the base model that the adapter was trained on."
                )
            weight = (weight.to(self._device).float() + self._scale * product).cpu()
        if weight.is_floating_point():
            weight = weight.to(self._dtype)
        return weight.contiguous()


def copy_small_files(source: Path, output: Path) -> None:
    """Copy tokenizer, chat template and generation settings."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in NOT_COPIED:
                shutil.copyfile(file, output / file.name)


def _write_config(base: BaseWeights, output: Path, dtype: str, *, untie: bool) -> None:
    """Write config.json with the number format and, if needed, untied embeddings."""
    config = dict(base.config)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype
    if "torch_dtype" not in config and "dtype" not in config:
        config["torch_dtype"] = dtype
    if untie:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    text = json.dumps(config, indent=2) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")
