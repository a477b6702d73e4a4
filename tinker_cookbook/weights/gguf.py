"""Write a checkpoint as GGUF, the format of llama.cpp and of Ollama.

llama.cpp's own converter writes the file from a merged model, or from a PEFT adapter. So names,
tokenizer and chat template are the ones that llama.cpp expects.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.model_files import resolve_model_folder
from tinker_cookbook.weights.adapter import build_lora_adapter
from tinker_cookbook.weights.base_weights import BaseWeights
from tinker_cookbook.weights.gguf_limits import check_llama_cpp_computes
from tinker_cookbook.weights.llama_tools import (
    ADAPTER_CONVERTER,
    MODEL_CONVERTER,
    find_quantiser,
    run_converter,
)
from tinker_cookbook.weights.merge import build_hf_model
from tinker_cookbook.weights.output_folder import complete_folder

__all__ = ["QUANTISATIONS", "Quantisation", "build_gguf", "build_gguf_adapter", "find_gguf"]


@dataclass(frozen=True)
class Quantisation:
    """A number format of a GGUF file."""

    converted: str
    """Format that the converter writes."""
    number: int | None = None
    """llama.cpp's number of the final format; None if the converter writes it."""


QUANTISATIONS = {
    "f32": Quantisation("f32"),
    "f16": Quantisation("f16"),
    "bf16": Quantisation("bf16"),
    "q8_0": Quantisation("q8_0"),
    "q6_k": Quantisation("f32", 18),
    "q5_k_m": Quantisation("f32", 17),
    "q4_k_m": Quantisation("f32", 15),
    "q4_0": Quantisation("f32", 2),
}
ADAPTER_FORMATS = ("f32", "f16", "bf16", "q8_0")


def build_gguf(
    *,
    base_model: str,
    adapter_path: str,
    output_path: str,
    quantisation: str = "q8_0",
    llama_cpp: str | None = None,
) -> Path:
    """Write the base model with the adapter merged into it as one GGUF file.

    Weights are merged in float32 and rounded once, to the final format. The disk must have room for
    the merged float32 model next to the output (twice for the formats that are quantised
    afterwards); it is deleted at the end.

    Args:
        base_model: Name or folder of the model that the adapter was trained on.
        adapter_path: Folder of the adapter.
        output_path: Folder to create.
        quantisation: Name in `QUANTISATIONS`. The formats below 8 bits need llama.cpp's quantiser.
        llama_cpp: Folder of llama.cpp whose converter is used; default: the packaged one.

    Returns:
        The file.

    Raises:
        ConfigurationError: if the format is unknown, the quantiser is missing, or the output folder
            is not empty.
        WeightsError: if the adapter cannot be merged, or llama.cpp cannot convert the model or
            would compute it in another way.
    """
    chosen = QUANTISATIONS.get(quantisation)
    if chosen is None:
        raise ConfigurationError(
            f"quantisation={quantisation!r} is unknown; use one of {', '.join(QUANTISATIONS)}."
        )
    quantiser = None if chosen.number is None else find_quantiser(llama_cpp)
    _check_base(base_model)
    name = f"{_short_name(base_model)}-{quantisation.upper()}.gguf"
    with complete_folder(output_path) as output:
        merged = output / "merged"
        build_hf_model(
            base_model=base_model,
            adapter_path=adapter_path,
            output_path=str(merged),
            dtype="float32",
        )
        converted = output / ("converted.gguf" if quantiser else name)
        arguments = [str(merged), "--outfile", str(converted), "--outtype", chosen.converted]
        arguments += ["--model-name", _short_name(base_model)]
        run_converter(MODEL_CONVERTER, arguments, llama_cpp)
        shutil.rmtree(merged)
        if quantiser is not None and chosen.number is not None:
            quantiser.run(converted, output / name, chosen.number, quantisation.upper())
            converted.unlink()
    return Path(output_path).expanduser() / name


def build_gguf_adapter(
    *,
    base_model: str,
    adapter_path: str,
    output_path: str,
    quantisation: str = "f32",
    llama_cpp: str | None = None,
) -> Path:
    """Write the adapter alone as a GGUF file, to be loaded next to a GGUF file of the base model.

    Args:
        base_model: Name or folder of the model that the adapter was trained on.
        adapter_path: Folder of the adapter.
        output_path: Folder to create.
        quantisation: f32, f16, bf16 or q8_0.
        llama_cpp: Folder of llama.cpp whose converter is used; default: the packaged one.

    Returns:
        The file.

    Raises:
        ConfigurationError: if the format is not one of these, or the output folder is not empty.
        WeightsError: if the adapter does not fit, adapts lm_head, or cannot be converted.
    """
    if quantisation not in ADAPTER_FORMATS:
        raise ConfigurationError(
            f"quantisation={quantisation!r} is not a format of adapters; use one of "
            f"{', '.join(ADAPTER_FORMATS)}."
        )
    name = f"{_short_name(base_model)}-adapter-{quantisation.upper()}.gguf"
    base = _check_base(base_model)
    with complete_folder(output_path) as output:
        peft = output / "peft"
        build_lora_adapter(base_model=base_model, adapter_path=adapter_path, output_path=str(peft))
        arguments = [str(peft), "--base", str(base), "--outfile", str(output / name)]
        run_converter(ADAPTER_CONVERTER, [*arguments, "--outtype", quantisation], llama_cpp)
        shutil.rmtree(peft)
    return Path(output_path).expanduser() / name


def convert_base(
    base_model: str | Path, file: Path, quantisation: str = "f32", llama_cpp: str | None = None
) -> Path:
    """Convert a model folder to a GGUF file in one of `ADAPTER_FORMATS`, and return the file."""
    folder = resolve_model_folder(str(base_model))
    arguments = [str(folder), "--outfile", str(file), "--outtype", quantisation]
    run_converter(MODEL_CONVERTER, arguments, llama_cpp)
    return file


def find_gguf(folder: str | Path) -> Path | None:
    """Return the GGUF file of an exported folder; None if it has none."""
    files = sorted(Path(folder).glob("*.gguf"))
    return files[0] if files else None


def _check_base(base_model: str) -> Path:
    """Return the folder of a model that llama.cpp computes as the service does."""
    folder = resolve_model_folder(base_model)
    check_llama_cpp_computes(folder, BaseWeights(folder).config)
    return folder


def _short_name(base_model: str) -> str:
    return Path(base_model.rstrip("/")).name
