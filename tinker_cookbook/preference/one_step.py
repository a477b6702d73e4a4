"""Clients and single steps of DPO, for programs that write out the loop.

`train_dpo.main` does the same faster: the reference scores ahead, and each completion once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.eval.evaluators import Evaluator
from tinker_cookbook.preference.loop import LoopConfig
from tinker_cookbook.preference.losses import dpo
from tinker_cookbook.preference.pair_gradients import submit_pair_gradient
from tinker_cookbook.preference.pair_metrics import compute_pair_metrics
from tinker_cookbook.runs.checkpoint_manager import CheckpointManager
from tinker_cookbook.runs.checkpoints import CheckpointRecord
from tinker_cookbook.runs.training_client import build_adam_params
from tinker_cookbook.supervised.train import due_evaluators, run_evals
from tinker_cookbook.supervised.types import SupervisedDataset
from tinker_cookbook.utils import ml_log
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier
from tinker_cookbook.utils.sdk_compat import wait_for_client

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["create_dpo_clients", "do_update"]


def create_dpo_clients(
    config: LoopConfig,
    service_client: tinker.ServiceClient,
    resume_info: CheckpointRecord | None = None,
    user_metadata: dict[str, str] | None = None,
) -> tuple[tinker.TrainingClient, tinker.SamplingClient]:
    """Create the model in training and its reference.

    Args:
        config: Settings of the run.
        service_client: The service.
        resume_info: Checkpoint to resume from; None starts at `config.load_checkpoint_path` or at a
            new adapter.
        user_metadata: Recorded with the run on the service.

    Returns:
        The training client, and a sampling client of the model that the run started from. That is
        not the model of `resume_info`, so a resumed run keeps its reference.
    """

    def create_new() -> tinker.TrainingClient:
        return wait_for_client(
            service_client.create_lora_training_client(
                config.model_name, rank=config.lora_rank, user_metadata=user_metadata
            )
        )

    def load(path: str) -> tinker.TrainingClient:
        return wait_for_client(
            service_client.create_training_client_from_state(path, user_metadata=user_metadata)
        )

    start = config.load_checkpoint_path
    if resume_info is not None and resume_info.state_path is not None:
        training = wait_for_client(
            service_client.create_training_client_from_state_with_optimizer(
                resume_info.state_path, user_metadata=user_metadata
            )
        )
    else:
        training = create_new() if start is None else load(start)
    if start is None:
        created = service_client.create_sampling_client(base_model=config.model_name)
        return training, wait_for_client(created)
    original = training if resume_info is None else load(start)
    return training, wait_for_client(original.save_weights_and_get_sampling_client())


def do_update(
    epoch_idx: int,
    batch_idx: int,
    n_batches: int,
    total_steps: int,
    config: LoopConfig,
    training_client: tinker.TrainingClient,
    reference_client: tinker.SamplingClient,
    evaluators: list[Evaluator],
    infrequent_evaluators: list[Evaluator],
    dataset: SupervisedDataset,
    ml_logger: ml_log.Logger,
    log_path: str,
    tokenizer: Tokenizer,
    checkpoint_mgr: CheckpointManager | None = None,
) -> None:
    """Save and evaluate if that is due, then take one DPO step and log its metrics.

    Args:
        epoch_idx: The epoch.
        batch_idx: The batch in the epoch.
        n_batches: Batches per epoch.
        total_steps: Steps of the whole run.
        config: Settings of the run.
        training_client: The model in training.
        reference_client: The reference model.
        evaluators: Run every `config.eval_every` steps.
        infrequent_evaluators: Run every `config.infrequent_eval_every` steps.
        dataset: Batches of chosen and rejected completions in turns.
        ml_logger: Takes the metrics.
        log_path: Accepted for older programs; not used.
        tokenizer: Accepted for older programs; not used.
        checkpoint_mgr: Saves the state from before the step.
    """
    del log_path, tokenizer
    step = epoch_idx * n_batches + batch_idx
    if checkpoint_mgr is not None and step > 0:
        checkpoint_mgr.maybe_save(step, {"epoch": epoch_idx, "batch": batch_idx})
    due = due_evaluators(
        step,
        total_steps,
        (evaluators, config.eval_every),
        (infrequent_evaluators, config.infrequent_eval_every),
    )
    multiplier = compute_schedule_lr_multiplier(config.lr_schedule, step, total_steps)
    learning_rate = config.learning_rate * multiplier
    data = dataset.get_batch(batch_idx)

    async def update() -> dict[str, float]:
        evaluated = await run_evals(due, training_client, step) if due else {}
        reference = await _score(reference_client, data)
        submitted = await submit_pair_gradient(
            training_client, data, reference, dpo(beta=config.dpo_beta)
        )
        optimizer = training_client.optim_step(build_adam_params(config, learning_rate))
        for gradient in submitted.gradients:
            await gradient
        found = compute_pair_metrics(submitted.batch, submitted.loss, config.dpo_beta)
        return {**found, **((await optimizer).metrics or {}), **evaluated}

    metrics = asyncio.run(update())
    progress = {"epoch": epoch_idx, "progress": step / total_steps, "learning_rate": learning_rate}
    num_tokens = sum(datum.model_input.length for datum in data)
    ml_logger.log_metrics({**metrics, **progress, "num_tokens": num_tokens}, step=step)


async def _score(client: tinker.SamplingClient, data: list[tinker.Datum]) -> np.ndarray:
    """Return the sequence log probability of each datum under a sampling client, float64 [N]."""
    import tinker

    waiting = []
    for datum in data:
        last = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])
        tokens = [*datum.model_input.to_ints(), last]
        waiting.append(client.compute_logprobs(tinker.ModelInput.from_ints(tokens)))
    found = [await future for future in waiting]
    return np.array(
        [
            np.dot(
                datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64),
                np.array(logprobs[1:], np.float64),
            )
            for datum, logprobs in zip(data, found, strict=True)
        ]
    )
