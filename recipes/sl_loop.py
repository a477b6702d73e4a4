"""Supervised fine-tuning with the loop written out: every call of the SDK is in this file.

    python -m recipes.sl_loop                                 # the default model, on this machine
    python -m recipes.sl_loop data=chats.jsonl num_epochs=2
    python -m recipes.sl_loop base_url=https://... model_name=Qwen/Qwen3-8B

It does what sl_basic does, without a framework. The same command again resumes a stopped run.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook import checkpoint_utils, cli_utils, service
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder, read_samples
from tinker_cookbook.runs.directory import default_log_path, open_log_dir, truncate_metrics
from tinker_cookbook.runs.options import LogdirBehavior, check_options, check_row_length
from tinker_cookbook.runs.report import report_complete, report_run, sample_command
from tinker_cookbook.supervised.common import compute_bpb, compute_mean_nll
from tinker_cookbook.supervised.sources.data_spec import data_name
from tinker_cookbook.supervised.sources.options import DataOptions
from tinker_cookbook.unembedding import choose_train_unembed
from tinker_cookbook.utils import ml_log
from tinker_cookbook.utils.sdk_futures import wait_for_client
from tinker_cookbook.utils.session_naming import describe_session

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.supervised import SupervisedDataset

PROMPT = "How do I keep bread fresh?"  # answered before and after
Metrics = dict[str, float]
SEVEN_DAYS = 7 * 24 * 3600  # how long the service keeps a checkpoint, in seconds


@chz.chz
class Config(DataOptions):
    """The settings of this recipe."""

    model_name: str | None = chz.field(default=None, doc="Base model; default: the service's.")
    renderer_name: str | None = chz.field(default=None, doc="Chat format; default: the model's.")
    base_url: str | None = chz.field(default=None, doc="URL of a Tinker service, or `local`.")
    log_path: str | None = chz.field(default=None, doc="Run directory; default: in ~/tinker-runs.")
    test_size: int = chz.field(default=32, doc="Number of held-out conversations.")
    batch_size: int = chz.field(default=8, doc="Conversations per optimizer step.")
    max_length: int = chz.field(default=1024, doc="Tokens after which a conversation is cut.")
    num_epochs: int = chz.field(default=1, doc="Number of passes over the data.")
    learning_rate: float | None = chz.field(
        default=None, doc="Peak learning rate; default: hyperparam_utils.get_lr of the model."
    )
    lora_rank: int = chz.field(default=32, doc="Rank of the LoRA adapter.")
    save_every: int = chz.field(default=20, doc="Steps between checkpoints; 0: only at the end.")
    max_steps: int | None = chz.field(default=None, doc="Maximum number of optimizer steps.")
    seed: int = chz.field(default=0, doc="Seed of the adapter's first weights and the data order.")
    behavior_if_log_dir_exists: LogdirBehavior = chz.field(
        default="ask", doc="What to do if log_path holds a run: ask, resume, delete or raise."
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)


def main(config: Config) -> None:
    """Connect, prepare the data, train, and print the result."""
    model_name = service.resolve_model(config.base_url, config.model_name)
    bundled = cli_utils.bundled_file("conversations.jsonl", __file__)
    names = ("sl_loop", data_name(config.data_or(bundled)), Path(model_name).name)
    log_path = config.log_path or default_log_path(*names, config=config)
    with open_log_dir(log_path, config.behavior_if_log_dir_exists, config):
        print(f"run      {log_path}", flush=True)
        with service.connect(config.base_url, model_name) as connection:
            print(connection.describe(), flush=True)
            sampler_path = train(config, connection, config.data_or(bundled), log_path)
    command = sample_command(sampler_path, model_name=model_name, base_url=config.base_url)
    report_run(log_path, sampler_path, read_samples(log_path), command)


def train(config: Config, connection: service.Connection, data: str, log_path: str) -> str:
    """Train, and return the path of the trained weights."""
    import tinker

    from tinker_cookbook import hyperparam_utils, model_info, tokenizer_utils

    # The data: rows become datums, that is tokens with a weight for each.
    model_name = connection.model_name
    tokenizer = tokenizer_utils.get_tokenizer(model_name)
    renderer_name = config.renderer_name or model_info.get_recommended_renderer_name(model_name)
    answer = SampleEvaluatorBuilder(
        prompts=[PROMPT], model_name=model_name, renderer_name=renderer_name, log_path=log_path
    )()
    train_data, test_data = open_datasets(config, data, model_name, renderer_name)
    steps_per_epoch = len(train_data)
    total_steps = min(steps_per_epoch * config.num_epochs, config.max_steps or 10**9)
    peak_rate = config.learning_rate or hyperparam_utils.get_lr(model_name)

    # Start a new run, or resume from the last checkpoint.
    check_row_length(config, model_name, connection.context_window())
    service_client = connection.service_client(**describe_session("sl_loop", log_path, peak_rate))
    checkpoint = checkpoint_utils.get_last_checkpoint(log_path)
    if checkpoint is not None and checkpoint.final:
        report_complete(log_path)
        return checkpoint.sampler_path or ""
    if checkpoint is not None:
        start_step, state_path = checkpoint.get("step"), checkpoint.state_path or ""
        created = service_client.create_training_client_from_state_with_optimizer(state_path)
        print(f"resumed  after step {start_step} of {total_steps}")
    else:
        start_step, unembed = 0, choose_train_unembed(model_name)
        created = service_client.create_lora_training_client(
            model_name, config.lora_rank, seed=config.seed, train_unembed=unembed
        )
    training_client = wait_for_client(created)
    truncate_metrics(log_path, start_step)
    metrics_log = ml_log.JsonLogger(log_path)
    metrics_log.log_hparams(config)
    snapshot = training_client.save_weights_and_get_sampling_client

    # The loop. Both calls of a step are submitted before either result is awaited.
    for step in range(start_step, total_steps):
        metrics = {}
        if step == 0:
            metrics = evaluate(training_client, test_data, tokenizer)
            asyncio.run(answer(wait_for_client(snapshot())))
        epoch, batch_index = divmod(step, steps_per_epoch)
        if batch_index == 0 or step == start_step:
            train_data.set_epoch(config.seed + epoch)  # every epoch has its own order
        batch = train_data.get_batch(batch_index)
        learning_rate = peak_rate * (1 - step / total_steps)
        gradient = training_client.forward_backward(batch, "cross_entropy")
        update = training_client.optim_step(tinker.AdamParams(learning_rate=learning_rate))
        result = gradient.result()
        update.result()

        metrics |= {"learning_rate": learning_rate, "epoch": epoch}
        metrics |= loss_metrics(result, batch, tokenizer, "train_mean_")
        metrics_log.log_metrics(metrics, step=step)
        print(f"step {step + 1}/{total_steps}  loss {metrics['train_mean_nll']:.4f}", flush=True)
        if config.save_every and (step + 1) % config.save_every == 0 and step + 1 < total_steps:
            done = step + 1
            checkpoint_utils.save_checkpoint(
                training_client, f"{done:06d}", log_path, {"step": done}, ttl_seconds=SEVEN_DAYS
            )

    # The end: the held-out loss and a sample, then the training state and the sampler weights.
    train_data.close()
    metrics_log.log_metrics(evaluate(training_client, test_data, tokenizer), step=total_steps)
    asyncio.run(answer(wait_for_client(snapshot())))
    end = {"step": total_steps, "final": True}
    paths = checkpoint_utils.save_checkpoint(training_client, "final", log_path, end, "both")
    return paths["sampler_path"]


def open_datasets(
    config: Config, data: str, model_name: str, renderer_name: str
) -> tuple[SupervisedDataset, list[tinker.Datum]]:
    """Return the training data, whose batches are made on demand, and the held-out datums."""
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised import ChatDatasetBuilderCommonConfig
    from tinker_cookbook.supervised import FromConversationFileBuilder as Builder

    common_config = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model_name,
        renderer_name=renderer_name,
        max_length=config.max_length,
        batch_size=config.batch_size,
        train_on_what=TrainOnWhat(config.train_on_what),
    )
    options = {name: getattr(config, name) for name in ("test_size", "markup", "mix_until")}
    train_data, test_data = Builder(file_path=data, common_config=common_config, **options)()
    print(*(f"data     {line}" for line in train_data.summary), sep="\n", flush=True)
    return train_data, [] if test_data is None else test_data.get_batch(0)


def evaluate(client: tinker.TrainingClient, data: list[tinker.Datum], tokenizer: Any) -> Metrics:
    """Compute the loss on held-out conversations, without gradients."""
    if not data:
        return {}
    result = client.forward(data, "cross_entropy").result()
    return loss_metrics(result, data, tokenizer, "test/")


def loss_metrics(result: Any, data: list[tinker.Datum], tokenizer: Any, prefix: str) -> Metrics:
    """Compute the mean loss per trained token, and the bits per byte of the trained text."""
    logprobs = [output["logprobs"] for output in result.loss_fn_outputs]
    weights = [datum.loss_fn_inputs["weights"] for datum in data]
    targets = [datum.loss_fn_inputs["target_tokens"] for datum in data]
    return {
        f"{prefix}nll": compute_mean_nll(logprobs, weights),
        f"{prefix}bpb": compute_bpb(logprobs, weights, targets, tokenizer),
    }


if __name__ == "__main__":
    cli_utils.entrypoint(main)
