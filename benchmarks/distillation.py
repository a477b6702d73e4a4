"""Measure two choices of distillation on small random models.

    python benchmarks/distillation.py rest       # rest bucket against renormalizing, 3 seeds
    python benchmarks/distillation.py overlap    # scoring while others sample, and training too

`rest` trains students from the teacher's K most likely tokens, with both objectives on the same
sequences, and prints the held-out KL over the whole vocabulary, which is small enough to be exact.

`overlap` runs the same steps of on-policy distillation in three orders, in turns: sample, score and
train in sequence; score each group as soon as it is sampled; and also sample and score the next
batch during training. Episodes wait without computing, as for a tool or a judge.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz
import numpy as np
import tinker

from tests.conftest import ServiceProcess, start_service
from tests.distillation.data import TokenData, train_teacher
from tests.tiny_models import build_tiny_model
from tinker_cookbook.completers import StopCondition
from tinker_cookbook.distillation import train_off_policy, train_on_policy
from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, TeacherConfig
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher
from tinker_cookbook.rl.config import AsyncConfig
from tinker_cookbook.rl.dataset_utils import NumberedDataset
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
)
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder

OBJECTIVES = ("renormalized", "forward_kl")
GROUPS = 8
NUM_TOKENS = 6
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}


class FewTokens(TokenData):
    """Sequences of few different tokens, so that a student can come close to its teacher."""

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the datums of a batch, with each token replaced by one of a few."""
        return [narrow(datum) for datum in super().get_batch(index)]


def narrow(datum: tinker.Datum) -> tinker.Datum:
    """Return the datum with its tokens mapped to a few."""
    tokens = [10 + token % NUM_TOKENS for token in datum.model_input.to_ints()]
    targets = 10 + datum.loss_fn_inputs["target_tokens"].to_numpy() % NUM_TOKENS
    inputs = {**datum.loss_fn_inputs, "target_tokens": tinker.TensorData.from_numpy(targets)}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


@chz.chz
class FewTokensBuilder(SupervisedDatasetBuilder):
    """Builder of training and held-out sequences."""

    seed: int
    count: int

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset]:
        """Return both."""
        first = 10_000 * (self.seed + 1)
        return FewTokens(first, self.count, 8), FewTokens(first + self.count, 32, 32)


def measure_rest(service: ServiceProcess, folder: Path, args: argparse.Namespace) -> None:
    """Print the held-out KL of both objectives, for each seed and K."""
    teacher = TeacherConfig(
        base_model=service.model,
        load_checkpoint_path=train_teacher(service, 77, steps=args.teacher_steps),
    )
    vocab = json.loads((Path(service.model) / "config.json").read_text())["vocab_size"]
    print("| K | seed | teacher's mass | start | renormalized | rest bucket |")
    print("|---|---|---|---|---|---|")
    for count in args.targets:
        differences = []
        for seed in range(args.seeds):
            rows = {}
            for objective in OBJECTIVES:
                log_path = folder / f"{objective}-{count}-{seed}"
                data = FewTokensBuilder(seed=seed, count=args.sequences)
                config = train_off_policy.Config(
                    log_path=str(log_path),
                    model_name=service.model,
                    base_url=service.base_url,
                    dataset_configs=[
                        DatasetWithTeacher(dataset_builder=data, teacher_config=teacher)
                    ],
                    objective=objective,
                    n_teacher_targets=count,
                    n_held_out_targets=vocab,
                    learning_rate=args.learning_rate,
                    lora_rank=8,
                    batch_size=8,
                    num_epochs=args.epochs,
                    eval_every=10_000,
                    save_every=0,
                    seed=seed,
                )
                asyncio.run(train_off_policy.main(config))
                rows[objective] = read_rows(log_path)
            first, *_, last = rows["forward_kl"]
            renormalized = rows["renormalized"][-1]["test/teacher_kl"]
            differences.append(renormalized - last["test/teacher_kl"])
            mass, start = first["teacher_mass"], first["test/teacher_kl"]
            numbers = (
                f"{mass:.3f} | {start:.4f} | {renormalized:.4f} | {last['test/teacher_kl']:.4f}"
            )
            print(f"| {count} | {seed} | {numbers} |", flush=True)
        error = statistics.stdev(differences) / len(differences) ** 0.5
        mean = statistics.mean(differences)
        print(f"K={count}: difference {mean:.4f} +- {error:.4f} nats per token")


@dataclass
class WaitingEnv(Env):
    """A long prompt; after the reply, the episode waits."""

    prompt: list[int]
    seconds: float

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        """Return the prompt."""
        return tinker.ModelInput.from_ints(self.prompt), [0]

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Wait, then end the episode."""
        await asyncio.sleep(self.seconds)
        return StepResult(0.0, True, tinker.ModelInput.empty(), [0])


@dataclass(frozen=True)
class WaitingGroup(EnvGroupBuilder):
    """A group of two episodes that take the same time."""

    number: int
    mean_seconds: float
    prompt_tokens: int

    async def make_envs(self) -> Sequence[Env]:
        """Return the episodes; half of the groups wait longer than the mean."""
        rng = random.Random(self.number)
        prompt = [rng.randint(10, 200) for _ in range(self.prompt_tokens)]
        seconds = rng.uniform(0, 2 * self.mean_seconds)
        return [WaitingEnv(prompt, seconds) for _ in range(2)]


@chz.chz
class WaitingBuilder(RLDatasetBuilder):
    """Numbered groups."""

    num_batches: int
    mean_seconds: float
    prompt_tokens: int

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return no held-out data."""

        def make(number: int) -> EnvGroupBuilder:
            return WaitingGroup(number, self.mean_seconds, self.prompt_tokens)

        data = NumberedDataset(make, num_batches=self.num_batches, groups_per_batch=GROUPS)
        return data, None


ORDERS: dict[str, dict[str, Any]] = {
    "in sequence": {"overlap_scoring": False},
    "scored when sampled": {},
    "next batch during training": {
        "async_config": AsyncConfig(max_steps_off_policy=1, groups_per_batch=GROUPS)
    },
}


def measure_overlap(service: ServiceProcess, folder: Path, args: argparse.Namespace) -> None:
    """Print the median seconds per step of each order."""
    teacher = TeacherConfig(
        base_model=service.model, load_checkpoint_path=train_teacher(service, 77)
    )
    seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
    for turn in range(args.rounds):
        for number, (order, settings) in enumerate(ORDERS.items()):
            log_path = folder / f"{turn}-{number}"
            data = DistillationDatasetConfig(
                dataset_builder=WaitingBuilder(
                    num_batches=args.steps + 1,
                    mean_seconds=args.mean_seconds,
                    prompt_tokens=args.prompt_tokens,
                ),
                teacher_config=teacher,
                groups_per_batch=GROUPS,
            )
            config = train_on_policy.Config(
                log_path=str(log_path),
                model_name=service.model,
                base_url=service.base_url,
                dataset_configs=[data],
                max_tokens=8,
                learning_rate=1e-3,
                lora_rank=8,
                eval_every=0,
                save_every=0,
                rollout_json_export=False,
                **settings,
            )
            asyncio.run(train_on_policy.main(config))
            # The first step has the start of the run in it.
            found = [row["time/step"] for row in read_rows(log_path)[1:]]
            seconds[order].append(statistics.mean(found))
            print(f"{order}: {seconds[order][-1]:.3f} s per step", flush=True)
    base = statistics.median(seconds["in sequence"])
    print("| order | seconds per step (median of rounds) | range | relative |\n|---|---|---|---|")
    for order, found in seconds.items():
        middle = statistics.median(found)
        span = f"{min(found):.3f} to {max(found):.3f}"
        print(f"| {order} | {middle:.3f} | {span} | {middle / base:.2f} |")


def read_rows(log_path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run."""
    return [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["rest", "overlap"])
    parser.add_argument("--teacher-steps", type=int, default=6, help="more make it more certain")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=int, nargs="+", default=[20])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--mean-seconds", type=float, default=0.5)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    args = parser.parse_args()
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        sizes = SIZES if args.what == "overlap" else None
        build_tiny_model(model, tied=False, sizes=sizes)
        service = start_service(model, folder / "service")
        os.environ["TINKER_API_KEY"] = service.api_key
        try:
            measure = measure_rest if args.what == "rest" else measure_overlap
            measure(service, folder, args)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
