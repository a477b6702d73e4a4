"""Compare synchronous, streaming and asynchronous RL on one task: reward against wall time.

    python benchmarks/rl_loops.py                  # a tiny random model on a local service

The task is to sample tokens with an even number. Episodes take a random time, like tools, games and
judges; the loops only differ in that case. Prints one row when a loop ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz
import tinker

from tests.tiny_models import build_tiny_model
from tinker_cookbook.completers import StopCondition
from tinker_cookbook.rl import train
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

LOOPS: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "streaming": {
        "stream_minibatch_config": train.StreamMinibatchConfig(
            groups_per_batch=4, num_minibatches=2
        )
    },
    "asynchronous, 1 step": {
        "async_config": train.AsyncConfig(max_steps_off_policy=1, groups_per_batch=4)
    },
    "asynchronous, 3 steps": {
        "async_config": train.AsyncConfig(max_steps_off_policy=3, groups_per_batch=4)
    },
}


@dataclass
class SlowEvenTokens(Env):
    """Rewards the share of even tokens after a delay."""

    prompt: list[int]
    seconds: float

    async def initial_observation(self) -> tuple[tinker.ModelInput, StopCondition]:
        """Return a few tokens."""
        return tinker.ModelInput.from_ints(self.prompt), [0]

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Wait, then grade."""
        await asyncio.sleep(self.seconds)
        reward = sum(token % 2 == 0 for token in action) / max(len(action), 1)
        return StepResult(reward, True, tinker.ModelInput.empty(), [0])


@dataclass(frozen=True)
class SlowGroup(EnvGroupBuilder):
    """A group whose episodes have exponentially distributed delays: most short, a few long."""

    mean_seconds: float
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Return eight episodes."""
        rng = random.Random(self.number)
        prompt = [rng.randint(10, 60) for _ in range(4)]
        return [SlowEvenTokens(prompt, rng.expovariate(1 / self.mean_seconds)) for _ in range(8)]


@chz.chz
class SlowDatasetBuilder(RLDatasetBuilder):
    """Numbered groups."""

    num_batches: int
    mean_seconds: float

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return no held-out set: its evaluation would slow down only one loop."""
        make = [SlowGroup(self.mean_seconds, number) for number in range(4 * self.num_batches)]
        data = NumberedDataset(make.__getitem__, num_batches=self.num_batches, groups_per_batch=4)
        return data, None


def measure(loop: str, model: str, log_path: Path, args: argparse.Namespace) -> str:
    """Run one loop and return its row of the table."""
    config = train.Config(
        log_path=str(log_path),
        model_name=model,
        base_url="local",
        dataset_builder=SlowDatasetBuilder(num_batches=args.steps, mean_seconds=args.mean_seconds),
        max_tokens=8,
        learning_rate=args.learning_rate,
        lora_rank=8,
        eval_every=0,
        save_every=0,
        rollout_json_export=False,
        **LOOPS[loop],
    )
    asyncio.run(train.main(config))
    rows = [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step"] for row in rows]
    rewards = [row["env/all/reward/total"] for row in rows]
    good = next((i for i, r in enumerate(rewards) if r >= 0.9), None)
    reached = "-" if good is None else f"{good + 1} steps, {sum(seconds[: good + 1]):.1f} s"
    last = sum(rewards[-5:]) / 5
    stale = max(row.get("async/staleness_max", 0) for row in rows)
    kl = max(row["optim/kl_sample_train_v2"] for row in rows)
    return (
        f"| {loop} | {sum(seconds):.1f} s | {rewards[0]:.2f} | {last:.2f} | {reached} | {stale} | "
        f"{kl:.1e} |"
    )


def main() -> None:
    """Measure every loop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--mean-seconds", type=float, default=2.0, help="mean duration of an episode"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    args = parser.parse_args()
    table = [
        "| loop | whole run | first reward | last 5 | reward 0.9 after | oldest | kl at most |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        build_tiny_model(model, tied=False)
        for number, loop in enumerate(LOOPS):
            started = time.monotonic()
            log_path = Path(folder) / str(number)
            table.append(measure(loop, str(model), log_path, args))
            print(f"{loop}: {time.monotonic() - started:.0f} s including the start of the service")
    print("\n".join(table))


if __name__ == "__main__":
    main()
