"""Measure the memory of the local service over many train / sample / save cycles of a tiny model.

    python benchmarks/memory_curve.py                      # 1,000 cycles, about 5 minutes
    python benchmarks/memory_curve.py --cycles 200 --json curve.json

A cycle trains a batch, takes an optimizer step, samples from a snapshot and saves a sampler
checkpoint and a training checkpoint, which replace earlier ones. Every few cycles a new run begins.
The curve is flat if the growth over the second half is a small share of the memory at half time.
The exit status is 0 if it is flat.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.conftest import ServiceProcess, start_service
from tests.tiny_models import tiny_model

RUN_EVERY = 50
"""Number of cycles after which a new session and run begin."""
MAX_GROWTH = 0.05
"""Maximum growth over the second half, as a share of the memory at half time."""


def resident_mib(service: ServiceProcess) -> float:
    text = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def batch(seed: int) -> list[Any]:
    import tinker

    rng = np.random.default_rng(seed)
    data = []
    for _ in range(4):
        ids = rng.integers(3, 300, 33)
        inputs = {
            "target_tokens": tinker.TensorData.from_numpy(ids[1:]),
            "weights": tinker.TensorData.from_numpy(np.ones(32, np.float32)),
        }
        model_input = tinker.ModelInput.from_ints(ids[:-1].tolist())
        data.append(tinker.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


class Cycles:
    """Runs cycles, with a new session and run after every `RUN_EVERY` cycles."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._client: Any = None
        self._run: Any = None

    def one(self, number: int) -> None:
        import tinker

        if number % RUN_EVERY == 0:
            self.close()
            self._client = self._service.connect()
            future = self._client.create_lora_training_client(
                base_model=self._service.model, rank=16
            )
            self._run = future.result()
        run = self._run
        computed = run.forward_backward(batch(number), "cross_entropy")
        stepped = run.optim_step(tinker.AdamParams(learning_rate=1e-4))
        sampler = run.save_weights_and_get_sampling_client().result()
        prompt = tinker.ModelInput.from_ints([5, 6, 7, number % 300 + 3])
        params = tinker.SamplingParams(max_tokens=8)
        sampled = sampler.sample(prompt, 2, params)
        saved = run.save_state(f"state-{number % 3}", ttl_seconds=3600, overwrite=True)
        named = run.save_weights_for_sampler(f"sampler-{number}", ttl_seconds=3600)
        for future in (computed, stepped, sampled, saved, named):
            future.result()

    def close(self) -> None:
        if self._client is not None:
            self._client.close("success").result()


def measure(cycles: int) -> list[tuple[int, float]]:
    """Return (cycle, MiB) at about 50 points."""
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        service = start_service(tiny_model(tied=False), Path(folder) / "state")
        try:
            loop = Cycles(service)
            for number in range(cycles):
                loop.one(number)
                if number % max(cycles // 50, 1) == 0 or number == cycles - 1:
                    curve.append((number + 1, resident_mib(service)))
                    print(f"cycle {number + 1:5d}: {curve[-1][1]:7.1f} MiB", flush=True)
            loop.close()
        finally:
            service.stop()
    return curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="file for the curve")
    args = parser.parse_args()
    began = time.monotonic()
    curve = measure(args.cycles)
    half = [mib for number, mib in curve if number >= args.cycles // 2]
    growth = np.mean(half[-5:]) - np.mean(half[:5])
    result = {
        "cycles": args.cycles,
        "seconds": round(time.monotonic() - began, 1),
        "mib_first": round(curve[0][1], 1),
        "mib_half": round(float(np.mean(half[:5])), 1),
        "mib_end": round(float(np.mean(half[-5:])), 1),
        "growth_second_half_mib": round(float(growth), 1),
    }
    print(json.dumps(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result | {"curve": curve}) + "\n")
    return int(growth > MAX_GROWTH * result["mib_half"])


if __name__ == "__main__":
    sys.exit(main())
