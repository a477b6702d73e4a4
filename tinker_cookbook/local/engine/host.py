"""What the engine thread holds: base models, training runs and samplers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from tinker_cookbook.local.engine.jobs import EngineSettings
from tinker_cookbook.local.engine.memory import (
    available_bytes,
    resident_bytes,
    return_freed_memory,
)
from tinker_cookbook.local.engine.model.adapter_origin import TIED_HEAD_WARNING, find_origin
from tinker_cookbook.local.engine.model.architecture import read_eos_token_ids
from tinker_cookbook.local.engine.model.base_model import BaseModel, NativeModel, load_base_model
from tinker_cookbook.local.engine.model.devices import choose_device, choose_dtype
from tinker_cookbook.local.engine.model.hf_model import HfModel
from tinker_cookbook.local.engine.model.lora import Adapter, read_base_model_name, read_lora_spec
from tinker_cookbook.local.engine.model.precision import lacks_products
from tinker_cookbook.local.engine.residency import ResidentRun, ResidentSampler, SpillFolder
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.checks import check_sample_spec, place_images
from tinker_cookbook.local.engine.sampling.hf_decoder import HfCache, HfDecoder
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.native_decoder import native_decoder
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.stops import build_stop_rule, load_tokenizer
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.training.run import TrainingPass, TrainingRun
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    LoraSpec,
    LossSpec,
    ModelInfo,
    OnToken,
    SampleResult,
    SampleSpec,
    TrainDatum,
    TrainResult,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.model_files import resolve_model_folder

__all__ = ["EngineHost", "LoadedModel"]

logger = logging.getLogger(__name__)

_MAX_CACHE_BYTES = 4 * 2**30
_MIN_CACHE_BYTES = 64 * 2**20
_BYTES_PER_PARAMETER = 16
"""A parameter in training, its gradient and two moments."""
_SPARE_BYTES = 512 * 2**20
"""Left free beside a model's weights, for activations and keys and values."""


class LoadedModel:
    """A base model in memory and what samples from it."""

    def __init__(self, info: ModelInfo, base: BaseModel, dtype: torch.dtype, cache_bytes: int):
        self.info = info
        self.base = base
        self.dtype = dtype
        self.scheduler = _build_generator(base, cache_bytes)
        self.last_used = time.monotonic()
        self._tokenizer = None

    def tokenizer(self):
        """The model's `tokenizers.Tokenizer`, loaded when first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.info.folder)
        return self._tokenizer


def _build_generator(base: BaseModel, cache_bytes: int) -> Scheduler:
    if isinstance(base, NativeModel):
        decoder = native_decoder(base.arch, base.weights) or TorchDecoder(base.arch, base.weights)
        return Scheduler(decoder, KvCache(decoder.cache_shape, cache_bytes), SchedulerLimits())
    assert isinstance(base, HfModel), "models are native or run through transformers"
    return Scheduler(HfDecoder(base), HfCache(base), SchedulerLimits())


class EngineHost:
    """Executes operations, one at a time, in the engine thread."""

    def __init__(
        self, settings: EngineSettings, *, free_bytes: Callable[[], int | None] | None = None
    ) -> None:
        """`free_bytes` tells how much memory may still be taken; None asks the system."""
        self._settings = settings
        self._free_bytes = free_bytes or self._ask_free_bytes
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        self._models: dict[str, LoadedModel] = {}
        self._runs: dict[str, ResidentRun] = {}
        self._samplers: dict[str, ResidentSampler] = {}
        self._spill = SpillFolder(settings.spill_dir)

    # --- models --------------------------------------------------------------------------------

    def load_model(self, name: str) -> ModelInfo:
        """Load a base model unless it is loaded."""
        return self.model(name).info

    def model(self, name: str) -> LoadedModel:
        """The loaded model of this name, loading it if it is not."""
        if name not in self._models:
            self._models[name] = self._load(name)
        model = self._models[name]
        model.last_used = time.monotonic()
        return model

    def loaded_models(self) -> list[str]:
        """Names of the models in memory."""
        return list(self._models)

    def _load(self, name: str) -> LoadedModel:
        folder = resolve_model_folder(name)
        self._make_room(
            _weight_bytes(folder, self.dtype) + _SPARE_BYTES,
            f"model {name}",
            "close other programs or runs, or choose a smaller model",
        )
        base = load_base_model(folder, device=self.device, dtype=self.dtype)
        info = ModelInfo(
            name=name,
            folder=str(folder),
            vocab_size=base.vocab_size,
            max_context_length=base.max_positions,
            eos_token_ids=read_eos_token_ids(folder),
            supports_images=base.count_image_tokens is not None,
            dtype=_computed_dtype(base, self.dtype, self.device),
            device=str(self.device),
        )
        logger.info("model %s computes in %s on %s", name, info.dtype, info.device)
        return LoadedModel(info, base, self.dtype, self._cache_bytes())

    def _cache_bytes(self) -> int:
        if self._settings.kv_cache_bytes is not None:
            return self._settings.kv_cache_bytes
        free = self._free_bytes()
        if free is None:
            return _MAX_CACHE_BYTES // 2
        return max(min(free // 4, _MAX_CACHE_BYTES), _MIN_CACHE_BYTES)

    def _ask_free_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        free, limit = available_bytes(), self._settings.memory_bytes
        if limit is None:
            return free
        left = max(limit - resident_bytes(), 0)
        return left if free is None else min(left, free)

    def _make_room(self, needed: int, what: str, advice: str, *, keep: str = "") -> None:
        """Spill unused runs and samplers, then unload idle models, until so many bytes are free.

        Args:
            keep: the run that must stay.

        Raises:
            UserError: with the numbers, if they do not fit.
        """
        while True:
            free = self._free_bytes()
            if free is None or free >= needed:
                return
            if not self._spill_oldest(keep) and not self._unload_oldest():
                raise UserError(
                    f"{what} needs about {_size(needed)} of memory and {_size(free)} are free; "
                    f"{advice}"
                )
            return_freed_memory()

    def _spill_oldest(self, keep: str) -> bool:
        runs = [run for key, run in self._runs.items() if run.file is None and key != keep]
        samplers = [sampler for sampler in self._samplers.values() if self._can_spill(sampler)]
        for holder in sorted([*runs, *samplers], key=lambda holder: holder.last_used):
            if self._spill_out(holder):
                return True
        return False

    def _can_spill(self, sampler: ResidentSampler) -> bool:
        if sampler.adapter is None:
            return False
        model = self._models.get(sampler.model_name)
        return model is None or not model.scheduler.uses(sampler.adapter)

    def _spill_out(self, holder: ResidentRun | ResidentSampler) -> bool:
        num_bytes = holder.num_bytes
        if isinstance(holder, ResidentSampler):
            self._forget(holder)
        if not holder.spill(self._spill):
            return False
        logger.info("moved %s of an unused %s to disk", _size(num_bytes), type(holder).__name__)
        return True

    def spill_idle(self, seconds: float) -> int:
        """Move what was not used for so long to disk; returns how many runs and samplers."""
        before = time.monotonic() - seconds
        runs = [run for run in self._runs.values() if run.file is None]
        samplers = [sampler for sampler in self._samplers.values() if self._can_spill(sampler)]
        idle = [holder for holder in (*runs, *samplers) if holder.last_used < before]
        count = sum(self._spill_out(holder) for holder in idle)
        if count:
            return_freed_memory()
        return count

    def _unload_oldest(self) -> bool:
        idle = [model for model in self._models.values() if not self._is_used(model)]
        if not idle:
            return False
        oldest = min(idle, key=lambda model: model.last_used)
        logger.info("unloading %s, unused, to make room", oldest.info.name)
        del self._models[oldest.info.name]
        return True

    def _is_used(self, model: LoadedModel) -> bool:
        name = model.info.name
        return (
            model.scheduler.has_work
            or any(run.model_name == name and run.file is None for run in self._runs.values())
            or any(s.model_name == name and s.adapter is not None for s in self._samplers.values())
        )

    # --- runs ----------------------------------------------------------------------------------

    def create_run(self, run_id: str, model_name: str, lora: LoraSpec) -> None:
        """Begin a run with a new adapter."""
        base = self.model(model_name).base
        self._check_run_fits(base, lora)
        training = TrainingRun(base, lora)
        if training.trains_tied_head:
            logger.warning("the adapter of run %s: %s", run_id, TIED_HEAD_WARNING)
        self._runs[run_id] = ResidentRun(model_name, training)

    def create_run_from(self, run_id: str, folder: Path, *, with_optimizer: bool) -> LoraSpec:
        """Begin a run with a saved adapter, on the model it names; return its shape."""
        model_name = read_base_model_name(folder)
        base = self.model(model_name).base
        self._check_run_fits(base, read_lora_spec(folder))
        training = TrainingRun.from_folder(base, folder, with_optimizer=with_optimizer)
        self._runs[run_id] = ResidentRun(model_name, training)
        return training.adapter.spec

    def load_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Put a saved adapter into an existing run."""
        self._run(run_id).training.load(folder, with_optimizer=with_optimizer)

    def save_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Write a run's adapter into an existing empty folder."""
        run = self._run(run_id)
        run.training.save(
            folder,
            base_model_name=run.model_name,
            with_optimizer=with_optimizer,
            origin=find_origin(run.model_name, Path(self.model(run.model_name).info.folder)),
        )

    def forward_backward(
        self,
        run_id: str,
        data: Sequence[TrainDatum],
        loss: LossSpec,
        *,
        backward: bool,
        pause: Callable[[], None],
    ) -> TrainResult:
        """Compute a loss over a batch; `pause` is called between its parts."""
        run = self._run(run_id)
        training_pass = TrainingPass(run.training, data, loss, backward=backward)
        self._make_room(
            training_pass.num_bytes,
            f"a batch with up to {training_pass.longest:,} tokens in one sequence",
            "send shorter sequences",
            keep=run_id,
        )
        while not training_pass.step():
            pause()
        run.last_used = time.monotonic()
        return training_pass.result()

    def optim_step(self, run_id: str, adam: AdamSpec) -> dict[str, float]:
        """Update a run's adapter with the gathered gradient."""
        return self._run(run_id).training.optim_step(adam)

    def free_run(self, run_id: str) -> None:
        """Drop a run; an unknown one is dropped already."""
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._spill.remove(run.file)

    def _run(self, run_id: str) -> ResidentRun:
        run = self._runs.get(run_id)
        if run is None:
            raise UserError(f"run {run_id!r} does not exist here; create it first")
        model = self.model(run.model_name)
        if run.file is not None:
            self._make_room(run.file.stat().st_size, f"run {run_id}", "close other runs")
            run.restore(self._spill, model.base)
        run.last_used = time.monotonic()
        return run

    def _check_run_fits(self, base: BaseModel, lora: LoraSpec) -> None:
        targets = base.lora_targets(lora)
        parameters = lora.rank * sum(t.in_features + t.out_features for t in targets)
        self._make_room(
            _BYTES_PER_PARAMETER * parameters,
            f"rank={lora.rank} makes an adapter of {parameters:,} parameters, which with its "
            "gradient and optimizer state",
            "use a lower rank, or close other runs",
        )

    # --- samplers ------------------------------------------------------------------------------

    def create_sampler(
        self,
        sampler_id: str,
        model_name: str,
        *,
        run_id: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """Make a sampler of a base model, of a run as it is now, or of a saved adapter."""
        model = self.model(model_name)
        adapter = None
        if run_id is not None:
            trained = self._run(run_id).training.adapter
            size = 2 * trained.parameters.nbytes  # the copy, and the form that sampling uses
            self._make_room(size, "a snapshot of the run", "use a lower rank", keep=run_id)
            adapter = StackedLora(trained.snapshot(), model.dtype)
        elif folder is not None:
            spec = read_lora_spec(folder)
            saved = Adapter(spec, model.base.lora_targets(spec), device=self.device)
            saved.load_peft(folder)
            adapter = StackedLora(saved, model.dtype)
        self.free_sampler(sampler_id)
        self._samplers[sampler_id] = ResidentSampler(model_name, adapter)

    def refresh_sampler(self, sampler_id: str, run_id: str) -> None:
        """Give a sampler the run's weights as they are now; its requests in flight keep theirs."""
        if sampler_id not in self._samplers:
            raise UserError(f"sampler {sampler_id!r} does not exist; create it first")
        self.create_sampler(sampler_id, self._run(run_id).model_name, run_id=run_id)

    def sample(
        self,
        sampler_id: str,
        spec: SampleSpec,
        future: Future[SampleResult],
        on_token: OnToken | None,
        client: str = "",
    ) -> None:
        """Check a request and queue it; the future is resolved by `sampling_step`."""
        sampler = self._samplers.get(sampler_id)
        if sampler is None:
            raise UserError(f"sampler {sampler_id!r} does not exist; create it first")
        model = self.model(sampler.model_name)
        if sampler.file is not None:
            self._make_room(2 * sampler.file.stat().st_size, "this sampler", "close other runs")
            sampler.restore(self._spill, self.device, model.dtype)
        sampler.last_used = time.monotonic()
        info = model.info
        if spec.images and model.base.count_image_tokens is not None:
            spec = place_images(spec, model.base.count_image_tokens)
        max_new = check_sample_spec(spec, info)
        rule = build_stop_rule(
            spec.stop,
            eos_token_ids=info.eos_token_ids,
            vocab_size=info.vocab_size,
            get_tokenizer=model.tokenizer,
        )
        model.scheduler.add(
            Request(spec, sampler.adapter, future, rule, max_new, on_token, client=client)
        )

    def free_sampler(self, sampler_id: str) -> None:
        """Drop a sampler; requests that it is serving are finished."""
        sampler = self._samplers.pop(sampler_id, None)
        if sampler is not None:
            self._forget(sampler)
            self._spill.remove(sampler.file)

    def _forget(self, sampler: ResidentSampler) -> None:
        if sampler.adapter is not None and sampler.model_name in self._models:
            self._models[sampler.model_name].scheduler.forget(sampler.adapter.key)

    @property
    def has_sampling_work(self) -> bool:
        """Whether `sampling_step` has something to do."""
        return any(model.scheduler.has_work for model in self._models.values())

    def sampling_step(self) -> None:
        """Decode one token of every running sequence of every model."""
        for model in list(self._models.values()):
            if not model.scheduler.has_work:
                continue
            model.last_used = time.monotonic()
            try:
                model.scheduler.step()
            except Exception as error:
                logger.exception("sampling from %s failed", model.info.name)
                model.scheduler.fail_all(error)

    # --- the whole -----------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Counts, rates and memory; may be called from another thread."""
        generators = [model.scheduler for model in list(self._models.values())]
        busy = sum(generator.busy_seconds for generator in generators)
        sampled = sum(generator.sampled_tokens for generator in generators)
        return {
            "models": float(len(self._models)),
            "runs": float(len(self._runs)),
            "samplers": float(len(self._samplers)),
            "spilled_runs": float(sum(r.file is not None for r in list(self._runs.values()))),
            "spilled_samplers": float(
                sum(s.file is not None for s in list(self._samplers.values()))
            ),
            "spilled_bytes": float(self._spill.num_bytes),
            "running_sequences": float(sum(g.num_running for g in generators)),
            "waiting_requests": float(sum(g.num_waiting for g in generators)),
            "prompt_tokens": float(sum(g.prompt_tokens for g in generators)),
            "sampled_tokens": float(sampled),
            "sampled_tokens_per_second": sampled / busy if busy else 0.0,
            "sampling_seconds": busy,
            "kv_cache_bytes": float(sum(g.num_cache_bytes for g in generators)),
            "resident_bytes": float(resident_bytes()),
        }

    def close(self, error: Exception) -> None:
        """Fail what is still being sampled and let go of all memory."""
        for model in self._models.values():
            model.scheduler.fail_all(error)
        self._models.clear()
        self._runs.clear()
        self._samplers.clear()


def _computed_dtype(base: BaseModel, dtype: torch.dtype, device: torch.device) -> str:
    """The format in which matrices are multiplied, which need not be that of the weights."""
    if isinstance(base, NativeModel) and lacks_products(torch.empty(0, dtype=dtype, device=device)):
        dtype = torch.float32
    return str(dtype).removeprefix("torch.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Memory of a model's weights; files hold two bytes a parameter unless they say otherwise."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                count = 1
                for size in shape:
                    count *= size
                total += count
    return total * dtype.itemsize
