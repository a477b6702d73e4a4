"""Open a run: its directory, its loggers, its service, and a training client new or resumed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook import checkpoint_utils
from tinker_cookbook.exceptions import CheckpointError, ConfigurationError
from tinker_cookbook.runs import interrupts
from tinker_cookbook.runs.directory import truncate_metrics
from tinker_cookbook.runs.options import OptimizerOptions
from tinker_cookbook.service import Connection
from tinker_cookbook.unembedding import choose_train_unembed
from tinker_cookbook.utils import ml_log, trace
from tinker_cookbook.utils.sdk_sessions import SessionEnd, close_session
from tinker_cookbook.utils.session_naming import (
    RUN_NAME_METADATA_KEY,
    describe_session,
    name_run,
    resolve_session_display_name,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.checkpoint_utils import CheckpointRecord

__all__ = [
    "TrainingRun",
    "adam_params",
    "add_service_metrics",
    "build_checkpoint_manager",
    "create_training_client",
    "format_bytes",
    "open_loggers",
    "open_service_client",
    "report_saved",
    "service_message",
    "snapshot_weights",
]

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """What a train loop works with."""

    service_client: tinker.ServiceClient
    training_client: tinker.TrainingClient
    metrics: ml_log.Logger


@contextlib.contextmanager
def open_loggers(config: Any, resumed_step: int | None):
    """Open the loggers of a run directory, cut back to the step a run resumes at.

    Args:
        config: The settings, with `log_path` and those of `TrackingOptions`.
        resumed_step: The next step of a resumed run; None for a new one.
    """
    Path(config.log_path).mkdir(parents=True, exist_ok=True)
    dropped = truncate_metrics(config.log_path, resumed_step or 0)
    metrics = ml_log.setup_logging(
        config.log_path,
        wandb_project=config.wandb_project,
        wandb_name=config.wandb_name,
        config=config,
        print_metrics=False,
    )
    if dropped:
        logger.info("%d metric rows are dropped, their steps are done again", dropped)
    if getattr(config, "enable_trace", False):
        trace.trace_init(output_file=str(Path(config.log_path) / "trace_events.jsonl"))
    try:
        yield metrics
    finally:
        trace.trace_shutdown()
        metrics.close()
        ml_log.release_logging_module()


@contextlib.asynccontextmanager
async def open_service_client(
    connection: Connection, config: Any, recipe_name: str
) -> AsyncIterator[tinker.ServiceClient]:
    """A session on the service, marked as finished with the outcome of the block."""
    options = describe_session(recipe_name, config.log_path, config.learning_rate)
    chosen = resolve_session_display_name(
        session_name=config.session_name, wandb_name=config.wandb_name
    )
    options["display_name"] = chosen or options["display_name"]
    client = await asyncio.to_thread(connection.service_client, **options)
    dashboard = await asyncio.to_thread(connection.describe_dashboard)
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


async def create_training_client(
    service_client: tinker.ServiceClient,
    config: Any,
    checkpoint: CheckpointRecord | None,
    *,
    renderer_name: str | None = None,
) -> tinker.TrainingClient:
    """Create the run on the service: resumed, from given weights, or new.

    Args:
        service_client: The session.
        config: Settings with `model_name`, `lora_rank`, `train_unembed`, `seed` and
            `load_checkpoint_path`.
        checkpoint: Where an interrupted run goes on, with its optimizer; None if there is none.
        renderer_name: Stored with the run, and compared with that of the given weights.

    Raises:
        CheckpointError: if the service no longer has the checkpoint of the run.
        ConfigurationError: if the service refuses the model, the rank or the given weights.
    """
    client = await _open_training_client(service_client, config, checkpoint, renderer_name)
    interrupts.mark_begun()
    return client


async def _open_training_client(
    service_client: tinker.ServiceClient,
    config: Any,
    checkpoint: CheckpointRecord | None,
    renderer_name: str | None,
) -> tinker.TrainingClient:
    recipe_name, rate = getattr(config, "recipe_name", ""), getattr(config, "learning_rate", None)
    metadata = {RUN_NAME_METADATA_KEY: name_run(recipe_name, config.log_path, rate)}
    checkpoint_utils.add_renderer_name_to_user_metadata(metadata, renderer_name)
    if checkpoint is not None:
        assert checkpoint.state_path is not None, "a run resumes from a record with a state"
        return await _create(
            service_client.create_training_client_from_state_with_optimizer,
            checkpoint.state_path,
            log_path=config.log_path,
            user_metadata=metadata,
        )
    start_path = config.load_checkpoint_path
    if start_path is not None:
        client = await _create(
            service_client.create_training_client_from_state, start_path, user_metadata=metadata
        )
        await checkpoint_utils.check_renderer_name_for_checkpoint_async(
            service_client, start_path, renderer_name
        )
        return client
    return await _create(
        service_client.create_lora_training_client,
        config.model_name,
        rank=config.lora_rank,
        seed=config.seed,
        train_unembed=await asyncio.to_thread(
            choose_train_unembed, config.model_name, config.train_unembed
        ),
        user_metadata=metadata,
    )


async def _create(
    create: Callable[..., Any], source: str, *, log_path: str | None = None, **kwargs: Any
) -> tinker.TrainingClient:
    import tinker

    try:
        created = await asyncio.to_thread(create, source, **kwargs)
        # SDK 0.35 returned the client itself, later ones return a future of it.
        return await created if isinstance(created, tinker.APIFuture) else created
    except (tinker.TinkerError, ValueError) as error:
        if log_path is not None:
            raise CheckpointError(
                f"log_path={log_path} cannot be resumed: {source} cannot be loaded "
                f"({service_message(error)}) It may have expired, or be on another service "
                "(base_url); to start anew: behavior_if_log_dir_exists=delete."
            ) from error
        raise ConfigurationError(
            f"the service cannot train {source}: {service_message(error)}"
        ) from error


def adam_params(config: OptimizerOptions, learning_rate: float) -> tinker.AdamParams:
    """The optimizer's settings for a step whose learning rate the schedule has given."""
    import tinker

    return tinker.AdamParams(
        learning_rate=learning_rate,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        grad_clip_norm=config.grad_clip_norm,
    )


def build_checkpoint_manager(config: Any, run: TrainingRun) -> checkpoint_utils.CheckpointManager:
    """What saves a run; the config has `log_path` and those of `CheckpointOptions`."""
    return checkpoint_utils.CheckpointManager(
        run.training_client,
        run.service_client,
        config.log_path,
        save_every=config.save_every,
        save_every_tokens=config.save_every_tokens,
        save_every_seconds=config.save_every_seconds,
        ttl_seconds=config.ttl_seconds,
        rolling_save_every=config.rolling_save_every,
        rolling_ttl_seconds=config.rolling_ttl_seconds,
        async_periodic_saves=config.async_periodic_saves,
        keep_checkpoints=config.keep_checkpoints,
    )


async def report_saved(service_client: tinker.ServiceClient, log_path: str) -> None:
    """Print how many checkpoints of a run the service keeps, and how large they are."""
    import tinker

    records = checkpoint_utils.load_checkpoints_file(log_path)
    paths = [path for record in records for path in (record.state_path, record.sampler_path)]
    run_ids = {path.removeprefix("tinker://").partition("/")[0] for path in paths if path}
    rest = checkpoint_utils.rest_client_of(service_client)
    try:
        answers = [await rest.list_checkpoints(run_id) for run_id in sorted(run_ids)]
    except (tinker.TinkerError, ValueError) as error:
        logger.info("the checkpoints could not be listed: %s", error)
        return
    sizes = [found.size_bytes or 0 for answer in answers for found in answer.checkpoints]
    command = shlex.join(["tinker-cookbook", "clean", log_path])
    print(
        f"saved    {len(sizes)} checkpoints, {format_bytes(sum(sizes))} on the service "
        f"({command} lists those that can go)",
        flush=True,
    )


def format_bytes(num_bytes: float) -> str:
    """`1.2 GB`, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("the last unit takes any size")


async def snapshot_weights(
    training_client: tinker.TrainingClient, **options: Any
) -> tinker.SamplingClient:
    """A sampling client of the weights as they are after everything submitted so far.

    Args:
        training_client: The run.
        options: Passed to `save_weights_and_get_sampling_client`.
    """
    import tinker

    created = await asyncio.to_thread(
        training_client.save_weights_and_get_sampling_client, **options
    )
    # SDK 0.35 returned the client itself, later ones return a future of it.
    return await created if isinstance(created, tinker.APIFuture) else created


def service_message(error: Exception) -> str:
    """What the service said, without the SDK's description of the request around it."""
    body = getattr(error, "body", None)  # of an HTTP error
    if isinstance(body, dict) and isinstance(body.get("detail"), str):
        return body["detail"].rstrip(". ") + "."
    text = str(error).partition(" for self.request_id=")[0]
    return text.removeprefix("Request failed: ").rstrip(". ") + "."


def add_service_metrics(metrics: dict[str, Any], found: dict[str, float] | None) -> None:
    """Take over what the service measured; the sums of several calls add up."""
    for key, value in (found or {}).items():
        metrics[key] = metrics.get(key, 0.0) + value if key.endswith(":sum") else value
