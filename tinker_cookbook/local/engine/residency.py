"""What is in memory: models, runs and samplers, and the idle ones that are spilled to disk.

A spilled run keeps everything that its next operation needs, bit for bit: parameters, accumulated
gradient, moments and step count. The files belong to one process and are useless after it ends.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinker_cookbook.local.engine.budget import RECENT_SAMPLERS_PER_RUN
from tinker_cookbook.local.engine.loaded_model import LoadedModel
from tinker_cookbook.local.engine.memory import return_freed_memory
from tinker_cookbook.local.engine.model.base_model import BaseModel
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.training.moments import moments_of
from tinker_cookbook.local.engine.training.optimizer import AdamState
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.errors import UserError

__all__ = ["ResidentRun", "ResidentSampler", "Residents", "SpillFolder", "format_size"]

logger = logging.getLogger(__name__)


class SpillFolder:
    """Files of tensors. Without a folder nothing is ever spilled."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.num_bytes = 0

    def write(self, tensors: dict[str, torch.Tensor]) -> Path | None:
        """Write tensors to a new file and return its path; None where that fails."""
        if self._folder is None:
            return None
        path = self._folder / f"{secrets.token_hex(16)}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
            self.num_bytes += path.stat().st_size
        # if the disk is full, nothing in memory is lost
        except (OSError, SafetensorError) as error:
            logger.warning(
                "%s could not be written, so the adapter stays in memory: %s", path, error
            )
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return path

    def read(self, path: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a file and remove it.

        Raises:
            UserError: naming the file, if it is missing or damaged.
        """
        try:
            # Copies: memory that is mapped from a file has another alignment, which changes how
            # products round, and would keep the file open.
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}, the file of an idle adapter, cannot be read ({error}); continue from a "
                "saved checkpoint"
            ) from error
        self.remove(path)
        return tensors

    def remove(self, path: Path | None) -> None:
        """Delete a file whose tensors are no longer needed, if there is one."""
        if path is not None and path.exists():
            self.num_bytes -= path.stat().st_size
            path.unlink(missing_ok=True)


@dataclass(eq=False)
class ResidentRun:
    """A training run, in memory or on disk."""

    model_name: str
    training: TrainingRun
    file: Path | None = None
    """The file of its tensors while they are on disk."""
    last_used: float = field(default_factory=time.monotonic)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def spill(self, folder: SpillFolder) -> bool:
        """Move the tensors to disk; return False if they stay in memory."""
        training, tensors = self.training, self._tensors()
        if training.adam_state is not None:
            tensors["num_steps"] = torch.tensor([training.adam_state.num_steps])
        self.file = folder.write(tensors)
        if self.file is None:
            return False
        training.adapter.parameters = training.adapter.parameters.new_empty(0)
        training.gradient = training.adam_state = None
        del training.model  # the reference would keep the model in memory when it is unloaded
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
        moments = moments_of(tensors)
        if moments is not None:
            training.adam_state = AdamState.restore(moments, int(tensors["num_steps"][0]))
        self.file = None

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors in memory by name."""
        training = self.training
        tensors = {"parameters": training.adapter.parameters}
        if training.gradient is not None:
            tensors["gradient"] = training.gradient
        if training.adam_state is not None:
            tensors |= vars(training.adam_state.moments)
        return tensors


@dataclass(eq=False)
class ResidentSampler:
    """The weights of a sampler: the base model, or an adapter in memory or on disk."""

    model_name: str
    adapter: StackedLora | None
    frozen: Adapter | None = None
    """The adapter without its tensor while that is on disk."""
    file: Path | None = None
    """The file of its tensor while that is on disk."""
    last_used: float = field(default_factory=time.monotonic)
    run_id: str | None = None
    """The run whose weights of some moment these are, where that is known."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return 0 if self.adapter is None else self.adapter.num_bytes

    def spill(self, folder: SpillFolder) -> bool:
        """Move the weights to disk; return False if they stay. Nothing may sample from them."""
        assert self.adapter is not None, "a sampler of a base model holds no weights"
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


class Residents:
    """All models, runs and samplers of the engine, and how room is made for more."""

    def __init__(self, spill_dir: Path | None, free_bytes: Callable[[], int | None]) -> None:
        """`free_bytes` returns how much memory may still be taken; None if that is not known."""
        self.models: dict[str, LoadedModel] = {}
        self.runs: dict[str, ResidentRun] = {}
        self.samplers: dict[str, ResidentSampler] = {}
        self.spill_folder = SpillFolder(spill_dir)
        self._free_bytes = free_bytes

    def make_room(self, needed: int, what: str, advice: str, *, keep: str = "") -> None:
        """Spill idle runs and samplers, then unload unused models, until `needed` bytes are free.

        Args:
            what: what the memory is for.
            advice: what the client can do if it is not enough.
            keep: id of a run that must stay in memory.

        Raises:
            UserError: with the numbers, if they do not fit.
        """
        while True:
            free = self._free_bytes()
            if free is None or free >= needed:
                return
            if not self._spill_oldest(keep) and not self._unload_oldest():
                raise UserError(
                    f"{what} needs about {format_size(needed)} of memory and {format_size(free)} "
                    f"are free; {advice}"
                )
            return_freed_memory()

    def spill_idle(self, seconds: float) -> int:
        """Move runs and samplers that were unused for `seconds` to disk; return how many moved."""
        before = time.monotonic() - seconds
        idle = [holder for holder in self._can_be_spilled() if holder.last_used < before]
        count = sum(self._spill(holder) for holder in idle)
        if count:
            return_freed_memory()
        return count

    def spill_superseded(self, run_id: str) -> None:
        """Move a run's older samplers to disk, with their prefixes, as a new one has come.

        Training loops sample from the newest weights, or in asynchronous loops from those before
        them; without this, each step of such a loop would leave an adapter in memory.
        """
        of_run = [sampler for sampler in self.samplers.values() if sampler.run_id == run_id]
        for sampler in of_run[:-RECENT_SAMPLERS_PER_RUN]:
            if self._is_idle(sampler):
                self._spill(sampler)

    def drop_run(self, run_id: str) -> None:
        """Drop a run, if it exists, and its memory."""
        run = self.runs.pop(run_id, None)
        if run is not None:
            self.spill_folder.remove(run.file)

    def drop_sampler(self, sampler_id: str) -> None:
        """Drop a sampler, if it exists, and the stored prefixes of its weights."""
        sampler = self.samplers.pop(sampler_id, None)
        if sampler is not None:
            self._forget_prefixes(sampler)
            self.spill_folder.remove(sampler.file)

    def clear(self) -> None:
        """Drop everything."""
        self.models.clear()
        self.runs.clear()
        self.samplers.clear()

    def _spill_oldest(self, keep: str) -> bool:
        holders = self._can_be_spilled(keep)
        return any(self._spill(holder) for holder in sorted(holders, key=lambda h: h.last_used))

    def _can_be_spilled(self, keep: str = "") -> list[ResidentRun | ResidentSampler]:
        runs = [run for key, run in self.runs.items() if run.file is None and key != keep]
        samplers = [sampler for sampler in self.samplers.values() if self._is_idle(sampler)]
        return [*runs, *samplers]

    def _is_idle(self, sampler: ResidentSampler) -> bool:
        """Return whether a sampler has weights in memory that no request samples from."""
        if sampler.adapter is None:
            return False
        model = self.models.get(sampler.model_name)
        return model is None or not model.scheduler.uses(sampler.adapter)

    def _spill(self, holder: ResidentRun | ResidentSampler) -> bool:
        num_bytes = holder.num_bytes
        if isinstance(holder, ResidentSampler):
            self._forget_prefixes(holder)
        if not holder.spill(self.spill_folder):
            return False
        kind = "run" if isinstance(holder, ResidentRun) else "sampler"
        logger.info("moved an idle %s of %s to disk", kind, format_size(num_bytes))
        return True

    def _forget_prefixes(self, sampler: ResidentSampler) -> None:
        if sampler.adapter is not None and sampler.model_name in self.models:
            self.models[sampler.model_name].scheduler.forget(sampler.adapter.key)

    def _unload_oldest(self) -> bool:
        unused = [model for model in self.models.values() if not self._is_used(model)]
        if not unused:
            return False
        oldest = min(unused, key=lambda model: model.last_used)
        logger.info("unloading the unused model %s to make room", oldest.info.name)
        del self.models[oldest.info.name]
        return True

    def _is_used(self, model: LoadedModel) -> bool:
        name = model.info.name
        return (
            model.scheduler.has_work
            or any(run.model_name == name and run.file is None for run in self.runs.values())
            or any(s.model_name == name and s.adapter is not None for s in self.samplers.values())
        )


def format_size(num_bytes: int) -> str:
    """Return a number of bytes in GiB or MiB, with the unit."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"
