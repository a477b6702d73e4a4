"""Measure speed and memory of training, compared with transformers + PEFT in the same run.

    python benchmarks/train_speed.py                       # speed and memory of one training step
    python benchmarks/train_speed.py --part context        # one sequence of 8,192 tokens
    python benchmarks/train_speed.py --part tracking       # bfloat16 against float32, 10 steps
    python benchmarks/train_speed.py --part runs           # 16 runs on one base
    python benchmarks/train_speed.py --json result.json

Every system runs in a separate process, so that its peak memory can be measured; the systems
alternate after every step, so that a busy machine affects all of them. Figures are medians over the
rounds. Padding does not count as tokens. Requires `peft` (extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS = (64, 128, 192, 256, 288, 320, 512, 224)
"""8 conversations, 1,984 tokens; the first third of each is prompt and has weight 0."""
RANK = 32
SYSTEMS = ("engine", "peft_padded", "peft_unpadded")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_tokens(lengths: tuple[int, ...], vocab_size: int) -> list[list[int]]:
    """Return fixed pseudo-random token ids; one more than each length, for the shifted targets."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length + 1).tolist() for length in lengths]


def engine_data(lengths: tuple[int, ...], vocab_size: int) -> list[Any]:
    import numpy as np

    from tinker_cookbook.local.engine.types import TrainDatum

    data = []
    for tokens in make_tokens(lengths, vocab_size):
        weights = np.ones(len(tokens) - 1, np.float32)
        weights[: len(weights) // 3] = 0
        inputs = {"target_tokens": np.array(tokens[1:]), "weights": weights}
        data.append(TrainDatum(np.array(tokens[:-1], np.int32), inputs))
    return data


def engine_run(
    folder: Path, dtype: str, *, train_unembed: bool = False, device: str = "cpu"
) -> Any:
    import torch

    from tinker_cookbook.local.engine.model.base_model import load_base_model
    from tinker_cookbook.local.engine.training.run import TrainingRun
    from tinker_cookbook.local.engine.types import LoraSpec

    model = load_base_model(folder, dtype=getattr(torch, dtype), device=device)
    return TrainingRun(model, LoraSpec(rank=RANK, seed=0, train_unembed=train_unembed))


def build_engine(folder: Path, dtype: str, lengths: tuple[int, ...]) -> Callable[[], float]:
    from tinker_cookbook.local.engine.types import AdamSpec, LossSpec

    run = engine_run(folder, dtype)
    data = engine_data(lengths, run.model.vocab_size)

    def step() -> float:
        result = run.forward_backward(data, LossSpec("cross_entropy"))
        run.optim_step(AdamSpec(learning_rate=1e-4))
        return result.metrics["loss:sum"]

    return step


def build_peft(
    folder: Path, dtype: str, lengths: tuple[int, ...], *, padded: bool
) -> Callable[[], float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(LINEAR))
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    sequences = make_tokens(lengths, base.config.vocab_size)
    size = len(sequences) if padded else 1
    batches = [_padded(sequences[first : first + size]) for first in range(0, len(sequences), size)]

    def step() -> float:
        total = 0.0
        for ids, mask, targets in batches:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
            )
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _padded(sequences: list[list[int]]) -> tuple[Any, Any, Any]:
    """Return input ids, attention mask and targets (-100 for untrained positions)."""
    import torch

    width = max(len(tokens) for tokens in sequences) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, tokens in enumerate(sequences):
        length = len(tokens) - 1
        ids[row, :length] = torch.tensor(tokens[:-1])
        mask[row, :length] = 1
        targets[row, length // 3 : length] = torch.tensor(tokens[1 + length // 3 :])
    return ids, mask, targets


def worker(
    pipe: multiprocessing.connection.Connection, system: str, options: dict[str, Any]
) -> None:
    """Run one step per message; answer with (seconds, CPU seconds, loss, peak memory)."""
    import torch

    torch.set_num_threads(options["threads"])
    folder, lengths = Path(options["folder"]), tuple(options["lengths"])
    if system == "engine":
        step = build_engine(folder, options["dtype"], lengths)
    else:
        step = build_peft(folder, options["dtype"], lengths, padded=system == "peft_padded")
    pipe.send("ready")
    while pipe.recv() == "step":
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        pipe.send(
            (time.perf_counter() - wall, time.process_time() - cpu, loss, peak_memory_bytes())
        )


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_speed(options: dict[str, Any], systems: list[str], rounds: int) -> dict[str, Any]:
    """Return medians per system, and the ratios of the engine to the others."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for system in systems:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, system, options), daemon=True)
        process.start()
        pipes[system] = ours
        processes.append(process)
        ours.recv()
    samples: dict[str, list[tuple[float, float, float, int]]] = {s: [] for s in systems}
    for round_number in range(rounds + 1):
        for system in systems:
            pipes[system].send("step")
            sample = pipes[system].recv()
            if round_number:  # the first step of each system is a warm-up
                samples[system].append(sample)
            print(f"  round {round_number} {system:14s} {sample[0]:7.2f} s", flush=True)
    for system in systems:
        pipes[system].send("stop")
    for process in processes:
        process.join()
    num_tokens = sum(options["lengths"])
    rows = {system: _summary(samples[system], num_tokens) for system in systems}
    ratios = {}
    for system in systems[1:]:
        pairs = zip(samples[system], samples[systems[0]], strict=True)
        ratios[f"{systems[0]} / {system}"] = {
            "speed": statistics.median(other[0] / ours[0] for other, ours in pairs),
            "memory": rows[systems[0]]["peak_memory_gb"] / rows[system]["peak_memory_gb"],
        }
    return {"systems": rows, "ratios": ratios}


def _summary(samples: list[tuple[float, float, float, int]], num_tokens: int) -> dict[str, float]:
    seconds = [sample[0] for sample in samples]
    return {
        "tokens_per_second": num_tokens / statistics.median(seconds),
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds": statistics.median(sample[1] for sample in samples),
        "first_loss": samples[0][2],
        "peak_memory_gb": max(sample[3] for sample in samples) / 1e9,
    }


def measure_roofline(options: dict[str, Any], tokens_per_second: float) -> dict[str, float]:
    """Return the step's share of the measured peak rate of matrix products."""
    import torch

    from tinker_cookbook.local.engine.model.architecture import read_arch
    from tinker_cookbook.local.engine.model.precision import product_dtype
    from tinker_cookbook.local.engine.model.weights import module_shapes

    torch.set_num_threads(options["threads"])
    arch = read_arch(Path(options["folder"]))
    assert arch is not None, "the default model is native"
    weights = sum(rows * columns for rows, columns in module_shapes(arch).values())
    head = 2 * arch.vocab_size * arch.hidden_size
    # Forward and backward without weight gradients; the head backward for 2/3 of the rows.
    flops = 4 * weights * arch.num_layers + head * (1 + 2 / 3)
    dtype = product_dtype(getattr(torch, options["dtype"]))
    left, right = torch.randn(2048, 576).to(dtype), torch.randn(3072, 576).to(dtype)
    seconds, product = [], torch.empty(2048, 3072, dtype=dtype)
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(left, right.t(), out=product)
        seconds.append(time.perf_counter() - started)
    peak = 2 * 2048 * 576 * 3072 / statistics.median(seconds[3:])
    return {
        "peak_gflops": peak / 1e9,
        "flops_per_token": flops,
        "share_of_peak": tokens_per_second * flops / peak,
    }


def measure_context(options: dict[str, Any]) -> dict[str, float]:
    """Measure time and peak memory of a step with one long sequence."""
    rows = measure_speed({**options, "lengths": [options["context"]]}, ["engine"], 1)
    return rows["systems"]["engine"]


def measure_tracking(options: dict[str, Any], num_steps: int = 10) -> dict[str, Any]:
    """Compare the loss over some steps in bfloat16 and float32, from the same initial state."""
    from tinker_cookbook.local.engine.types import AdamSpec, LossSpec

    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        run = engine_run(Path(options["folder"]), dtype)
        data = engine_data(tuple(options["lengths"]), run.model.vocab_size)
        losses[dtype] = []
        for step in range(num_steps + 1):
            result = run.forward_backward(
                data, LossSpec("cross_entropy"), backward=step < num_steps
            )
            losses[dtype].append(result.metrics["loss:sum"])
            if step < num_steps:
                run.optim_step(AdamSpec(learning_rate=1e-4))
            print(f"  {dtype} step {step}: loss {losses[dtype][-1]:.2f}", flush=True)
    drops = {dtype: values[0] - values[-1] for dtype, values in losses.items()}
    return {
        "losses": losses,
        "difference_of_drop": abs(drops["bfloat16"] / drops["float32"] - 1),
    }


def measure_runs(options: dict[str, Any], num_runs: int = 16) -> dict[str, float]:
    """Measure several runs on one base: memory per run, and step time compared with one run."""
    from tinker_cookbook.local.engine.memory import resident_bytes
    from tinker_cookbook.local.engine.training.run import TrainingRun
    from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec

    first = engine_run(Path(options["folder"]), options["dtype"])
    data = engine_data(tuple(options["lengths"]), first.model.vocab_size)

    def timed_step(run: TrainingRun) -> float:
        started = time.perf_counter()
        run.forward_backward(data, LossSpec("cross_entropy"))
        run.optim_step(AdamSpec())
        return time.perf_counter() - started

    timed_step(first)
    before = resident_bytes()
    spec = LoraSpec(rank=RANK, train_unembed=False)
    runs = [first] + [TrainingRun(first.model, spec) for _ in range(num_runs - 1)]
    for run in runs[1:]:
        timed_step(run)
    extra = (resident_bytes() - before) / (num_runs - 1)
    alone, shared = [], []
    for run in runs:
        alone.append(timed_step(first))
        shared.append(timed_step(run))
    return {
        "extra_memory_per_run_mb": extra / 1e6,
        "step_time_ratio": statistics.median(shared) / statistics.median(alone),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{'system':16s}{'tokens/s':>10s}{'seconds':>10s}{'min':>8s}{'max':>8s}{'peak GB':>9s}")
    for system, row in result["systems"].items():
        print(
            f"{system:16s}{row['tokens_per_second']:10.1f}{row['seconds']:10.2f}"
            f"{row['seconds_min']:8.2f}{row['seconds_max']:8.2f}{row['peak_memory_gb']:9.2f}"
        )
    for pair, ratio in result["ratios"].items():
        print(f"{pair}: {ratio['speed']:.2f} x the speed, {ratio['memory']:.2f} x the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("speed", "context", "tracking", "runs"), default="speed")
    parser.add_argument("--model", help="model folder or hub id (default: the default model)")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: chosen by the engine)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--json", help="also write the result to this file")
    arguments = parser.parse_args()

    import torch

    from tinker_cookbook.local.engine.model.devices import choose_dtype
    from tinker_cookbook.model_files import DEFAULT_MODEL, resolve_model_folder

    picked = choose_dtype(None, torch.device("cpu"))
    options = {
        "folder": str(resolve_model_folder(arguments.model or DEFAULT_MODEL)),
        "dtype": arguments.dtype or str(picked).removeprefix("torch."),
        "lengths": arguments.lengths,
        "threads": arguments.threads,
        "context": arguments.context,
    }
    print(f"{platform.processor() or platform.machine()}, {options}", flush=True)
    if arguments.part == "speed":
        result = measure_speed(options, arguments.systems, arguments.rounds)
        engine_speed = result["systems"][arguments.systems[0]]["tokens_per_second"]
        result["roofline"] = measure_roofline(options, engine_speed)
        print_table(result)
        print(f"share of the matrix-product peak: {result['roofline']['share_of_peak']:.0%}")
    else:
        measure = {"context": measure_context, "tracking": measure_tracking, "runs": measure_runs}
        result = measure[arguments.part](options)
        print(json.dumps(result, indent=2))
    if arguments.json:
        record = {"options": options, "part": arguments.part, "result": result}
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
