"""Measure memory and speed of base weights in full, int8 and int4, in one run.

    python benchmarks/base_formats.py                          # the default model
    python benchmarks/base_formats.py --model /tmp/qwen3-1.7b  # a folder of random_model.py

Every format runs in a separate process; they take turns after every measurement, so that a busy
machine affects all of them. Figures are medians over the rounds, in tokens per CPU second (of all
threads together) and per second. Logprobs of sampled tokens are computed again by the trainer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from concurrent.futures import Future
from typing import Any

FORMATS = ("full", "int8", "int4")
BATCHES = (1, 8, 32)


def resident_mib() -> dict[str, float]:
    """Return the anonymous memory of this process and its peak of all memory, in MiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        values = dict(line.split(":", 1) for line in file)
    return {name: int(values[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS", "VmHWM")}


class Engine:
    """One engine with one model, in its process."""

    def __init__(self, model: str, base_format: str, new_tokens: int, train_tokens: int) -> None:
        from tinker_cookbook.local.engine.host import EngineHost
        from tinker_cookbook.local.engine.settings import EngineSettings
        from tinker_cookbook.local.engine.types import LoraSpec

        self.new_tokens, self.train_tokens = new_tokens, train_tokens
        self.before = resident_mib()["RssAnon"]
        settings = EngineSettings(device="cpu", dtype="bfloat16", base_format=base_format)
        self.host, self.model = EngineHost(settings), model
        self.host.load_model(model)
        self.loaded = resident_mib()
        self.host.create_run("run", model, LoraSpec(rank=32, seed=0))
        self.host.create_sampler("sampler", model, run_id="run")

    def memory(self, _: int) -> dict[str, float]:
        now = resident_mib()
        return {
            "weights": self.loaded["RssAnon"] - self.before,
            "loaded": self.loaded["VmRSS"],
            "at work": now["VmRSS"],
            "peak": now["VmHWM"],
        }

    def sample(self, batch: int) -> list[tuple[Any, Any]]:
        import numpy as np

        from tinker_cookbook.local.engine.types import SampleSpec

        requests = []
        for seed in range(batch):
            prompt = np.random.default_rng(seed).integers(100, 5000, 16).astype(np.int32)
            spec = SampleSpec(prompt, max_tokens=self.new_tokens, seed=seed, stop=[])
            future: Future[Any] = Future()
            self.host.sample("sampler", spec, future)
            requests.append((prompt, future))
        while self.host.has_sampling_work:
            self.host.sampling_step()
        return [(prompt, future.result()) for prompt, future in requests]

    def decode(self, batch: int) -> dict[str, float]:
        return timed(batch * self.new_tokens, lambda: self.sample(batch))

    def train(self, _: int) -> dict[str, float]:
        from tinker_cookbook.local.engine.types import AdamSpec, LossSpec

        lengths = [self.train_tokens // 8] * 8
        data = [datum(i, length) for i, length in enumerate(lengths)]

        def step() -> None:
            self.host.forward_backward("run", data, LossSpec("cross_entropy"))
            self.host.optim_step("run", AdamSpec(learning_rate=0.0))

        return timed(sum(lengths), step)

    def agreement(self, batch: int) -> dict[str, float]:
        """Return how far the trainer's logprobs of sampled tokens are from the sampler's."""
        import numpy as np

        from tinker_cookbook.local.engine.types import LossSpec, TrainDatum

        differences = []
        for prompt, result in self.sample(batch):
            sequence = result.sequences[0]
            tokens = np.concatenate([prompt, np.asarray(sequence.tokens, np.int32)])
            weights = np.ones(len(tokens) - 1, np.float32)
            inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": weights}
            data = [TrainDatum(tokens[:-1], inputs)]
            loss = LossSpec("cross_entropy")
            scored = self.host.forward_backward("run", data, loss, backward=False).logprobs[0]
            differences.append(np.abs(scored[len(prompt) - 1 :] - np.asarray(sequence.logprobs)))
        together = np.concatenate(differences)
        return {"mean": float(together.mean()), "largest": float(together.max())}


def datum(seed: int, length: int) -> Any:
    import numpy as np

    from tinker_cookbook.local.engine.types import TrainDatum

    tokens = np.random.default_rng(seed).integers(0, 5000, length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
    return TrainDatum(tokens[:-1].astype(np.int32), inputs)


def timed(tokens: int, work: Any) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per second": tokens / wall, "per CPU second": tokens / cpu}


def serve(pipe: multiprocessing.connection.Connection, *options: Any) -> None:
    engine = Engine(*options)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        name, value = asked
        pipe.send(getattr(engine, name)(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--train-tokens", type=int, default=1024)
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    # An idle thread that waits actively would count as CPU time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context, pipes, results = multiprocessing.get_context("spawn"), {}, {}
    for name in FORMATS:
        pipes[name], theirs = context.Pipe()
        options = (theirs, args.model, name, args.new_tokens, args.train_tokens)
        context.Process(target=serve, args=options, daemon=True).start()
        pipes[name].recv()
    tasks = [("decode", batch) for batch in BATCHES] + [("train", 0)]
    for number in range(args.rounds + 1):
        for task in tasks:
            for name, pipe in pipes.items():
                pipe.send(task)
                found = pipe.recv()
                if number:  # the first round warms up
                    results.setdefault((task, name), []).append(found)
    report: dict[str, Any] = {}
    for (task, name), found in results.items():
        report.setdefault(name, {})[f"{task[0]} {task[1] or ''}".strip()] = {
            key: [round(statistics.median(values), 1), round(min(values), 1), round(max(values), 1)]
            for key in found[0]
            for values in [[one[key] for one in found]]
        }
    for name, pipe in pipes.items():
        for task in (("agreement", 8), ("memory", 0)):
            pipe.send(task)
            report[name][task[0]] = pipe.recv()
        pipe.send(None)
    for name, entries in report.items():
        for task, figures in entries.items():
            print(name, task, figures, flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
