"""Test several concurrent clients for lost work and starved runs.

    python benchmarks/soak.py                              # 8 clients, 10 minutes
    python benchmarks/soak.py --clients 4 --seconds 60

Every client has its own session and run. Until the time is up it repeats a training step and, every
few steps, takes a snapshot, samples from it and saves a checkpoint. Afterwards the service must
have counted the same steps as the client and list every checkpoint. Two runs are trained again
alone, and their logprobs must be bit-identical. The exit status is 0 if all of this holds and the
slowest run had at least half the steps of the fastest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import ServiceProcess, start_service
from tests.tiny_models import tiny_model

SAMPLE_EVERY = 5
LEARNING_RATE = 1e-3


def make_batch(client: int, step: int) -> list[Any]:
    """Return data that differs for every client and step."""
    import tinker

    rng = np.random.default_rng([client, step])
    data = []
    for _ in range(4):
        ids = rng.integers(3, 300, 25 + 8 * (client % 4))
        weights = np.ones(len(ids) - 1, np.float32)
        inputs = {
            "target_tokens": tinker.TensorData.from_numpy(ids[1:]),
            "weights": tinker.TensorData.from_numpy(weights),
        }
        model_input = tinker.ModelInput.from_ints(ids[:-1].tolist())
        data.append(tinker.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


@dataclass
class Client:
    """A client and its counts."""

    number: int
    service: ServiceProcess
    steps: int = 0
    samples: int = 0
    sampled_tokens: int = 0
    longest_wait: float = 0.0
    saved: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)

    def open(self) -> None:
        self.session = self.service.connect()
        self.run = self.session.create_lora_training_client(
            base_model=self.service.model, rank=8, seed=self.number
        ).result()

    def work(self, until: float) -> None:
        try:
            while time.monotonic() < until:
                began = time.monotonic()
                self.step()
                self.longest_wait = max(self.longest_wait, time.monotonic() - began)
                if self.steps % SAMPLE_EVERY == 0:
                    self.sample()
        except Exception as error:
            self.problems.append(repr(error))

    def step(self) -> None:
        import tinker

        computed = self.run.forward_backward(make_batch(self.number, self.steps), "cross_entropy")
        stepped = self.run.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        computed.result()
        counted = stepped.result().metrics["num_steps"]
        self.steps += 1
        if counted != self.steps:
            self.problems.append(f"step {self.steps} is the service's {counted:g}")

    def sample(self) -> None:
        import tinker

        saved = self.run.save_weights_for_sampler(f"s{len(self.saved)}", ttl_seconds=3600)
        sampler = self.run.save_weights_and_get_sampling_client().result()
        prompt = tinker.ModelInput.from_ints([5, 6, 7, self.number + 8])
        response = sampler.sample(prompt, 4, tinker.SamplingParams(max_tokens=24, stop=[])).result()
        self.samples += len(response.sequences)
        self.sampled_tokens += sum(len(sequence.tokens) for sequence in response.sequences)
        self.saved.append(saved.result().path)

    def look(self) -> None:
        """Record the run's logprobs of a probe."""
        result = self.run.forward(make_batch(99, 0), "cross_entropy").result()
        self.logprobs = [out["logprobs"].to_numpy() for out in result.loss_fn_outputs]

    def check_saved(self) -> None:
        import tinker

        rest = tinker.RestClient(base_url=self.service.base_url, api_key=self.service.api_key)
        listed = rest.list_checkpoints(self.run.model_id).result().checkpoints
        missing = set(self.saved) - {checkpoint.tinker_path for checkpoint in listed}
        self.problems += [f"{path} is not listed" for path in sorted(missing)]

    def compare_with(self, alone: Client) -> None:
        """Repeat the same steps on an otherwise idle service."""
        for _ in range(self.steps):
            alone.step()
        alone.look()
        pairs = zip(self.logprobs, alone.logprobs, strict=True)
        if not all(np.array_equal(one, other) for one, other in pairs):
            self.problems.append("trained alone, its logprobs differ")


def soak(service: ServiceProcess, num_clients: int, seconds: float) -> list[Client]:
    clients = [Client(number, service) for number in range(num_clients)]
    for client in clients:
        client.open()
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client.work, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in clients:
        client.look()
        client.check_saved()
    for client in clients[:2]:
        alone = Client(client.number, service)
        alone.open()
        client.compare_with(alone)
    return clients


def print_table(clients: list[Client]) -> bool:
    """Print the counts of each client; return whether all checks pass."""
    names = ("client", "steps", "samples", "tokens", "saved", "longest step s", "problems")
    print("".join(f"{name:>16}" for name in names))
    for c in clients:
        row = (c.number, c.steps, c.samples, c.sampled_tokens, len(c.saved))
        print("".join(f"{v:>16}" for v in row) + f"{c.longest_wait:>16.2f}{len(c.problems):>16}")
        for problem in c.problems:
            print(f"    {problem}")
    steps = [client.steps for client in clients]
    print(f"steps: fewest {min(steps)}, most {max(steps)}")
    return not any(client.problems for client in clients) and 2 * min(steps) >= max(steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = start_service(tiny_model(tied=False), Path(folder) / "state")
        try:
            clients = soak(service, args.clients, args.seconds)
        finally:
            service.stop()
    return int(not print_table(clients))


if __name__ == "__main__":
    sys.exit(main())
