"""Measure the DPO loop: against TRL's trainer, and pipelined against serial, in the same run.

    python benchmarks/preference_speed.py                        # both parts
    python benchmarks/preference_speed.py --part order           # pipelined against serial
    python benchmarks/preference_speed.py --part trl --pairs 8   # pairs per second against TRL

The same pairs, model, LoRA rank and number format on both sides. The systems take turns after every
step or pass, so that a busy machine affects all of them. TRL runs in a separate process, so that
its peak memory can be measured. Figures are medians over the rounds, in wall seconds and in CPU
seconds of all processes of a system. Requires `trl` and `peft`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tinker

RANK = 32
BETA = 0.1
VOCAB = 40_000
"""Random tokens are below this id."""


def make_pairs(num_pairs: int, seed: int) -> list[tuple[list[int], list[int], int]]:
    """Return token ids of chosen and rejected sequences, and the length of their prompt."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_pairs):
        prompt = rng.integers(100, VOCAB, rng.integers(24, 48)).tolist()
        sides = [rng.integers(100, VOCAB, rng.integers(20, 110)).tolist() for _ in range(2)]
        pairs.append((prompt + sides[0], prompt + sides[1], len(prompt)))
    return pairs


def make_data(pairs: Sequence[tuple[list[int], list[int], int]]) -> list[tinker.Datum]:
    import tinker

    data = []
    for chosen, rejected, prompt in pairs:
        for tokens in (chosen, rejected):
            weights = np.zeros(len(tokens) - 1, np.float32)
            weights[prompt - 1 :] = 1
            inputs = {
                "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:])),
                "weights": tinker.TensorData.from_numpy(weights),
            }
            model_input = tinker.ModelInput.from_ints(tokens[:-1])
            data.append(tinker.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


def family() -> list[int]:
    """Return this process and the processes that it has started."""
    found: list[int] = [os.getpid()]
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(path.parent.name))
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    ticks = 0
    for pid in pids:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(words[11]) + int(words[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib(pids: Sequence[int]) -> int:
    """Return the sum of the peak resident memory of processes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                total += int(line.split()[1])
    return total // 1024


class Timer:
    """Wall and CPU seconds of each measured call, by name."""

    def __init__(self) -> None:
        self.pids = family()
        """The processes of our side, started before the peer."""
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def add(self, name: str, wall: float, cpu: float) -> None:
        self.seconds.setdefault(name, []).append((wall, cpu))
        print(f"  {name}: {wall:.2f} s, {cpu:.2f} CPU s", flush=True)

    async def measure(self, name: str, call: Callable[[], Awaitable[Any]]) -> None:
        started, before = time.perf_counter(), cpu_seconds(self.pids)
        await call()
        self.add(name, time.perf_counter() - started, cpu_seconds(self.pids) - before)

    def summary(self, pairs: int) -> dict[str, dict[str, float]]:
        """Return medians, and pairs per second."""
        result = {}
        for name, values in self.seconds.items():
            wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
            result[name] = {
                "wall": round(wall, 3),
                "wall_spread": round(max(v[0] for v in values) - min(v[0] for v in values), 3),
                "cpu": round(cpu, 3),
                "pairs_per_second": round(pairs / wall, 3),
                "rounds": len(values),
            }
        return result


class Peer:
    """TRL's DPOTrainer in another process, which does one step per line that it reads."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        command = [sys.executable, __file__, "--peer", str(folder), "--dtype", args.dtype]
        command += ["--pairs", str(args.pairs), "--threads", str(args.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("the process of TRL has ended")

    def step(self, kind: str, seed: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {seed}\n")
        self.process.stdin.flush()
        return self.read()


def run_peer(args: argparse.Namespace) -> None:
    """Do the steps of TRL's trainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(args.threads)
    folder = args.peer
    dtype = getattr(torch, args.dtype)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        args=DPOConfig(
            output_dir="/tmp/trl",
            use_cpu=True,
            bf16=False,
            report_to="none",
            activation_checkpointing=False,
            beta=BETA,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear"
        ),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        kind, seed = line.split()
        batch = padded_batch(make_pairs(args.pairs, int(seed)))
        started, before = time.perf_counter(), time.process_time()
        trainer.precompute_ref_logps = kind == "cached"
        if kind == "cached":
            batch |= {f"ref_{side}_logps": torch.zeros(args.pairs) for side in SIDES}
        loss = trainer._compute_loss(trainer.model, batch, False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        answer = {
            "wall": time.perf_counter() - started,
            "cpu": time.process_time() - before,
            "peak_mib": peak_mib([os.getpid()]),
            "loss": loss.item(),
        }
        print(json.dumps(answer), flush=True)


SIDES = ("chosen", "rejected")


def padded_batch(pairs: Sequence[tuple[list[int], list[int], int]]) -> dict[str, Any]:
    """Return a batch as TRL's collator makes it: chosen rows, then rejected rows, padded."""
    import torch

    rows = [(pair[side], pair[2]) for side in (0, 1) for pair in pairs]
    width = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (tokens, prompt) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, : len(tokens)] = 1
        completion[number, prompt : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


class OwnLoop:
    """The steps of `preference.loop` on a service, and the same work in serial order."""

    def __init__(self, client: Any, reference: Any, folder: Path) -> None:
        from tinker_cookbook.preference.losses import dpo
        from tinker_cookbook.preference.reference import ReferenceScorer

        self.client = client
        self.reference = reference
        self.folder = folder
        self.loss = dpo(beta=BETA)
        self.scorer = ReferenceScorer(reference, folder, "reference")

    def forget(self) -> None:
        """Drop the cached scores of the reference."""
        from tinker_cookbook.preference.reference import REFERENCE_FILE, ReferenceScorer

        (self.folder / REFERENCE_FILE).unlink(missing_ok=True)
        self.scorer = ReferenceScorer(self.reference, self.folder, "reference")

    async def step(self, data: list[tinker.Datum], scores: np.ndarray) -> None:
        """Do one step as the loop does it."""
        from tinker_cookbook.preference.pair_gradients import submit_pair_gradient

        step = await submit_pair_gradient(self.client, data, scores, self.loss)
        update = self.client.optim_step(adam())
        for gradient in step.gradients:
            await gradient
        await update

    async def pipelined(self, batches: list[list[tinker.Datum]]) -> None:
        """Do several steps; the reference scores the next batch while this one is trained."""
        prepared = asyncio.ensure_future(self.scorer.score(batches[0]))
        for number, data in enumerate(batches):
            scores = await prepared
            if number + 1 < len(batches):
                prepared = asyncio.ensure_future(self.scorer.score(batches[number + 1]))
            await self.step(data, scores)

    async def serial(self, batches: list[list[tinker.Datum]]) -> None:
        """Do several steps, awaiting each request before the next, without any cache."""
        from tinker_cookbook.preference.pair_gradients import build_pair_batch, sequence_logprobs
        from tinker_cookbook.runs.custom_gradient import with_weights

        for data in batches:
            scores = []
            for client in (self.reference, self.client):
                outputs = (await client.forward(data, "cross_entropy")).loss_fn_outputs
                scores.append(sequence_logprobs(data, [out["logprobs"] for out in outputs]))
            pairs = build_pair_batch(data, scores[1], scores[0])
            result = self.loss(pairs)
            slopes = np.stack([result.by_chosen_P, result.by_rejected_P], axis=1).reshape(-1)
            weighted = [
                with_weights(d, -s / len(pairs.chosen_P) * d.loss_fn_inputs["weights"].to_numpy())
                for d, s in zip(data, slopes, strict=True)
            ]
            await self.client.forward_backward(weighted, "cross_entropy")
            await self.client.optim_step(adam())


def adam() -> tinker.AdamParams:
    import tinker

    return tinker.AdamParams(learning_rate=1e-5)


async def measure(args: argparse.Namespace, folder: Path, model: str, clients: Any) -> dict:
    import tempfile

    result: dict[str, Any] = {"pairs": args.pairs, "dtype": args.dtype, "threads": args.threads}
    result["tokens"] = sum(d.model_input.length for d in make_data(make_pairs(args.pairs, 0)))
    timer, own = Timer(), OwnLoop(*clients, Path(tempfile.mkdtemp()))
    await own.pipelined([make_data(make_pairs(2, 99))] * 2)  # warm up
    if args.part in ("order", "both"):
        batches = [make_data(make_pairs(args.pairs, seed)) for seed in range(args.steps)]
        for _ in range(args.rounds):
            await timer.measure("serial", lambda: own.serial(batches))
            own.forget()
            await timer.measure("pipelined, first epoch", lambda: own.pipelined(batches))
            await timer.measure("pipelined, later epoch", lambda: own.pipelined(batches))
        result["order"] = timer.summary(args.pairs * args.steps)
    if args.part in ("trl", "both"):
        timer = Timer()
        peer = Peer(args, folder)
        peer.step("fresh", 99)
        for number in range(args.rounds):
            data = make_data(make_pairs(args.pairs, number))
            for kind in ("fresh", "cached"):
                own.forget()
                if kind == "cached":
                    await own.scorer.score(data)

                async def step(data: list[tinker.Datum] = data) -> None:
                    await own.step(data, await own.scorer.score(data))

                await timer.measure(f"own, {kind}", step)
                answer = peer.step(kind, number)
                timer.add(f"trl, {kind}", answer["wall"], answer["cpu"])
        result["trl"] = timer.summary(args.pairs)
        result["peak_mib"] = {"own": peak_mib(timer.pids), "trl": answer["peak_mib"]}
        peer.process.terminate()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["order", "trl", "both"], default="both")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=3, help="steps per measured pass (order)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        run_peer(args)
        return
    os.environ["TINKER_COOKBOOK_DTYPE"] = args.dtype
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from tinker_cookbook import service
    from tinker_cookbook.model_files import DEFAULT_MODEL, resolve_model_folder
    from tinker_cookbook.utils.sdk_compat import wait_for_client

    folder = resolve_model_folder(DEFAULT_MODEL)
    with service.connect(None, DEFAULT_MODEL) as connection:
        client = connection.service_client()
        clients = [
            wait_for_client(
                client.create_lora_training_client(
                    connection.model_name, rank=rank, train_unembed=False
                )
            )
            for rank in (RANK, 1)
        ]
        result = asyncio.run(measure(args, folder, connection.model_name, clients))
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
