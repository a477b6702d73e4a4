"""What is in memory and what waits on disk: runs and samplers that are not used move out and back.

A spilled run keeps everything that its next operation needs, bit for bit: parameters, gathered
gradient, moments and step count. The files belong to one process and are not meant to outlive it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinker_cookbook.local.engine.model.base_model import BaseModel
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.training.optimizer import AdamState
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.errors import UserError

__all__ = ["ResidentRun", "ResidentSampler", "SpillFolder"]

logger = logging.getLogger(__name__)


class SpillFolder:
    """Tensors on disk. Without a folder nothing is ever spilled."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.num_bytes = 0

    def write(self, tensors: dict[str, torch.Tensor]) -> Path | None:
        """Write tensors into a new file; None where that is not possible."""
        if self._folder is None:
            return None
        path = self._folder / f"{secrets.token_hex(16)}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
            self.num_bytes += path.stat().st_size
        # a full disk must not cost what is still in memory
        except (OSError, SafetensorError) as error:
            logger.warning("%s could not be written, so it stays in memory: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return path

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """The tensors of a file, which is removed.

        Raises:
            UserError: naming the file, if it is not there any more or damaged.
        """
        try:
            # Copies: what is mapped from a file has another alignment, which changes how products
            # round, and would hold on to the file.
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}, where an idle adapter was kept, cannot be read ({error}); continue from "
                "a saved checkpoint"
            ) from error
        self.remove(path)
        return tensors

    def remove(self, path: Path | None) -> None:
        """Delete a file whose tensors are not needed any more."""
        if path is not None and path.exists():
            self.num_bytes -= path.stat().st_size
            path.unlink(missing_ok=True)


@dataclass(eq=False)
class ResidentRun:
    """A training run, in memory or on disk."""

    model_name: str
    training: TrainingRun
    file: Path | None = None
    """Where its tensors are while they are not in memory."""
    last_used: float = field(default_factory=time.monotonic)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        training, state = self.training, self.training.adam_state
        tensors = [training.adapter.parameters, training.gradient]
        if state is not None:
            tensors += [state.exp_avg, state.exp_avg_sq]
        return 4 * sum(tensor.numel() for tensor in tensors if tensor is not None)

    def spill(self, folder: SpillFolder) -> bool:
        """Move the tensors to disk; False if they stay."""
        training, state = self.training, self.training.adam_state
        tensors = {"parameters": training.adapter.parameters}
        if training.gradient is not None:
            tensors["gradient"] = training.gradient
        if state is not None:
            tensors |= {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
            tensors["num_steps"] = torch.tensor([state.num_steps])
        self.file = folder.write(tensors)
        if self.file is None:
            return False
        training.adapter.parameters = training.adapter.parameters.new_empty(0)
        training.gradient = training.adam_state = None
        del training.model  # so that the model can be unloaded
        return True

    def restore(self, folder: SpillFolder, model: BaseModel) -> None:
        """Read the tensors back."""
        assert self.file is not None, "only a spilled run is restored"
        device = model.device
        tensors = {name: t.to(device) for name, t in folder.read(self.file).items()}
        training = self.training
        training.model = model
        training.adapter.parameters = tensors["parameters"]
        training.gradient = tensors.get("gradient")
        if "exp_avg" in tensors:
            state = AdamState(tensors["parameters"].new_empty(0))
            state.exp_avg, state.exp_avg_sq = tensors["exp_avg"], tensors["exp_avg_sq"]
            state.num_steps = int(tensors["num_steps"][0])
            training.adam_state = state
        self.file = None


@dataclass(eq=False)
class ResidentSampler:
    """What a sampler samples from: the base model, or an adapter in memory or on disk."""

    model_name: str
    adapter: StackedLora | None
    frozen: Adapter | None = None
    """The adapter without its tensor, while that is on disk."""
    file: Path | None = None
    last_used: float = field(default_factory=time.monotonic)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return 0 if self.adapter is None else self.adapter.num_bytes

    def spill(self, folder: SpillFolder) -> bool:
        """Move the weights to disk; False if they stay. Nothing may be sampling from them."""
        assert self.adapter is not None, "a base model's sampler holds nothing"
        adapter = self.adapter.adapter
        self.file = folder.write({"parameters": adapter.parameters})
        if self.file is None:
            return False
        adapter.parameters = adapter.parameters.new_empty(0)
        self.frozen, self.adapter = adapter, None
        return True

    def restore(self, folder: SpillFolder, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights back."""
        assert self.file is not None, "only a spilled sampler is restored"
        assert self.frozen is not None, "a spilled sampler has an adapter"
        self.frozen.parameters = folder.read(self.file)["parameters"].to(device)
        self.adapter = StackedLora(self.frozen, dtype)
        self.frozen = self.file = None
