"""LoRA adapters: `W' = W + (alpha / rank) B A`, with PEFT's names and file format.

All parameters of an adapter are in one flat float32 tensor, so a gradient norm, an Adam step, a
snapshot and a conversion to bfloat16 are each one operation. The A matrices of a group (modules
that read the same input) are adjacent and serve as one stacked matrix:

    flat = [ A of group 1 | B of its modules | A of group 2 | ... ]   each part aligned to 64 bytes

An adapter on the unembedding is an adapter on `lm_head`, as in PEFT. Where the model ties it to the
input embedding, only the output side is adapted and the frozen matrix stays shared, so merging such
an adapter into the weights unties them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinker_cookbook.local.engine.model.adapter_origin import WeightsOrigin
from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.number_formats import FULL
from tinker_cookbook.local.engine.model.weights import BLOCKS, FUSED, module_shapes
from tinker_cookbook.local.engine.types import LoraSpec
from tinker_cookbook.local.errors import StorageError, UserError
from tinker_cookbook.local.limits import LORA_ALPHA, LORA_DROPOUT, RANK, check_ranges
from tinker_cookbook.utils.durable_files import flush_folder, write_durably

__all__ = [
    "HEAD_PATH",
    "Adapter",
    "AdapterLayout",
    "LoraTarget",
    "layer_group",
    "lora_targets",
    "peft_tensor_name",
    "read_base_format",
    "read_base_model_name",
    "read_lora_spec",
    "write_tensors",
]

HEAD_PATH = "lm_head"
_ALIGNMENT = 16
_BASE_MODEL_KEY = "base_model"
_BASE_FORMAT_KEY = "base_format"


@dataclass(frozen=True)
class LoraTarget:
    """One linear module that gets an A [rank, in] and a B [out, rank]."""

    path: str
    """Name inside the model, e.g. `model.layers.0.self_attn.q_proj`."""
    out_features: int
    in_features: int
    group: str
    """Modules of one group read the same input; their A matrices are stacked."""
    part: str
    """The switch of `LoraSpec` that it belongs to: `attn`, `mlp` or `unembed`."""

    def num_parameters(self, rank: int) -> int:
        """Return the number of parameters of A and B."""
        return rank * (self.in_features + self.out_features)


def layer_group(index: int, name: str) -> str:
    """Return the group name of a stacked matrix (`name` is a key of `weights.FUSED`) in a block."""
    return f"{index}.{name}"


def lora_targets(arch: ArchConfig, spec: LoraSpec) -> tuple[LoraTarget, ...]:
    """Return the modules that `spec` trains on an architecture that the engine runs itself."""
    shapes = module_shapes(arch)
    wanted = {"attn": spec.train_attn, "mlp": spec.train_mlp}
    targets = []
    for index in range(arch.num_layers):
        for name, modules in FUSED.items():
            part = "mlp" if BLOCKS[name] == "mlp" else "attn"
            if not wanted[part]:
                continue
            for module in modules:
                path = f"model.layers.{index}.{BLOCKS[name]}.{module}"
                targets.append(LoraTarget(path, *shapes[module], layer_group(index, name), part))
    if spec.train_unembed:
        targets.append(
            LoraTarget(HEAD_PATH, arch.vocab_size, arch.hidden_size, HEAD_PATH, "unembed")
        )
    return tuple(targets)


def check_lora_spec(spec: LoraSpec) -> None:
    """Refuse a rank out of range and a spec that trains nothing."""
    check_ranges(spec, {"rank": RANK, "alpha": LORA_ALPHA, "dropout": LORA_DROPOUT})
    if not (spec.train_mlp or spec.train_attn or spec.train_unembed):
        raise UserError(
            "train_mlp, train_attn and train_unembed are all false, so nothing would be trained; "
            "set at least one"
        )


class AdapterLayout:
    """The positions of the matrices in the flat parameter tensor."""

    def __init__(self, targets: Sequence[LoraTarget], rank: int) -> None:
        self.targets = tuple(targets)
        self.rank = rank
        self.groups: dict[str, list[LoraTarget]] = {}
        for target in self.targets:
            self.groups.setdefault(target.group, []).append(target)
        # (offset, shape) of `PATH.A`, `PATH.B`, and of the stacked A of each group
        self.slices: dict[str, tuple[int, tuple[int, int]]] = {}
        self.group_slices: dict[str, tuple[int, tuple[int, int]]] = {}
        offset = 0
        for group, members in self.groups.items():
            width = members[0].in_features
            self.group_slices[group] = (offset, (rank * len(members), width))
            for target in members:
                self.slices[target.path + ".A"] = (offset, (rank, width))
                offset += rank * width
            offset = _align(offset)
            for target in members:
                self.slices[target.path + ".B"] = (offset, (target.out_features, rank))
                offset = _align(offset + target.out_features * rank)
        self.num_elements = offset

    @property
    def num_bytes(self) -> int:
        """Memory of the parameters in bytes."""
        return 4 * self.num_elements

    def matrix(self, flat: torch.Tensor, key: str) -> torch.Tensor:
        """Return a view of `PATH.A` or `PATH.B` in a tensor with this layout."""
        return _view(flat, self.slices[key])

    def stacked_a(self, flat: torch.Tensor, group: str) -> torch.Tensor:
        """Return a view [rank * members, in] of the A matrices of a group."""
        return _view(flat, self.group_slices[group])


def _align(offset: int) -> int:
    return (offset + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _view(flat: torch.Tensor, place: tuple[int, tuple[int, int]]) -> torch.Tensor:
    offset, (rows, columns) = place
    return flat[offset : offset + rows * columns].view(rows, columns)


class Adapter:
    """The weights of one adapter, without gradient and optimizer state."""

    def __init__(
        self, spec: LoraSpec, targets: Sequence[LoraTarget], *, device: torch.device | str = "cpu"
    ) -> None:
        """Make a new adapter: A uniform in +-1/sqrt(in) by `spec.seed`, B zero."""
        check_lora_spec(spec)
        self.spec = spec
        self.layout = AdapterLayout(targets, spec.rank)
        self.parameters = torch.zeros(self.layout.num_elements, device=device)
        self.version = 0
        """A count that increases whenever the weights change."""
        seed = spec.seed if spec.seed is not None else int.from_bytes(os.urandom(8), "little")
        generator = torch.Generator().manual_seed(seed % 2**63)
        for target in targets:
            bound = target.in_features**-0.5
            values = torch.empty(spec.rank, target.in_features)
            values.uniform_(-bound, bound, generator=generator)
            self.a(target.path).copy_(values)

    @property
    def rank(self) -> int:
        return self.spec.rank

    @property
    def scale(self) -> float:
        """The factor of `B A`."""
        return self.spec.alpha / self.spec.rank

    @property
    def targets(self) -> tuple[LoraTarget, ...]:
        return self.layout.targets

    def group(self, name: str) -> list[LoraTarget]:
        """Return the trained modules of a group, top to bottom; empty where it is not trained."""
        return self.layout.groups.get(name, [])

    def a(self, path: str) -> torch.Tensor:
        """Return A as a view, float32 [rank, in]."""
        return self.layout.matrix(self.parameters, path + ".A")

    def b(self, path: str) -> torch.Tensor:
        """Return B as a view, float32 [out, rank], without the scale."""
        return self.layout.matrix(self.parameters, path + ".B")

    def stacked_a(self, group: str) -> torch.Tensor:
        """Return the stacked A of a group as a view, float32 [rank * members, in]."""
        return self.layout.stacked_a(self.parameters, group)

    def snapshot(self) -> Adapter:
        """Return a copy that later training does not change."""
        copy = Adapter.__new__(Adapter)
        copy.spec, copy.layout, copy.version = self.spec, self.layout, self.version
        copy.parameters = self.parameters.clone()
        return copy

    def save_peft(
        self,
        folder: Path,
        *,
        base_model_name: str,
        origin: WeightsOrigin,
        base_format: str = FULL,
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors, flushed to the disk.

        Args:
            base_model_name: the service's name of the base model.
            origin: where others find the base model.
            base_format: how the base weights were stored in training.
        """
        tensors = {}
        for target in self.targets:
            tensors[peft_tensor_name(target.path, "A")] = self.a(target.path)
            tensors[peft_tensor_name(target.path, "B")] = self.b(target.path)
        # This goes into the tensor file, as PEFT warns about unknown keys in adapter_config.json.
        parts = ",".join(sorted({target.part for target in self.targets}))
        metadata = {"format": "pt", "trained_parts": parts, _BASE_MODEL_KEY: base_model_name}
        if base_format != FULL:
            metadata[_BASE_FORMAT_KEY] = base_format
        write_tensors(folder / "adapter_model.safetensors", tensors, metadata)
        config = _peft_config(self.spec, self.targets, origin)
        write_durably(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        flush_folder(folder)

    def load_peft(self, folder: Path) -> None:
        """Load the weights of a saved adapter with the same rank and modules.

        Raises:
            UserError: if the rank or the set of modules differs, or the file is damaged.
        """
        saved = read_lora_spec(folder)
        if saved.rank != self.rank:
            raise UserError(
                f"the checkpoint has LoRA rank {saved.rank} and this run rank {self.rank}; "
                "load it into a run of the same rank"
            )
        values = torch.zeros_like(self.parameters)
        wanted = {peft_tensor_name(t.path, side): t for t in self.targets for side in "AB"}
        with _open_tensors(folder / "adapter_model.safetensors") as file:
            _check_names(set(file.keys()), set(wanted))
            for target in self.targets:
                for side in "AB":
                    tensor = file.get_tensor(peft_tensor_name(target.path, side))
                    place = self.layout.matrix(values, f"{target.path}.{side}")
                    if tensor.shape != place.shape:
                        raise UserError(
                            f"the checkpoint's {target.path} lora_{side} has shape "
                            f"{tuple(tensor.shape)}; this model needs {tuple(place.shape)}"
                        )
                    place.copy_(tensor)
        self.parameters.copy_(values)
        self.spec = LoraSpec(
            rank=self.spec.rank,
            seed=self.spec.seed,
            train_mlp=self.spec.train_mlp,
            train_attn=self.spec.train_attn,
            train_unembed=self.spec.train_unembed,
            alpha=saved.alpha,
            dropout=self.spec.dropout,
        )
        self.version += 1


def peft_tensor_name(path: str, side: str) -> str:
    """Return PEFT's name of a matrix in adapter_model.safetensors; `side` is `A` or `B`."""
    return f"base_model.model.{path}.lora_{side}.weight"


def _peft_config(
    spec: LoraSpec, targets: Sequence[LoraTarget], origin: WeightsOrigin
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.source,
        "revision": origin.revision,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({target.path.rsplit(".", 1)[-1] for target in targets}),
    }


def read_lora_spec(folder: Path) -> LoraSpec:
    """Return the rank, alpha, dropout and trained parts of a saved adapter.

    Raises:
        UserError: if the folder holds no readable adapter.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        dropout = float(config.get("lora_dropout", 0.0))
        modules = set(config["target_modules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's adapter_config.json is not readable: {error}") from error
    with _open_tensors(folder / "adapter_model.safetensors") as file:
        metadata = file.metadata() or {}
    parts = metadata.get("trained_parts", ",".join(map(_part_of_module, modules))).split(",")
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        train_attn="attn" in parts,
        train_mlp="mlp" in parts,
        train_unembed="unembed" in parts,
    )


def read_base_model_name(folder: Path) -> str:
    """Return the service's name of the base model of a saved adapter.

    Raises:
        UserError: if the folder holds no readable adapter.
    """
    with _open_tensors(folder / "adapter_model.safetensors") as file:
        name = (file.metadata() or {}).get(_BASE_MODEL_KEY)
    if name is not None:
        return name
    path = folder / "adapter_config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint's {path.name} is not readable: {error}") from error


def read_base_format(folder: Path) -> str:
    """Return how the base weights were stored when a saved adapter was trained.

    Raises:
        UserError: if the folder holds no readable adapter.
    """
    with _open_tensors(folder / "adapter_model.safetensors") as file:
        return (file.metadata() or {}).get(_BASE_FORMAT_KEY, FULL)


def _part_of_module(module: str) -> str:
    """Return the part of a module, for adapters that PEFT itself saved."""
    if module == HEAD_PATH:
        return "unembed"
    return "mlp" if module in FUSED["gate_up"] + FUSED["down"] else "attn"


def _open_tensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} of the checkpoint is not readable: {error}") from error


def _check_names(found: set[str], wanted: set[str]) -> None:
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing or extra:
        difference = f"lacks {missing[0]}" if missing else f"also has {extra[0]}"
        raise UserError(
            f"the checkpoint was trained on other modules than this run: it {difference}; create "
            "the run with the same train_attn, train_mlp and train_unembed"
        )


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file and flush it to the disk.

    Raises:
        StorageError: naming the file, if it cannot be written.
    """
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata=metadata,
        )
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written: {error}; free some space") from error
