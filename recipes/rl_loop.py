"""Reinforcement learning with the loop written out: every call of the SDK is in this file.

    python -m recipes.rl_loop                                 # the default model, on this machine
    python -m recipes.rl_loop base_url=https://... model_name=Qwen/Qwen3-8B

It does what rl_basic does, without a framework: sample several replies to each prompt, reward them,
compare each with the other replies to its prompt, and make the better ones more likely. Task and
settings are those of rl_basic. The same command again resumes a stopped run.

Expect the held-out reward to rise from 0.25 (standard error 0.03) to 0.89 (0.02) in 40 steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz
import numpy as np

from tinker_cookbook import checkpoint_utils, cli_utils, service
from tinker_cookbook.eval.samples import read_samples, record_sample
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.directory import default_log_path, open_log_dir, truncate_metrics
from tinker_cookbook.runs.options import LogdirBehavior, check_options
from tinker_cookbook.runs.report import report_complete, report_run, sample_command
from tinker_cookbook.unembedding import choose_train_unembed
from tinker_cookbook.utils import ml_log
from tinker_cookbook.utils.sdk_futures import wait_for_client
from tinker_cookbook.utils.session_naming import describe_session

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

TOPICS = """apples bees birds boats books bread bridges castles cats clocks clouds coffee dogs farms
fire fish forests gardens gold hats honey horses islands kites lamps lions maps money music night
oceans owls paper pianos planets rain rivers roads roses sand ships snow stars stones""".split()
Prompts = list[tuple[str, int]]  # a question, and how many words it asks for
HELD_OUT, TRAINED = TOPICS[::5], [topic for i, topic in enumerate(TOPICS) if i % 5]


@chz.chz
class Config:
    """The settings of this recipe."""

    model_name: str | None = chz.field(default=None, doc="Base model; default: the service's.")
    renderer_name: str | None = chz.field(default=None, doc="Chat format; default: the model's.")
    base_url: str | None = chz.field(default=None, doc="URL of a Tinker service, or `local`.")
    log_path: str | None = chz.field(default=None, doc="Run directory; default: in ~/tinker-runs.")
    groups_per_batch: int = chz.field(default=4, doc="Prompts per step.")
    group_size: int = chz.field(default=8, doc="Replies sampled per prompt.")
    max_steps: int = chz.field(default=40, doc="Number of steps.")
    max_tokens: int = chz.field(default=24, doc="Maximum number of tokens per reply.")
    learning_rate: float = chz.field(default=5e-4, doc="Constant learning rate.")
    lora_rank: int = chz.field(default=32, doc="Rank of the LoRA adapter.")
    save_every: int = chz.field(default=20, doc="Steps between checkpoints; 0: only at the end.")
    seed: int = chz.field(default=0, doc="Seed of the adapter, the prompts and the samples.")
    behavior_if_log_dir_exists: LogdirBehavior = chz.field(
        default="ask", doc="What to do if log_path holds a run: ask, resume, delete or raise."
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        if self.group_size < 2:
            raise ConfigurationError(
                f"group_size={self.group_size} gives every advantage 0; use 2 or more."
            )


def reward(reply: str, num_words: int) -> float:
    """Return 1 for exactly `num_words` words, falling to 0 at none or twice as many."""
    found = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", reply))
    return max(0.0, 1.0 - abs(found - num_words) / num_words)


def main(config: Config) -> None:
    """Connect, train, and print the result."""
    model_name = service.resolve_model(config.base_url, config.model_name)
    log_path = config.log_path or default_log_path("rl_loop", Path(model_name).name, config=config)
    with open_log_dir(log_path, config.behavior_if_log_dir_exists, config):
        print(f"run      {log_path}", flush=True)
        with service.connect(config.base_url, model_name) as connection:
            print(connection.describe(), flush=True)
            sampler_path = train(config, connection, log_path)
    command = sample_command(sampler_path, model_name=model_name, base_url=config.base_url)
    report_run(log_path, sampler_path, read_samples(log_path), command)


def train(config: Config, connection: service.Connection, log_path: str) -> str:
    """Train, and return the path of the trained weights."""
    import tinker

    from tinker_cookbook import model_info, renderers, tokenizer_utils

    model_name = connection.model_name
    name = config.renderer_name or model_info.get_recommended_renderer_name(model_name)
    renderer = renderers.get_renderer(name, tokenizer_utils.get_tokenizer(model_name))

    # Start a new run, or resume from the last checkpoint.
    session = describe_session("rl_loop", log_path, config.learning_rate)
    service_client = connection.service_client(**session)
    checkpoint = checkpoint_utils.get_last_checkpoint(log_path)
    if checkpoint is not None and checkpoint.final:
        report_complete(log_path)
        return checkpoint.sampler_path or ""
    start_step = 0
    if checkpoint is not None:
        start_step, state_path = checkpoint.get("step"), checkpoint.state_path or ""
        created = service_client.create_training_client_from_state_with_optimizer(state_path)
        print(f"resumed  after step {start_step} of {config.max_steps}")
    else:
        created = service_client.create_lora_training_client(
            base_model=model_name,
            rank=config.lora_rank,
            seed=config.seed,
            train_unembed=choose_train_unembed(model_name),
        )
    training_client = wait_for_client(created)
    truncate_metrics(log_path, start_step)
    metrics_log = ml_log.JsonLogger(log_path)
    metrics_log.log_hparams(config)

    adam = tinker.AdamParams(learning_rate=config.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    for step in range(start_step, config.max_steps + 1):
        # Sample from the present weights.
        sampling_client = wait_for_client(training_client.save_weights_and_get_sampling_client())
        metrics: dict[str, float] = {}
        if step in (0, config.max_steps):
            prompts = make_prompts(HELD_OUT, 32, 0)
            rewards, _, reply = sample(config, sampling_client, renderer, prompts)
            record_sample(log_path, prompts[0][0], reply)  # shown at the end
            metrics["test/reward/total"] = float(rewards.mean())
            metrics["test/reward/stderr"] = float(rewards.mean(1).std(ddof=1) / len(rewards) ** 0.5)
        if step < config.max_steps:
            rng_seed = config.seed * 1_000_003 + step + 1
            prompts = make_prompts(TRAINED, config.groups_per_batch, rng_seed)
            rewards, data, _ = sample(config, sampling_client, renderer, prompts, seed=rng_seed)
            metrics["reward/total"] = float(rewards.mean())
            if data:
                gradient = training_client.forward_backward(data, "importance_sampling")
                update = training_client.optim_step(adam)
                metrics["loss:sum"] = gradient.result().metrics["loss:sum"]
                update.result()
        metrics_log.log_metrics(metrics, step=step)
        shown = {name: round(value, 3) for name, value in metrics.items()}
        print(f"step {step}/{config.max_steps}", shown, flush=True)
        done = step + 1
        if config.save_every and done % config.save_every == 0 and done < config.max_steps:
            checkpoint_utils.save_checkpoint(
                training_client, f"{done:06d}", log_path, {"step": done}, ttl_seconds=7 * 24 * 3600
            )
    final = {"step": config.max_steps, "final": True}
    paths = checkpoint_utils.save_checkpoint(training_client, "final", log_path, final, kind="both")
    return paths["sampler_path"]


def make_prompts(topics: Sequence[str], num_prompts: int, seed: int) -> Prompts:
    """Draw questions, each with the number of words that it asks for."""
    rng = random.Random(seed)
    drawn = [(rng.choice(topics), rng.randint(3, 8)) for _ in range(num_prompts)]
    return [(f"Write exactly {n} words about {topic}.", n) for topic, n in drawn]


def sample(
    config: Config,
    client: tinker.SamplingClient,
    renderer: Renderer,
    prompts: Prompts,
    seed: int = 0,
) -> tuple[np.ndarray, list[tinker.Datum], str]:
    """Sample replies: return rewards_PG, datums of groups whose rewards differ, and one reply."""
    import tinker

    futures, inputs = [], []
    for index, (question, _) in enumerate(prompts):
        prompt = renderer.build_generation_prompt([{"role": "user", "content": question}])
        stop, own_seed = renderer.get_stop_sequences(), seed * 10_007 + index
        params = tinker.SamplingParams(max_tokens=config.max_tokens, stop=stop, seed=own_seed)
        inputs.append(prompt.to_ints())
        futures.append(client.sample(prompt, config.group_size, params))
    rewards_PG = np.zeros((len(prompts), config.group_size), dtype=np.float32)
    data, replies = [], []
    for p, ((_, num_words), future) in enumerate(zip(prompts, futures, strict=True)):
        sequences = future.result().sequences
        for g, sequence in enumerate(sequences):
            message, _ = renderer.parse_response(sequence.tokens)
            replies.append(str(message["content"]))
            rewards_PG[p, g] = reward(replies[-1], num_words)
        advantages_G = rewards_PG[p] - rewards_PG[p].mean()
        if not advantages_G.any():
            continue  # the gradient of equal rewards is 0
        for sequence, advantage in zip(sequences, advantages_G, strict=True):
            data.append(build_datum(inputs[p], sequence, float(advantage)))
    return rewards_PG, data, replies[0]


def build_datum(prompt: list[int], sequence: Any, advantage: float) -> tinker.Datum:
    """Build a datum: position t predicts token t + 1; only sampled tokens have the advantage."""
    import tinker

    tokens = [*prompt, *sequence.tokens]
    padding = [0.0] * (len(prompt) - 1)
    inputs: Any = {
        "target_tokens": tokens[1:],
        "logprobs": [*padding, *(sequence.logprobs or [])],
        "advantages": padding + [advantage] * len(sequence.tokens),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


if __name__ == "__main__":
    cli_utils.entrypoint(main)
