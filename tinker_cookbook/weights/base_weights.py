"""The weight files of a base model: which weights they hold, and which of them an adapter means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import WeightsMergeError
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["BaseWeights"]

EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
)
_TRANSPOSING = ("gpt2", "openai-gpt")
"""Types of models whose files hold the matrices of their blocks as [in, out]."""
_WRAPPERS = ("model.", "language_model.", "text_model.", "transformer.")


class BaseWeights:
    """The safetensors files of a model folder.

    Attributes:
        folder: The folder.
        config: Its config.json.
        file_of: The file of every weight, by the weight's full name.
    """

    def __init__(self, folder: Path) -> None:
        """Read the names of all weights.

        Raises:
            WeightsMergeError: if the folder has no safetensors files.
        """
        from safetensors import safe_open

        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.file_of: dict[str, str] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self.file_of |= dict.fromkeys(opened.keys(), file.name)
        if not self.file_of:
            raise WeightsMergeError(f"{folder} has no *.safetensors files; give a complete model.")
        self._plain = {_unwrap(name.removesuffix(".weight")): name for name in self.file_of}

    @property
    def files(self) -> list[str]:
        """Names of the files, in order."""
        return sorted(set(self.file_of.values()))

    @property
    def is_tied(self) -> bool:
        """Whether the files hold no output embedding, because it is the input embedding."""
        return "lm_head.weight" not in self.file_of

    def is_transposed(self, weight: str) -> bool:
        """Whether a weight is stored as [in, out]."""
        return self.config.get("model_type") in _TRANSPOSING and ".h." in f".{weight}"

    @property
    def embedding(self) -> str:
        """Name of the input embedding.

        Raises:
            WeightsMergeError: if there is none under a known name.
        """
        for name in EMBEDDING_NAMES:
            if name in self.file_of:
                return name
        raise WeightsMergeError(
            f"{self.folder} has no weight named {EMBEDDING_NAMES[0]}, which an adapter of lm_head "
            "needs because the model has no lm_head.weight."
        )

    def find(self, adapted: Iterable[str]) -> dict[str, str]:
        """Return the full name of the base weight that each adapted module means.

        A tied `lm_head` is found as `lm_head.weight` although the files do not hold it.

        Raises:
            WeightsMergeError: naming a module that the model does not have.
        """
        return {module: self._find_one(module) for module in adapted}

    def _find_one(self, module: str) -> str:
        if f"{module}.weight" in self.file_of:
            return f"{module}.weight"
        if module == "lm_head":
            return "lm_head.weight"
        found = self._plain.get(_unwrap(module))
        if found is None:
            near = nearest_name(module, [name.removesuffix(".weight") for name in self.file_of])
            hint = f" The nearest name there is {near}." if near else ""
            raise WeightsMergeError(
                f"the adapter adapts {module}, which the model in {self.folder} does not have as a "
                f"separate weight; use the base model that the adapter was trained on.{hint}"
            )
        return found


def _unwrap(name: str) -> str:
    """Remove the outer modules that differ between versions of a model class."""
    while (shorter := _without_wrapper(name)) != name:
        name = shorter
    return name


def _without_wrapper(name: str) -> str:
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            return name.removeprefix(wrapper)
    return name
