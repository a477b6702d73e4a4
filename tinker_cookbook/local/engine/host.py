"""The operations of the engine on models, runs and samplers, executed in the engine thread.

`worker.EngineWorker` offers each of them to the service as a method that queues it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from tinker_cookbook.local.engine.budget import (
    cache_budget,
    has_short_moments,
    run_bytes,
    sampler_bytes,
)
from tinker_cookbook.local.engine.loaded_model import LoadedModel, read_weight_bytes
from tinker_cookbook.local.engine.memory import (
    available_bytes,
    resident_bytes,
    return_freed_memory,
)
from tinker_cookbook.local.engine.model.adapter_origin import TIED_HEAD_WARNING, find_origin
from tinker_cookbook.local.engine.model.base_format import check_saved_format
from tinker_cookbook.local.engine.model.base_model import BaseModel, check_base_format
from tinker_cookbook.local.engine.model.devices import choose_device, choose_dtype
from tinker_cookbook.local.engine.model.lora import Adapter, read_base_model_name, read_lora_spec
from tinker_cookbook.local.engine.model.number_formats import FULL, base_format_from_environment
from tinker_cookbook.local.engine.residency import ResidentRun, Residents, ResidentSampler
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.request_checks import check_sample_spec, place_images
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.stops import build_stop_rule
from tinker_cookbook.local.engine.settings import EngineSettings
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

__all__ = ["EngineHost"]

logger = logging.getLogger(__name__)

_SPARE_BYTES = 512 * 2**20
"""Memory that must stay free when a model is loaded, for activations, keys and values."""


class EngineHost:
    """Executes operations one at a time. Used by one thread, except for `stats`."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        pause: Callable[[], None] = lambda: None,
        free_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        """Choose device and number format.

        Args:
            pause: called between the parts of long operations, so that sampling may run.
            free_bytes: returns how much memory may still be taken; None asks the system.
        """
        self._settings = settings
        self._pause = pause
        self._free_bytes = free_bytes or self._ask_free_bytes
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        self.base_format = settings.base_format or base_format_from_environment() or FULL
        self._residents = Residents(settings.spill_dir, lambda: self._free_bytes())

    # --- models --------------------------------------------------------------------------------

    def load_model(self, name: str) -> ModelInfo:
        """Load a base model, a folder or a name, unless it is loaded; return its description."""
        return self.model(name).info

    def model(self, name: str) -> LoadedModel:
        """Return the loaded model of this name, loading it if necessary."""
        models = self._residents.models
        if name not in models:
            models[name] = self._load(name)
        models[name].last_used = time.monotonic()
        return models[name]

    def loaded_models(self) -> list[str]:
        """Return the names of the models in memory."""
        return list(self._residents.models)

    def _load(self, name: str) -> LoadedModel:
        folder = resolve_model_folder(name)
        check_base_format(folder, self.base_format)
        self._residents.make_room(
            read_weight_bytes(folder, self.device, self.dtype, self.base_format) + _SPARE_BYTES,
            f"model {name}",
            "close other programs or runs, or choose a smaller model",
        )
        model = LoadedModel(
            name,
            folder,
            device=self.device,
            dtype=self.dtype,
            base_format=self.base_format,
            cache_bytes=self._cache_bytes,
        )
        info = model.info
        logger.info("model %s computes in %s on %s", name, info.dtype, info.device)
        if self.base_format != FULL:
            return_freed_memory()  # the full weights, which were read to be quantised
            logger.info("model %s has base weights in %s", name, self.base_format)
        return model

    def _cache_bytes(self) -> int:
        if self._settings.kv_cache_bytes is not None:
            return self._settings.kv_cache_bytes
        return cache_budget(self._free_bytes())

    def _ask_free_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        free, limit = available_bytes(), self._settings.memory_bytes
        if limit is None:
            return free
        left = max(limit - resident_bytes(), 0)
        return left if free is None else min(left, free)

    def spill_idle(self, seconds: float) -> int:
        """Move runs and samplers that were unused for `seconds` to disk; return how many moved."""
        return self._residents.spill_idle(seconds)

    # --- runs ----------------------------------------------------------------------------------

    def create_run(self, run_id: str, model_name: str, lora: LoraSpec) -> None:
        """Create a run with a new adapter."""
        base = self.model(model_name).base
        self._check_run_fits(base, lora)
        training = TrainingRun(base, lora)
        if training.trains_tied_head:
            logger.warning("the adapter of run %s: %s", run_id, TIED_HEAD_WARNING)
        self._residents.runs[run_id] = ResidentRun(model_name, training)

    def create_run_from(self, run_id: str, folder: Path, *, with_optimizer: bool) -> LoraSpec:
        """Create a run with a saved adapter, on the model that it names; return its shape.

        Args:
            folder: written by `save_run`.
        """
        model_name = read_base_model_name(folder)
        check_saved_format(folder, self.base_format, with_optimizer=with_optimizer)
        base = self.model(model_name).base
        self._check_run_fits(base, read_lora_spec(folder))
        training = TrainingRun.from_folder(base, folder, with_optimizer=with_optimizer)
        self._residents.runs[run_id] = ResidentRun(model_name, training)
        return training.adapter.spec

    def load_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Replace the adapter of an existing run with a saved one."""
        check_saved_format(folder, self.base_format, with_optimizer=with_optimizer)
        self._run(run_id).training.load(folder, with_optimizer=with_optimizer)

    def save_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> None:
        """Write a run's adapter into an existing empty folder, flushed to the disk."""
        run = self._run(run_id)
        run.training.save(
            folder,
            base_model_name=run.model_name,
            with_optimizer=with_optimizer,
            base_format=self.base_format,
            origin=find_origin(run.model_name, Path(self.model(run.model_name).info.folder)),
        )

    def forward_backward(
        self, run_id: str, data: Sequence[TrainDatum], loss: LossSpec, *, backward: bool = True
    ) -> TrainResult:
        """Compute a loss over a batch and, with `backward`, add its gradient to the run's.

        A call that fails adds nothing to the gradient.
        """
        run = self._run(run_id)
        training_pass = TrainingPass(run.training, data, loss, backward=backward)
        self._residents.make_room(
            training_pass.num_bytes,
            f"a batch with up to {training_pass.longest:,} tokens in one sequence",
            "send shorter sequences",
            keep=run_id,
        )
        while not training_pass.step():
            self._pause()
        run.last_used = time.monotonic()
        return training_pass.result()

    def optim_step(self, run_id: str, adam: AdamSpec) -> dict[str, float]:
        """Update a run's adapter with the accumulated gradient and clear that; return metrics."""
        return self._run(run_id).training.optim_step(adam)

    def free_run(self, run_id: str) -> None:
        """Drop a run, if it exists, and its memory."""
        self._residents.drop_run(run_id)

    def _run(self, run_id: str) -> ResidentRun:
        """Return a run, in memory."""
        run = self._residents.runs.get(run_id)
        if run is None:
            raise UserError(f"run {run_id!r} does not exist here; create it first")
        model = self.model(run.model_name)
        if run.file is not None:
            size = run.file.stat().st_size
            self._residents.make_room(size, f"run {run_id}", "close other runs")
            run.restore(self._residents.spill_folder, model.base)
        run.last_used = time.monotonic()
        return run

    def _check_run_fits(self, base: BaseModel, lora: LoraSpec) -> None:
        targets = base.lora_targets(lora)
        parameters = lora.rank * sum(t.in_features + t.out_features for t in targets)
        self._residents.make_room(
            run_bytes(
                4 * parameters,
                short_moments=has_short_moments(str(base.product_dtype)),
                with_gradient=True,
            ),
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
        saved_by: str | None = None,
    ) -> None:
        """Create a sampler of a base model, of a run's present weights, or of a saved adapter.

        Args:
            saved_by: the run that saved the adapter in `folder`; it need not exist any more.
        """
        model = self.model(model_name)
        adapter = None
        if run_id is not None:
            trained = self._run(run_id).training.adapter
            size = sampler_bytes(trained.parameters.nbytes)
            self._residents.make_room(
                size, "a snapshot of the run", "use a lower rank", keep=run_id
            )
            adapter = StackedLora(trained.snapshot(), model.dtype)
        elif folder is not None:
            check_saved_format(folder, self.base_format, with_optimizer=False)
            spec = read_lora_spec(folder)
            saved = Adapter(spec, model.base.lora_targets(spec), device=self.device)
            saved.load_peft(folder)
            adapter = StackedLora(saved, model.dtype)
        self.free_sampler(sampler_id)
        of_run = run_id or saved_by
        self._residents.samplers[sampler_id] = ResidentSampler(model_name, adapter, run_id=of_run)
        if of_run is not None:
            self._residents.spill_superseded(of_run)

    def refresh_sampler(self, sampler_id: str, run_id: str) -> None:
        """Give a sampler the run's present weights.

        Requests that it is already serving keep the weights with which they started.
        """
        if sampler_id not in self._residents.samplers:
            raise UserError(f"sampler {sampler_id!r} does not exist; create it first")
        self.create_sampler(sampler_id, self._run(run_id).model_name, run_id=run_id)

    def sample(
        self,
        sampler_id: str,
        spec: SampleSpec,
        future: Future[SampleResult],
        on_token: OnToken | None = None,
        client: str = "",
    ) -> None:
        """Check a request and queue it; `sampling_step` resolves the future.

        Args:
            client: who sent it; see `EngineWorker.sample`.
        """
        sampler = self._residents.samplers.get(sampler_id)
        if sampler is None:
            raise UserError(f"sampler {sampler_id!r} does not exist; create it first")
        model = self.model(sampler.model_name)
        if sampler.file is not None:
            size = 2 * sampler.file.stat().st_size
            self._residents.make_room(size, "this sampler", "close other runs")
            sampler.restore(self._residents.spill_folder, self.device, model.dtype)
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
        """Drop a sampler, if it exists; requests that it is serving are finished."""
        self._residents.drop_sampler(sampler_id)

    @property
    def has_sampling_work(self) -> bool:
        """Whether `sampling_step` has something to do."""
        return any(model.scheduler.has_work for model in self._residents.models.values())

    def sampling_step(self) -> None:
        """Run one step of every model that has sampling requests."""
        for model in list(self._residents.models.values()):
            if not model.scheduler.has_work:
                continue
            model.last_used = time.monotonic()
            try:
                model.scheduler.step()
            except Exception as error:
                logger.exception("sampling from %s failed", model.info.name)
                model.scheduler.fail_all(error)

    # --- the whole engine ----------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Return counts, rates and memory; another thread may call this."""
        residents = self._residents
        runs, samplers = list(residents.runs.values()), list(residents.samplers.values())
        schedulers = [model.scheduler for model in list(residents.models.values())]
        busy = sum(scheduler.busy_seconds for scheduler in schedulers)
        sampled = sum(scheduler.sampled_tokens for scheduler in schedulers)
        return {
            "models": float(len(schedulers)),
            "runs": float(len(runs)),
            "samplers": float(len(samplers)),
            "spilled_runs": float(sum(run.file is not None for run in runs)),
            "spilled_samplers": float(sum(sampler.file is not None for sampler in samplers)),
            "spilled_bytes": float(residents.spill_folder.num_bytes),
            "running_sequences": float(sum(s.num_running for s in schedulers)),
            "waiting_requests": float(sum(s.num_waiting for s in schedulers)),
            "prompt_tokens": float(sum(s.prompt_tokens for s in schedulers)),
            "sampled_tokens": float(sampled),
            "sampled_tokens_per_second": sampled / busy if busy else 0.0,
            "sampling_seconds": busy,
            "kv_cache_bytes": float(sum(s.num_cache_bytes for s in schedulers)),
            "resident_bytes": float(resident_bytes()),
        }

    def close(self, error: Exception) -> None:
        """Fail what is still being sampled and release all memory."""
        for model in self._residents.models.values():
            model.scheduler.fail_all(error)
        self._residents.clear()
