"""The training client of a run: create or resume it, its optimizer settings, its snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook import checkpoint_utils
from tinker_cookbook.exceptions import CheckpointError, ConfigurationError, TrainingError
from tinker_cookbook.runs import interrupts
from tinker_cookbook.runs.options import ModelOptions, OptimizerOptions
from tinker_cookbook.unembedding import choose_train_unembed
from tinker_cookbook.utils.sdk_compat import create_client, service_message
from tinker_cookbook.utils.session_naming import RUN_NAME_METADATA_KEY

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.runs.checkpoints import CheckpointRecord

__all__ = [
    "add_service_metrics",
    "build_adam_params",
    "create_training_client",
    "failed_step",
    "snapshot_weights",
]


def failed_step(error: Exception, step: int | None = None) -> TrainingError:
    """Return the error of a training step that the service refused or could not do."""
    name = "the training step" if step is None else f"step {step}"
    return TrainingError(
        f"{name} failed on the service: {service_message(error)} The same command resumes from the "
        "last checkpoint. If this names a fault of the data or a setting, correct that first "
        "(max_length=... cuts long rows)."
    )


async def create_training_client(
    service_client: tinker.ServiceClient,
    config: ModelOptions,
    checkpoint: CheckpointRecord | None,
    *,
    run_name: str,
    renderer_name: str | None = None,
) -> tinker.TrainingClient:
    """Create the training client: resumed from a checkpoint, from given weights, or new.

    Args:
        service_client: The session.
        config: Says which model, adapter and weights.
        checkpoint: The checkpoint of the interrupted run, which is loaded with its optimizer;
            None for a new run.
        run_name: Recorded with the run on the service.
        renderer_name: Recorded as well, and compared with the renderer of the given weights.

    Raises:
        CheckpointError: if the service no longer has the checkpoint of the run.
        ConfigurationError: if the service refuses the model, the rank or the given weights.
    """
    metadata = {RUN_NAME_METADATA_KEY: run_name}
    checkpoint_utils.add_renderer_name_to_user_metadata(metadata, renderer_name)
    if checkpoint is not None:
        client = await _resume(service_client, checkpoint, metadata, config.log_path)
    elif config.load_checkpoint_path is not None:
        path = config.load_checkpoint_path
        _refuse_folder(path)
        client = await _create(
            service_client.create_training_client_from_state,
            path,
            setting="load_checkpoint_path",
            user_metadata=metadata,
        )
        await checkpoint_utils.check_renderer_name_for_checkpoint_async(
            service_client, path, renderer_name
        )
    else:
        client = await _create_new(service_client, config, metadata)
    interrupts.mark_begun()
    return client


def _refuse_folder(path: str) -> None:
    if Path(path).expanduser().is_dir():
        raise ConfigurationError(
            f"load_checkpoint_path={path} is a folder; it must be a tinker:// path. "
            f"`tinker-cookbook import {path}` stores a PEFT adapter on the local service and "
            "prints its path."
        )


async def _resume(
    service_client: tinker.ServiceClient,
    checkpoint: CheckpointRecord,
    metadata: dict[str, str],
    log_path: str | None,
) -> tinker.TrainingClient:
    import tinker

    path = checkpoint.state_path
    assert path is not None, "a run resumes from a record with a state"
    load = service_client.create_training_client_from_state_with_optimizer
    try:
        return await create_client(load, path, user_metadata=metadata)
    except (tinker.TinkerError, ValueError) as error:
        raise CheckpointError(
            f"log_path={log_path} cannot be resumed: {path} cannot be loaded "
            f"({service_message(error)}) It may have expired, or be on another service "
            "(base_url). To start over: behavior_if_log_dir_exists=delete."
        ) from error


async def _create_new(
    service_client: tinker.ServiceClient, config: ModelOptions, metadata: dict[str, str]
) -> tinker.TrainingClient:
    assert config.model_name is not None, "the model is chosen before the run"
    train_unembed = await asyncio.to_thread(
        choose_train_unembed, config.model_name, config.train_unembed
    )
    return await _create(
        service_client.create_lora_training_client,
        config.model_name,
        setting="model_name",
        rank=config.lora_rank,
        seed=config.seed,
        train_unembed=train_unembed,
        user_metadata=metadata,
    )


async def _create(
    create: Callable[..., Any], source: str, *, setting: str, **options: object
) -> tinker.TrainingClient:
    import tinker

    try:
        return await create_client(create, source, **options)
    except (tinker.TinkerError, ValueError) as error:
        raise ConfigurationError(
            f"{setting}={source} cannot be trained: {service_message(error)}"
        ) from error


def build_adam_params(config: OptimizerOptions, learning_rate: float) -> tinker.AdamParams:
    """Return the optimizer's settings for a step with the given learning rate."""
    import tinker

    return tinker.AdamParams(
        learning_rate=learning_rate,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        grad_clip_norm=config.grad_clip_norm,
    )


async def snapshot_weights(
    training_client: tinker.TrainingClient, **options: Any
) -> tinker.SamplingClient:
    """Return a sampling client of the weights after all requests submitted so far.

    Args:
        training_client: The training client of the run.
        options: Passed to `save_weights_and_get_sampling_client`.
    """
    return await create_client(training_client.save_weights_and_get_sampling_client, **options)


def add_service_metrics(metrics: dict[str, Any], found: Mapping[str, float] | None) -> None:
    """Add what the service measured to `metrics`; sums of several calls add up."""
    for key, value in (found or {}).items():
        metrics[key] = metrics.get(key, 0.0) + value if key.endswith(":sum") else value
