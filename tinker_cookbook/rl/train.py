"""Reinforcement learning: open a run, choose the loop, save at the end."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import chz

from tinker_cookbook import checkpoint_utils, service
from tinker_cookbook.display import format_trajectory
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.algorithms import LOSSES
from tinker_cookbook.rl.async_training import do_async_training
from tinker_cookbook.rl.config import (
    AsyncConfig,
    Config,
    KLReferenceConfig,
    RunOptions,
    StreamMinibatchConfig,
)
from tinker_cookbook.rl.dataset_utils import EpochCycledRLDataset
from tinker_cookbook.rl.loop import Loop, start_step_of
from tinker_cookbook.rl.optimize import train_step
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.rollouts import set_rollout_executor
from tinker_cookbook.rl.stream_training import do_sync_training_with_stream_minibatch
from tinker_cookbook.rl.sync_training import do_sync_training
from tinker_cookbook.rl.types import RLDataset, TrajectoryGroup
from tinker_cookbook.runs.directory import open_log_dir
from tinker_cookbook.runs.report import report_complete
from tinker_cookbook.runs.training_client import (
    TrainingRun,
    create_training_client,
    open_loggers,
    open_service_client,
    report_saved,
    snapshot_weights,
)
from tinker_cookbook.utils.misc_utils import timed

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.checkpoint_utils import CheckpointRecord
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "AsyncConfig",
    "Config",
    "KLReferenceConfig",
    "RunOptions",
    "RunResult",
    "StreamMinibatchConfig",
    "gather_with_progress",
    "main",
    "print_group",
    "save_checkpoint_and_get_sampling_client",
    "train_step",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left its weights, and its last held-out numbers."""

    log_path: str
    model_name: str
    state_path: str
    sampler_path: str
    best_sampler_path: str
    """The weights that did best on held-out tasks; the final ones where nothing was held out."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the final evaluation; empty if the run had been complete before."""


async def main(config: Config, rollout_executor: Executor | None = None) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Args:
        config: Everything about the run.
        rollout_executor: Where groups are rolled out; None: in this process' event loop.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        TrainingError: if the run cannot go on; it can be resumed from its last checkpoint.
    """
    set_rollout_executor(rollout_executor)
    with open_log_dir(config.log_path, config.behavior_if_log_dir_exists, config):
        return await _connect_and_run(config)


async def _connect_and_run(config: Config) -> RunResult:
    with service.connect(config.base_url, config.model_name) as connection:
        config = chz.replace(config, model_name=connection.model_name)
        print(f"{connection.describe()}\nrun      {config.log_path}", flush=True)
        dataset, test_dataset = await config.dataset_builder()
        if config.num_epochs > 1:
            dataset = EpochCycledRLDataset(dataset, config.num_epochs, config.seed)
        return await _run(config, connection, dataset, test_dataset)


async def gather_with_progress(coroutines: Iterable[Coroutine[Any, Any, T]], desc: str) -> list[T]:
    """Run coroutines at once with a progress bar; an error of one cancels the others."""
    from tqdm import tqdm

    waiting = list(coroutines)
    with tqdm(total=len(waiting), desc=desc) as bar:

        async def follow(coroutine: Coroutine[Any, Any, T]) -> T:
            result = await coroutine
            bar.update(1)
            return result

        return await gather_or_cancel(follow(coroutine) for coroutine in waiting)


def print_group(traj_group: TrajectoryGroup, tokenizer: Tokenizer) -> None:
    """Print the trajectories of a group with their total rewards."""
    totals = traj_group.get_total_rewards()
    for index, (trajectory, total) in enumerate(
        zip(traj_group.trajectories_G, totals, strict=True)
    ):
        print(f"trajectory {index}: total reward {total:g}")
        print(format_trajectory(trajectory, tokenizer))


async def save_checkpoint_and_get_sampling_client(
    training_client: tinker.TrainingClient,
    checkpoint_mgr: checkpoint_utils.CheckpointManager,
    i_batch: int,
    start_batch: int = 0,
    record_stability_info: bool = False,
) -> tuple[tinker.SamplingClient, dict[str, Any]]:
    """Save what is due after `i_batch` steps, and return the weights to sample from: for own loops.

    Args:
        training_client: The run.
        checkpoint_mgr: Decides what is due, and writes the record with `i_batch` as next batch.
        i_batch: Steps done.
        start_batch: Where this process began; at that step nothing is saved again.
        record_stability_info: Ask the service to name what it sampled, for losses that need it.

    Returns:
        The client, and the seconds that saving took as a metric.
    """
    metrics: dict[str, Any] = {}
    with timed("save_checkpoint", metrics):
        if i_batch > start_batch:
            await checkpoint_mgr.maybe_save_async(i_batch, {"batch": i_batch})
        options = {"record_stability_info": True} if record_stability_info else {}
        client = await snapshot_weights(training_client, **options)
    return client, metrics


async def _run(
    config: Config,
    connection: service.Connection,
    dataset: RLDataset,
    test_dataset: RLDataset | None,
) -> RunResult:
    _check_loss(config, connection)
    total_steps = _count_steps(config, dataset)
    checkpoint = checkpoint_utils.get_last_checkpoint(config.log_path)
    start_step = start_step_of(checkpoint, total_steps)
    if checkpoint is not None and start_step >= total_steps:
        report_complete(config.log_path)
        return _result(config, checkpoint.state_path or "", checkpoint.sampler_path or "", {})
    from tinker_cookbook import tokenizer_utils

    tokenizer = tokenizer_utils.get_tokenizer(config.model_name)
    with open_loggers(config, start_step) as metrics:
        async with open_service_client(connection, config, config.recipe_name) as service_client:
            loop = Loop(
                config,
                await _open_run(config, service_client, checkpoint, metrics),
                dataset,
                tokenizer,
                total_steps=total_steps,
                context_window=await asyncio.to_thread(_context_window, connection, config),
                kl_reference_client=await _create_reference(service_client, config),
            )
            loop.add_held_out(test_dataset)
            result = await _train(loop, start_step)
            await report_saved(service_client, config.log_path)
            return result


async def _open_run(
    config: Config,
    service_client: tinker.ServiceClient,
    checkpoint: CheckpointRecord | None,
    metrics: object,
) -> TrainingRun:
    training_client = await create_training_client(
        service_client, config, checkpoint, renderer_name=config.renderer_name
    )
    return TrainingRun(service_client, training_client, metrics)  # pyright: ignore[reportArgumentType]


async def _train(loop: Loop, start_step: int) -> RunResult:
    loop.start(start_step)
    try:
        if loop.config.async_config is not None:
            sampling_client = await do_async_training(loop, start_step)
        elif loop.config.stream_minibatch_config is not None:
            sampling_client = await do_sync_training_with_stream_minibatch(loop, start_step)
        else:
            sampling_client = await do_sync_training(loop, start_step)
        paths, evaluated = await loop.end(sampling_client)
    finally:
        loop.close()
    return _result(loop.config, paths["state_path"], paths["sampler_path"], evaluated)


def _check_loss(config: Config, connection: service.Connection) -> None:
    """The service would refuse it too, but only after a batch has been sampled."""
    loss_fn = config.training_loss_fn()
    if connection.kind == "local" and not LOSSES[loss_fn].on_local_service:
        offered = ", ".join(name for name, loss in LOSSES.items() if loss.on_local_service)
        raise ConfigurationError(
            f"loss_fn={loss_fn} is not offered by the local service, since its formula is not "
            f"public; use one of {offered}, or another service."
        )


def _result(
    config: Config, state_path: str, sampler_path: str, metrics: dict[str, float]
) -> RunResult:
    records = checkpoint_utils.load_checkpoints_file(config.log_path)
    best = max(
        (record for record in records if record.has("best_value")),
        key=lambda record: record.get("best_value"),
        default=None,
    )
    best_path = best.sampler_path if best is not None else None
    return RunResult(
        config.log_path,
        config.model_name,
        state_path,
        sampler_path,
        best_path or sampler_path,
        metrics,
    )


def _count_steps(config: Config, dataset: RLDataset) -> int:
    num_batches = len(dataset)
    if config.async_config is not None and num_batches:
        num_groups = sum(len(dataset.get_batch(index)) for index in range(num_batches))
        num_batches = num_groups // config.async_config.groups_per_batch
    if num_batches == 0:
        raise ConfigurationError(
            "the data makes no whole batch; use more data, or fewer groups per batch."
        )
    return num_batches if config.max_steps is None else min(num_batches, config.max_steps)


async def _create_reference(
    service_client: tinker.ServiceClient, config: Config
) -> tinker.SamplingClient | None:
    reference = config.kl_reference_config
    if reference is None or not config.kl_penalty_coef:
        return None
    path = reference.load_checkpoint_path
    source: dict[str, Any] = (
        {"base_model": reference.base_model} if path is None else {"model_path": path}
    )
    created = await asyncio.to_thread(service_client.create_sampling_client, **source)
    # SDK 0.35 returned the client itself, later ones return a future of it.
    return await created if inspect.isawaitable(created) else created


def _context_window(connection: service.Connection, config: Config) -> int | None:
    """Tokens that prompt and reply may have together, as far as the service says."""
    for model in connection.capabilities().supported_models:
        if model.model_name == config.model_name:
            return getattr(model, "max_context_length", None)
    return None
