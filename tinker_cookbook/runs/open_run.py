"""Open a run: everything that a train loop needs, from the run directory to the training client.

All train loops start here. A loop for a new method reads:

    async def main(config: Config) -> RunResult:
        async with open_run(config, "my_recipe") as run:
            data = config.dataset_builder()
            if not await run.begin(total_steps=len(data)):
                return run.result()  # this run was complete before
            for step in range(run.start_step, run.total_steps):
                with trace.trace_iteration(step) as window:
                    gradient = run.training_client.forward_backward(data[step], "cross_entropy")
                    update = run.training_client.optim_step(run.adam_params(step))
                    saving = run.submit_checkpoint({"batch": step + 1}, steps_done=step + 1)
                    metrics = (await gradient).metrics
                    await update
                await run.finish_step(step, metrics, window, saving)
            return await run.finish({"batch": run.total_steps})

`Config` extends `options.SharedOptions`. The order within a step makes a resumed run repeat an
uninterrupted one. The service executes the requests of a run in the order of their submission, so
a checkpoint that is submitted directly after the optimizer step contains exactly the steps so far.
Its record is written only after the row of that step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import chz

from tinker_cookbook import service
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.checkpoint_manager import CheckpointManager, FinishSave
from tinker_cookbook.runs.checkpoints import (
    CheckpointRecord,
    LoopState,
    get_best_checkpoint,
    get_last_checkpoint,
)
from tinker_cookbook.runs.directory import open_log_dir, truncate_metrics
from tinker_cookbook.runs.options import (
    CheckpointOptions,
    SharedOptions,
    check_reply_length,
    check_row_length,
)
from tinker_cookbook.runs.report import report_complete, report_saved
from tinker_cookbook.runs.token_meter import TokenMeter, count_tokens
from tinker_cookbook.runs.training_client import build_adam_params, create_training_client
from tinker_cookbook.utils import ml_log, trace
from tinker_cookbook.utils.disk_errors import optional_file
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier
from tinker_cookbook.utils.progress import SUPERVISED_NUMBERS, ProgressReporter, ShownNumbers
from tinker_cookbook.utils.run_files import TIMING_FILE
from tinker_cookbook.utils.sdk_sessions import SessionEnd, close_session
from tinker_cookbook.utils.session_naming import (
    describe_session,
    name_run,
    resolve_session_display_name,
)

if TYPE_CHECKING:
    import tinker

__all__ = ["Run", "RunResult", "open_run"]

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=SharedOptions)
FINGERPRINT = "data_fingerprint"
"""Key of a checkpoint record: identifies the training data, if the data set can tell."""


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left its weights, and its last held-out metrics."""

    log_path: str
    model_name: str
    state_path: str
    sampler_path: str
    best_sampler_path: str
    """The weights with the best held-out value; the final weights if none was recorded."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the final evaluation; empty if the run was complete before."""


@contextlib.asynccontextmanager
async def open_run(config: C, recipe_name: str) -> AsyncIterator[Run[C]]:
    """Open a run, new or resumed, for the length of a block.

    Entering the block takes the run directory (locked against other processes, compared with the
    settings and the code of an earlier run) and connects to the service. `Run.begin` does the rest:
    the number of steps depends on the data, and the data's tokenizer may come from the service.
    Leaving the block prints what is saved and closes everything in reverse order; the service is
    told whether the run succeeded, failed or was interrupted.

    Args:
        config: Settings of the run; `model_name` and `log_path` are set.
        recipe_name: Recorded with the session on the service.

    Yields:
        The run. Its `config` names the model as the service does.

    Raises:
        ConfigurationError: if a setting, the service or an old run directory forbids the run.
        TrainingError: if the local service stops during the run.
    """
    log_path, model_name = config.log_path, config.model_name
    assert log_path is not None, "a recipe chooses the run directory"
    assert model_name is not None, "a recipe chooses the model"
    with open_log_dir(log_path, config.behavior_if_log_dir_exists, config):
        choice = service.choose_service(config.base_url)
        # Printed before connecting, because the first use of a model may download it.
        print(f"{choice.describe(model_name)}\nrun      {log_path}", flush=True)
        with service.connect(config.base_url, model_name) as connection:
            config = chz.replace(config, model_name=connection.model_name)
            async with contextlib.AsyncExitStack() as opened:
                run = Run(config, connection, opened, log_path=log_path, recipe_name=recipe_name)
                if connection.kind != "local":  # a local one still starts while the data are read
                    await asyncio.to_thread(run.check_lengths)
                yield run
                if run.is_finished:
                    await report_saved(run.service_client, log_path)


class Run(Generic[C]):
    """An open run.

    Attributes:
        config: The settings.
        connection: The service.
        log_path: The run directory.
        recipe_name: Recorded with the session.
        total_steps: Optimizer steps of the whole run. This and all below: set by `begin`.
        start_step: The first step to do; above 0 for a resumed run.
        checkpoint: The record that the run resumes from; None for a new run.
        service_client: The session on the service.
        training_client: The model in training.
        metrics: Takes one row of metrics per step.
        checkpoints: Decides when to save.
        progress: Shows finished steps on the terminal.
    """

    total_steps: int
    start_step: int
    checkpoint: CheckpointRecord | None
    service_client: tinker.ServiceClient
    training_client: tinker.TrainingClient
    metrics: ml_log.Logger
    checkpoints: CheckpointManager
    progress: ProgressReporter

    def __init__(
        self,
        config: C,
        connection: service.Connection,
        opened: contextlib.AsyncExitStack,
        *,
        log_path: str,
        recipe_name: str,
    ) -> None:
        self.config = config
        self.connection = connection
        self.log_path = log_path
        self.recipe_name = recipe_name
        self.is_finished = False
        self._opened = opened
        self._data_state: dict[str, str] = {}
        self._last_finish = time.perf_counter()
        self._meter = TokenMeter(connection.model_name, config.prices)
        opened.enter_context(count_tokens(self._meter))

    async def begin(
        self,
        total_steps: int,
        *,
        step_of: Callable[[CheckpointRecord], int] | None = None,
        data_fingerprint: str | None = None,
        renderer_name: str | None = None,
        shown: ShownNumbers = SUPERVISED_NUMBERS,
    ) -> bool:
        """Open the log files, the session and the training client.

        Args:
            total_steps: Optimizer steps of the whole run.
            step_of: Returns the first step that a checkpoint of an unfinished run does not
                contain; by default its `batch`.
            data_fingerprint: Identifies the training data. A run is not resumed with other data.
            renderer_name: Chat format, recorded with the run on the service.
            shown: The metrics that the progress display shows.

        Returns:
            False if the run was complete before: nothing is opened, and `result` tells where the
            weights are.

        Raises:
            ConfigurationError: if the data have changed, `max_tokens` or `max_length` is too long
                for the model, or the service refuses the run.
            CheckpointError: if the service no longer has the checkpoint to resume from.
        """
        self.total_steps = total_steps
        self.checkpoint = get_last_checkpoint(self.log_path)
        self.start_step = self._find_start(step_of)
        if self.checkpoint is not None and self.start_step >= total_steps:
            report_complete(self.log_path)
            return False
        if data_fingerprint is not None:
            self._check_same_data(data_fingerprint)
            self._data_state = {FINGERPRINT: data_fingerprint}
        if self.connection.kind == "local":
            await asyncio.to_thread(self.check_lengths)
        self.metrics = self._opened.enter_context(_open_loggers(self))
        if self.metrics.store is not None and self.start_step:
            self._meter.resume((self.metrics.store.read_metrics() or [{}])[-1])
        self.service_client = await self._opened.enter_async_context(_open_session(self))
        self.training_client = await create_training_client(
            self.service_client,
            self.config,
            self.checkpoint,
            run_name=name_run(self.recipe_name, self.log_path, self.config.learning_rate),
            renderer_name=renderer_name,
        )
        self.checkpoints = _build_checkpoint_manager(self)
        if self.checkpoint is not None:
            print(f"resumed  after step {self.start_step} of {total_steps}", flush=True)
        self.progress = ProgressReporter(total_steps, self.start_step, shown=shown)
        self._opened.callback(self.progress.close)
        self._last_finish = time.perf_counter()
        return True

    def check_lengths(self) -> None:
        """Refuse replies and rows for which the model's context is too short, if it is known.

        Raises:
            ConfigurationError: naming the setting and the context.
        """
        window, model_name = self.connection.context_window(), self.connection.model_name
        check_reply_length(self.config, model_name, window)
        check_row_length(self.config, model_name, window)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, according to the schedule."""
        config = self.config
        return config.learning_rate * compute_schedule_lr_multiplier(
            config.lr_schedule, step, self.total_steps, warmup_steps=config.warmup_steps
        )

    def adam_params(self, step: int) -> tinker.AdamParams:
        """Return the optimizer's settings for a step."""
        return build_adam_params(self.config, self.learning_rate(step))

    def submit_checkpoint(
        self, loop_state: LoopState, *, steps_done: int, elapsed_tokens: int = 0
    ) -> FinishSave | None:
        """Queue a checkpoint if one is due; call this directly after the optimizer step.

        Args:
            loop_state: What the loop needs to resume here, such as `{"batch": steps_done}`.
            steps_done: Optimizer steps submitted so far.
            elapsed_tokens: Tokens trained on so far, for `save_every_tokens`.

        Returns:
            What `finish_step` takes as `saving`; None if nothing is due. The end of the run is
            saved by `finish`.
        """
        if steps_done >= self.total_steps:
            return None
        state = {**loop_state, **self._data_state}
        return self.checkpoints.submit_due(steps_done, state, elapsed_tokens=elapsed_tokens)

    async def finish_step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        window: trace.IterationWindow,
        saving: FinishSave | None = None,
    ) -> None:
        """Write the row of a step, show it, and then record its checkpoint.

        Args:
            step: The step; steps are finished in order.
            metrics: Numbers of the step; `num_tokens`, if given, yields a rate.
            window: The timed spans of the step.
            saving: The checkpoint submitted after the step.
        """
        self._write_spans(step, window)
        now = time.perf_counter()
        seconds, self._last_finish = now - self._last_finish, now
        row = {**metrics, **window.get_timing_metrics(), "time/step": seconds}
        if "num_tokens" in metrics:
            row["time/tokens_per_second"] = metrics["num_tokens"] / seconds
        self.write_row(step, row)
        self.progress.step(row)
        if saving is not None:
            await saving()

    def write_row(self, step: int, row: Mapping[str, Any]) -> None:
        """Write a row of metrics, with the tokens and the cost since the row before.

        `finish_step` calls this; a loop calls it for the evaluation after the last step.
        """
        self.metrics.log_metrics({**row, **self._meter.take_metrics(step)}, step=step)

    async def finish(
        self, loop_state: LoopState, metrics: dict[str, float] | None = None
    ) -> RunResult:
        """Save the end of the run.

        Args:
            loop_state: What a longer run would need to resume here.
            metrics: The final evaluation, whose row is already written: a crash during the save
                then loses nothing.

        Returns:
            Where the weights are.
        """
        paths = await self.checkpoints.save_final_async({**loop_state, **self._data_state})
        self.progress.close()
        self.is_finished = True
        return self._build_result(paths["state_path"], paths["sampler_path"], metrics or {})

    def result(self) -> RunResult:
        """Return where a run that was complete before has left its weights."""
        assert self.checkpoint is not None, "a complete run has a final checkpoint"
        return self._build_result(
            self.checkpoint.state_path or "", self.checkpoint.sampler_path or "", {}
        )

    def _find_start(self, step_of: Callable[[CheckpointRecord], int] | None) -> int:
        if self.checkpoint is None:
            return 0
        if self.checkpoint.final:
            return self.total_steps
        return int(self.checkpoint.batch or 0) if step_of is None else step_of(self.checkpoint)

    def _check_same_data(self, fingerprint: str) -> None:
        """Refuse other data: their batches would repeat some rows and leave others out."""
        before = None if self.checkpoint is None else self.checkpoint.get(FINGERPRINT, None)
        if before is None or before == fingerprint:
            return
        difference = (
            f"the data has changed since {self.log_path} was begun ({before} -> {fingerprint})"
        )
        if self.config.behavior_if_log_dir_exists == "resume":
            logger.warning("%s; the run continues with the new data, as requested", difference)
            return
        raise ConfigurationError(
            f"{difference}; its batches would not be those of the interrupted run. Restore the "
            "data, continue with the new data (behavior_if_log_dir_exists=resume), or start over "
            "(behavior_if_log_dir_exists=delete)."
        )

    def _write_spans(self, step: int, window: trace.IterationWindow) -> None:
        folder, every = Path(self.log_path), self.config.span_chart_every
        store = self.metrics.store
        if store is not None:
            with optional_file(folder / TIMING_FILE):
                store.write_timing_spans(step, window.get_span_dicts())
        if every and step % every == 0:
            chart = folder / f"iteration_{step:06d}" / "timing_gantt.html"
            trace.save_gantt_chart_html(window, step, chart)

    def _build_result(
        self, state_path: str, sampler_path: str, metrics: dict[str, float]
    ) -> RunResult:
        best = get_best_checkpoint(self.log_path)
        return RunResult(
            self.log_path,
            self.connection.model_name,
            state_path,
            sampler_path,
            best.sampler_path if best and best.sampler_path else sampler_path,
            metrics,
        )


@contextlib.contextmanager
def _open_loggers(run: Run[Any]) -> Iterator[ml_log.Logger]:
    """Open the log files of a run directory, without the rows of steps that are repeated."""
    config: SharedOptions = run.config
    num_dropped = truncate_metrics(run.log_path, run.start_step)
    metrics = ml_log.setup_logging(
        run.log_path,
        wandb_project=config.wandb_project,
        wandb_name=config.wandb_name,
        config=config,
        print_metrics=False,
        loggers=config.loggers,
    )
    if num_dropped:
        logger.info("%d metric rows are dropped: their steps are repeated", num_dropped)
    if config.enable_trace:
        trace.trace_init(output_file=str(Path(run.log_path) / "trace_events.jsonl"))
    try:
        yield metrics
    finally:
        trace.trace_shutdown()
        metrics.close()
        ml_log.release_logging_module()


@contextlib.asynccontextmanager
async def _open_session(run: Run[Any]) -> AsyncIterator[tinker.ServiceClient]:
    """Open a session on the service, and report its outcome at the end of the block."""
    config: SharedOptions = run.config
    options = describe_session(run.recipe_name, run.log_path, config.learning_rate)
    chosen = resolve_session_display_name(
        session_name=config.session_name, wandb_name=config.wandb_name
    )
    options["display_name"] = chosen or options["display_name"]
    # In threads: both wait until a local service has started.
    client = await asyncio.to_thread(run.connection.service_client, **options)
    dashboard = await asyncio.to_thread(run.connection.describe_dashboard)
    if dashboard is not None:
        print(f"watch    {dashboard}", flush=True)
    status: SessionEnd = "interrupted"
    try:
        yield client
        status = "success"
    except Exception:
        status = "errored"
        raise
    finally:
        await asyncio.to_thread(close_session, client, status)


def _build_checkpoint_manager(run: Run[Any]) -> CheckpointManager:
    config: CheckpointOptions = run.config
    return CheckpointManager(
        run.training_client,
        run.service_client,
        run.log_path,
        save_every=config.save_every,
        save_every_tokens=config.save_every_tokens,
        save_every_seconds=config.save_every_seconds,
        ttl_seconds=config.ttl_seconds,
        rolling_save_every=config.rolling_save_every,
        rolling_ttl_seconds=config.rolling_ttl_seconds,
        async_periodic_saves=config.async_periodic_saves,
        keep_checkpoints=config.keep_checkpoints,
    )
