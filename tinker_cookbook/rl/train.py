"""Reinforcement learning: open a run and choose its loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from tinker_cookbook import service
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
from tinker_cookbook.rl.loop import SHOWN, Loop
from tinker_cookbook.rl.optimize import train_step
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.rollouts import set_rollout_executor
from tinker_cookbook.rl.stream_training import do_sync_training_with_stream_minibatch
from tinker_cookbook.rl.sync_training import do_sync_training
from tinker_cookbook.rl.types import RLDataset, TrajectoryGroup
from tinker_cookbook.runs.checkpoint_manager import CheckpointManager
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.runs.training_client import snapshot_weights
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.utils.misc_utils import timed
from tinker_cookbook.utils.sdk_compat import create_client

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "AsyncConfig",
    "Config",
    "KLReferenceConfig",
    "RunOptions",
    "RunResult",
    "StreamMinibatchConfig",
    "choose_loop",
    "context_window",
    "count_work",
    "gather_with_progress",
    "main",
    "print_group",
    "save_checkpoint_and_get_sampling_client",
    "train_step",
]

T = TypeVar("T")


async def main(config: Config, rollout_executor: Executor | None = None) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Args:
        config: Everything about the run.
        rollout_executor: Executor of the rollouts; None: this process's event loop.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    set_rollout_executor(rollout_executor)
    async with open_run(config, config.recipe_name) as run:
        dataset, test_dataset = await _open_data(config)
        _check_loss(config, run.connection)
        has_begun = await run.begin(
            _count_steps(config, dataset), renderer_name=config.renderer_name, shown=SHOWN
        )
        if not has_begun:
            return run.result()
        loop = Loop(
            run,
            dataset,
            context_window=await asyncio.to_thread(context_window, run),
            kl_reference_client=await _create_reference(run),
        )
        loop.add_held_out(test_dataset)
        return await loop.end(await choose_loop(config)(loop, run.start_step))


async def count_work(config: Config) -> Workload:
    """Count the steps and the groups of a run, without a service; nothing is sampled."""
    dataset, test_dataset = await _open_data(config)
    total_steps = _count_steps(config, dataset)
    if config.async_config is not None:
        num_groups = total_steps * config.async_config.groups_per_batch
    else:
        num_groups = sum(len(dataset.get_batch(index)) for index in range(total_steps))
    held_out = _count_episodes(test_dataset) if test_dataset and config.eval_every else 0
    return Workload(total_steps=total_steps, num_rows=num_groups, num_held_out_episodes=held_out)


def _count_episodes(dataset: RLDataset) -> int:
    """Return the number of episodes, with one per group whose size is not known in advance."""
    batches = (dataset.get_batch(index) for index in range(len(dataset)))
    return sum(getattr(group, "num_envs", 1) for batch in batches for group in batch)


async def _open_data(config: Config) -> tuple[RLDataset, RLDataset | None]:
    dataset, test_dataset = await config.dataset_builder()
    if config.num_epochs > 1:
        dataset = EpochCycledRLDataset(dataset, config.num_epochs, config.seed)
    return dataset, test_dataset


def choose_loop(config: Config) -> Callable[[Loop, int], Awaitable[tinker.SamplingClient]]:
    """Return the loop that the settings ask for; it returns the final weights."""
    if config.async_config is not None:
        return do_async_training
    if config.stream_minibatch_config is not None:
        return do_sync_training_with_stream_minibatch
    return do_sync_training


async def gather_with_progress(coroutines: Iterable[Coroutine[Any, Any, T]], desc: str) -> list[T]:
    """Run coroutines concurrently with a progress bar; an error in one cancels the others."""
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
    checkpoint_mgr: CheckpointManager,
    i_batch: int,
    start_batch: int = 0,
    record_stability_info: bool = False,
) -> tuple[tinker.SamplingClient, dict[str, Any]]:
    """Save the checkpoint that is due after `i_batch` steps, and snapshot the weights.

    For programs with a loop that is not based on `open_run`.

    Args:
        training_client: The training client of the run.
        checkpoint_mgr: Decides what is due, and writes the record with `i_batch` as next batch.
        i_batch: Number of steps done.
        start_batch: First step of this process; nothing is saved again at that step.
        record_stability_info: Ask the service to record its samples, for losses that need it.

    Returns:
        The sampling client, and a metric with the seconds that saving took.
    """
    metrics: dict[str, Any] = {}
    with timed("save_checkpoint", metrics):
        if i_batch > start_batch:
            await checkpoint_mgr.maybe_save_async(i_batch, {"batch": i_batch})
        options = {"record_stability_info": True} if record_stability_info else {}
        client = await snapshot_weights(training_client, **options)
    return client, metrics


def _check_loss(config: Config, connection: service.Connection) -> None:
    """Refuse a loss that the service lacks; the service would do so only after sampling a batch."""
    loss_fn = config.training_loss_fn()
    if connection.kind == "local" and not LOSSES[loss_fn].on_local_service:
        offered = ", ".join(name for name, loss in LOSSES.items() if loss.on_local_service)
        raise ConfigurationError(
            f"loss_fn={loss_fn} is not offered by the local service, since its formula is not "
            f"public; use one of {offered}, or another service."
        )


def _count_steps(config: Config, dataset: RLDataset) -> int:
    num_batches = len(dataset)
    if config.async_config is not None and num_batches:
        num_groups = sum(len(dataset.get_batch(index)) for index in range(num_batches))
        num_batches = num_groups // config.async_config.groups_per_batch
    if num_batches == 0:
        raise ConfigurationError(
            "the data has too few tasks for one batch; use more data, or fewer groups per batch."
        )
    return num_batches if config.max_steps is None else min(num_batches, config.max_steps)


async def _create_reference(run: Run[Config]) -> tinker.SamplingClient | None:
    """Return the model that the KL penalty compares with; None without a penalty."""
    reference = run.config.kl_reference_config
    if reference is None or not run.config.kl_penalty_coef:
        return None
    path = reference.load_checkpoint_path
    source = {"base_model": reference.base_model} if path is None else {"model_path": path}
    return await create_client(run.service_client.create_sampling_client, **source)


def context_window(run: Run[Any]) -> int | None:
    """Return the maximum tokens of prompt and reply together; None if the service does not say."""
    return run.connection.context_window()
