"""Compare the local service with transformers + PEFT and llama.cpp, through the unmodified SDK.

    python benchmarks/engine.py --json figures.json                 # every row, one round
    python benchmarks/engine.py --json figures.json --rows decode_8 --rounds 3
    python benchmarks/engine.py --json figures.json --report        # print the recorded table

Each row measures the service and its peers alternately in the same run. `--json` keeps the samples
of all rounds, so rows can be measured at different times; the table shows their medians and the
spread of the ratio. Peers are transformers + PEFT (in float32 or bfloat16, whichever a short probe
finds faster; on a GPU with flash-attn where that package is installed, otherwise with torch's own
attention) and llama.cpp, if xllamacpp is installed and BENCH_GGUF names a file written by
`bench_gguf.py`. The table names each missing peer with the reason. Requires the extras `local` and
`dev`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_limits import (
    bytes_per_token,
    flops_per_token,
    format_in_use,
    product_flops,
    read_bandwidth,
)
from bench_peers import PeerError, PeerProcess, random_prompts
from bench_service import (
    LENGTHS,
    RANK,
    Service,
    generate,
    make_data,
    passages,
    score,
    train_step,
)

PROMPT_TOKENS = 64
NEW_TOKENS = 128
GROUP_SIZE = 16
GROUP_PROMPT_TOKENS = 128
GROUP_REPLIES = (64, 80, 96, 112, 128, 144, 160, 192) * 2
"""Lengths of the replies in two groups."""
NUM_ADAPTERS = 8
NUM_RUNS = 16
Sample = dict[str, Any]
"""`seconds` and, if known, `tokens`, `cpu_seconds` and `peak_bytes`."""


class Bench:
    """One service for all rows, and peers that start when a row first needs them."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options = options
        self.folder = folder
        self.rng = np.random.default_rng()
        self.skipped: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self._service: Service | None = None
        self._run: Any = None
        self._samplers: list[Any] = []
        self._peers: dict[str, PeerProcess] = {}

    @property
    def service(self) -> Service:
        """The service, started on first use."""
        if self._service is None:
            self._service = self.new_service()
        return self._service

    def new_service(self, *, dtype: str | None = None, threads: int | None = None) -> Service:
        """Start another service on the device that is measured."""
        options = self.options
        threads = threads or options.threads
        return Service(self.folder, dtype=dtype, threads=threads, device=options.device)

    def run(self) -> Any:
        """A training client after one warm-up step."""
        if self._run is None:
            self._run = self.service.new_run()
            train_step(self._run, make_data((64,)))
        return self._run

    def samplers(self, count: int) -> list[Any]:
        """Return sampling clients with separate adapters, after a warm-up."""
        while len(self._samplers) < count:
            run = self.service.new_run(seed=len(self._samplers))
            train_step(run, make_data((64,)))
            sampler = run.save_weights_and_get_sampling_client().result()
            generate([sampler], self.prompts(1), new_tokens=4)
            self._samplers.append(sampler)
        return self._samplers[:count]

    def prompts(self, count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
        """Return new random prompts."""
        return random_prompts(self.rng, count, length)

    def peer(self, kind: str, name: str | None = None) -> PeerProcess | None:
        """Return a peer of a kind; None if it cannot run (`skipped` has the reason)."""
        name = name or kind
        if name not in self._peers and name not in self.skipped:
            try:
                options = self.options
                self._peers[name] = PeerProcess(
                    kind,
                    self.folder,
                    options.threads,
                    dtype=options.peer_dtype,
                    device=options.device,
                )
                self.about[name] = self._peers[name].about
            except PeerError as error:
                self.skipped[name] = str(error)
        return self._peers.get(name)

    def ask(self, kind: str, call: str, *, name: str | None = None, **arguments: Any) -> Sample:
        """Return a peer's sample; {} if the peer cannot run."""
        peer = self.peer(kind, name)
        if peer is None:
            return {}
        try:
            return peer.call(call, **arguments)
        except PeerError as error:
            self.skipped[name or kind] = str(error)
            self._peers.pop(name or kind).close()
            return {}

    def timed(self, work: Callable[[], int]) -> Sample:
        """Measure work on the service; `work` returns its number of tokens."""
        cpu, started = self.service.cpu_seconds(), time.perf_counter()
        tokens = work()
        return {
            "tokens": tokens,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": self.service.cpu_seconds() - cpu,
            "peak_bytes": self.service.memory(),
        }

    def drop_service(self) -> None:
        """Stop the service; the next use starts a new one."""
        if self._service is not None:
            self._service.close()
        self._service, self._run, self._samplers = None, None, []

    def drop_peers(self) -> None:
        """Stop all peers."""
        for peer in self._peers.values():
            peer.close()
        self._peers = {}

    def close(self) -> None:
        """Stop everything."""
        self.drop_peers()
        self.drop_service()


def in_turns(bench: Bench, sides: dict[str, Callable[[], Sample]]) -> dict[str, Sample]:
    """Measure the sides in sequence, then in the opposite order, and add up.

    The machine's speed drifts from minute to minute, and this way it does so for all sides alike.
    """
    if bench.options.device == "cuda":
        for side in sides.values():  # kernels are loaded and CUDA graphs recorded in a first call
            side()
    names = [*sides, *(() if bench.options.one_way else reversed(sides))]
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for name in names:
        samples[name].append(sides[name]())
    return {name: add_up(pair) for name, pair in samples.items()}


def add_up(samples: list[Sample]) -> Sample:
    """Return the sums, or the maximum for memory; {} if a sample is missing."""
    if not all(samples):
        return {}
    total = {key: sum(sample[key] for sample in samples) for key in samples[0]}
    if "peak_bytes" in total:
        total["peak_bytes"] = max(sample["peak_bytes"] for sample in samples)
    return total


# --- rows: what is measured -----------------------------------------------------------------


def measure_train(bench: Bench, padded: bool) -> dict[str, Sample]:
    name = "padded" if padded else "unpadded"
    bench.drop_service()  # so that its peak memory is that of this step
    run, data = bench.run(), make_data(LENGTHS)

    def step() -> int:
        train_step(run, data)
        return sum(LENGTHS)

    peer = {"kind": "train", "call": "step", "name": name, "lengths": LENGTHS, "padded": padded}
    return in_turns(bench, {"service": lambda: bench.timed(step), name: lambda: bench.ask(**peer)})


def measure_train_groups(bench: Bench) -> dict[str, Sample]:
    """Train groups of replies to one prompt each, and sequences as long that share nothing."""
    lengths = tuple(GROUP_PROMPT_TOKENS + reply for reply in GROUP_REPLIES)
    run = bench.run()

    def step(prompts: list[list[int]]) -> int:
        endings = iter(bench.prompts(len(prompts), max(lengths)))
        sequences = [
            prompt + next(endings)[: length + 1 - len(prompt)]
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        train_step(run, make_data((), sequences, prompt_tokens=GROUP_PROMPT_TOKENS))
        return sum(lengths)

    def groups() -> int:
        half = len(lengths) // 2
        first, second = bench.prompts(2, GROUP_PROMPT_TOKENS)
        return step([first] * half + [second] * half)

    def different() -> int:
        return step(bench.prompts(len(lengths), GROUP_PROMPT_TOKENS))

    peer = {"call": "step", "name": "unpadded", "lengths": lengths, "padded": False}
    return in_turns(
        bench,
        {
            "service": lambda: bench.timed(groups),
            "different": lambda: bench.timed(different),
            "unpadded": lambda: bench.ask("train", **peer),
        },
    )


def measure_decode(bench: Bench, count: int) -> dict[str, Sample]:
    samplers = bench.samplers(1)

    def peer(kind: str) -> Sample:
        prompts = bench.prompts(count)
        return bench.ask(kind, "generate", prompts=prompts, new_tokens=NEW_TOKENS)

    bench.ask("llama_cpp", "prepare", count=count, length=PROMPT_TOKENS + NEW_TOKENS + 8)
    return in_turns(
        bench,
        {
            "service": lambda: bench.timed(
                lambda: generate(samplers, bench.prompts(count), new_tokens=NEW_TOKENS)
            ),
            "generate": lambda: peer("generate"),
            "llama_cpp": lambda: peer("llama_cpp"),
        },
    )


def measure_group(bench: Bench, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Sample]:
    samplers = bench.samplers(1)

    def group() -> int:
        prompts = bench.prompts(1, prompt_tokens)
        return generate(samplers, prompts, new_tokens=NEW_TOKENS, num_samples=GROUP_SIZE)

    def separate() -> int:
        prompts = bench.prompts(1, prompt_tokens) * GROUP_SIZE
        return generate(samplers, prompts, new_tokens=NEW_TOKENS)

    def different() -> int:
        prompts = bench.prompts(GROUP_SIZE, prompt_tokens)
        return generate(samplers, prompts, new_tokens=NEW_TOKENS)

    sides = {"service": group, "separate": different, "same_prompt": separate}
    return in_turns(
        bench, {name: functools.partial(bench.timed, work) for name, work in sides.items()}
    )


def measure_score(bench: Bench) -> dict[str, Sample]:
    samplers, prompts = bench.samplers(1), bench.prompts(8, 256)
    score(samplers[0], bench.prompts(1, 32))
    return in_turns(
        bench,
        {
            "service": lambda: bench.timed(lambda: score(samplers[0], prompts)),
            "generate": lambda: bench.ask("generate", "score", prompts=prompts),
        },
    )


def measure_score_prefix(bench: Bench, count: int = 64, ending: int = 8) -> dict[str, Sample]:
    """Score endings behind one prefix of 256 tokens, and as many different prompts as long."""
    samplers = bench.samplers(1)
    score(samplers[0], bench.prompts(1, 32))

    def together() -> int:
        prefix = bench.prompts(1, 256)[0]
        return score(samplers[0], [prefix + end for end in bench.prompts(count, ending)])

    def apart() -> int:
        return score(samplers[0], bench.prompts(count, 256 + ending))

    sides = {"service": together, "different": apart}
    return in_turns(
        bench, {name: functools.partial(bench.timed, work) for name, work in sides.items()}
    )


def measure_adapters(bench: Bench) -> dict[str, Sample]:
    samplers = bench.samplers(NUM_ADAPTERS)

    def decode(chosen: list[Any]) -> int:
        return generate(chosen, bench.prompts(NUM_ADAPTERS), new_tokens=NEW_TOKENS)

    return in_turns(
        bench,
        {
            "service": lambda: bench.timed(lambda: decode(samplers)),
            "one_adapter": lambda: bench.timed(lambda: decode(samplers[:1])),
        },
    )


def measure_speculation(bench: Bench) -> dict[str, Sample]:
    """Decode one request with and without speculation: a reply that quotes its prompt, a story."""
    import torch
    from bench_speculation import CHATS, SpeculatingModel

    torch.set_num_threads(bench.options.threads)
    model, sides = SpeculatingModel(bench.folder), {}
    for name, (text, temperature) in CHATS.items():
        for speculates in (True, False, False, True):
            sample = model.reply(text, temperature, speculates=speculates)
            sides.setdefault(name if speculates else f"{name}_plain", []).append(sample)
    return {name: min(samples, key=lambda s: s["seconds"]) for name, samples in sides.items()}


def measure_http(bench: Bench) -> dict[str, Sample]:
    """Alternate a request of 8 tokens through the SDK with a direct call of the engine.

    One thread each: two processes that wait for each other's threads would be measured otherwise.
    """
    import torch
    from train_speed import engine_data, engine_run

    from tinker_cookbook.local.engine.types import LossSpec

    torch.set_num_threads(1)
    service = bench.new_service(threads=1)
    run, data = service.new_run(), make_data((8,))
    device = bench.options.device
    direct_run = engine_run(Path(bench.folder), format_in_use(device), device=device)
    direct_data = engine_data((8,), direct_run.model.vocab_size)
    loss = LossSpec("cross_entropy")
    pairs = []
    for _ in range(28):
        started = time.perf_counter()
        run.forward_backward(data, "cross_entropy").result()
        middle = time.perf_counter()
        direct_run.forward_backward(direct_data, loss)
        pairs.append((middle - started, time.perf_counter() - middle))
    service.close()
    pairs = pairs[4:]
    return {
        "service": {"seconds": statistics.median(ours for ours, _ in pairs)},
        "engine": {"seconds": statistics.median(direct for _, direct in pairs)},
        "difference": {"seconds": statistics.median(ours - direct for ours, direct in pairs)},
    }


def measure_in_process(bench: Bench) -> dict[str, Sample]:
    """Alternate a training step through the service with the same step in one process."""
    samples: dict[str, list[Sample]] = {"service": [], "engine": []}
    bench.run()
    for _ in range(3):
        samples["service"].append(measure_train_alone(bench))
        samples["engine"].append(bench.ask("engine", "step", lengths=LENGTHS))
    return {name: _median(found) for name, found in samples.items() if all(found)}


def _median(samples: list[Sample]) -> Sample:
    return {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def measure_startup(bench: Bench) -> dict[str, Sample]:
    """Measure the time from the start of the process to the result of the first step."""
    import tinker

    del tinker  # the import of the client is not part of the service's start
    bench.drop_service()
    service = bench.service
    answered = time.perf_counter() - service.started
    bench.run()
    return {
        "service": {"seconds": time.perf_counter() - service.started},
        "first_answer": {"seconds": answered},
    }


def measure_runs(bench: Bench) -> dict[str, Sample]:
    """Measure 16 runs on one base: memory per run, and a step compared with a single run."""
    bench.drop_service()
    run, data = bench.run(), make_data((128, 128))
    train_step(run, data)
    before = bench.service.memory("VmRSS")
    runs = [bench.service.new_run(seed=index) for index in range(1, NUM_RUNS)]
    for other in runs:
        train_step(other, data)
    extra = (bench.service.memory("VmRSS") - before) / len(runs)
    alone, among = [], []
    for other in runs:
        for client, times in ((run, alone), (other, among)):
            started = time.perf_counter()
            train_step(client, data)
            times.append(time.perf_counter() - started)
    result = {
        "service": {"seconds": statistics.median(among), "extra_bytes": extra},
        "alone": {"seconds": statistics.median(alone)},
    }
    bench.drop_service()
    return result


def measure_context(bench: Bench) -> dict[str, Sample]:
    """Train one sequence of 8,192 tokens in a new service."""
    bench.drop_service()
    run, data = bench.run(), make_data((bench.options.context,))

    def step() -> int:
        train_step(run, data)
        return bench.options.context

    sample = bench.timed(step)
    bench.drop_service()
    return {"service": sample}


def measure_tracking(bench: Bench) -> dict[str, Sample]:
    """Measure the loss decrease over 10 steps in both formats, each in a separate service.

    Gradients of random tokens are ill-conditioned: those of both formats may point in different
    directions where the losses agree to four digits. So the data are text, as in real training.
    """
    lengths, sides = tuple(bench.options.tracking), {}
    is_text = bench.options.tracking_data == "text"
    data = make_data(lengths, passages(bench.folder, lengths) if is_text else None)
    for dtype in ("float32", "bfloat16"):
        service = bench.new_service(dtype=dtype)
        try:
            run = service.new_run()
            started = time.perf_counter()
            losses = [train_step(run, data) for _ in range(11)]
        finally:
            service.close()
        seconds = time.perf_counter() - started
        sides[dtype] = {"seconds": seconds, "losses": losses, "drop": losses[0] - losses[-1]}
    return sides


def measure_scale(bench: Bench) -> dict[str, Sample]:
    """Measure a model of any size briefly: training, decoding and memory, without peers."""
    bench.drop_service()
    run, data = bench.run(), make_data((256, 256))

    def step() -> int:
        train_step(run, data)
        return 512

    sides = {"train": bench.timed(step)}
    samplers = bench.samplers(1)
    for count in (1, 8, 32):
        prompts = bench.prompts(count, 8)
        sides[f"decode_{count}"] = bench.timed(
            lambda prompts=prompts: generate(samplers, prompts, new_tokens=24)
        )
    bench.drop_service()
    return sides


def measure_roofline(bench: Bench) -> dict[str, Sample]:
    """Measure a training step, and before and after it the peak rates of matrix products.

    The peak that counts is that of the format in which the service multiplies.
    """
    threads, used = bench.options.threads, format_in_use()
    before = product_flops(threads)
    sample = measure_train_alone(bench)
    peaks = {name: max(rate, before[name]) for name, rate in product_flops(threads).items()}
    limits = {"flops": flops_per_token(bench.folder) * sample["tokens"], "peak_of": used}
    return {"service": {**sample, **limits, "peak_flops": peaks[used], "peaks": peaks}}


def measure_bandwidth(bench: Bench) -> dict[str, Sample]:
    """Measure one decoding sequence, and before and after it how fast memory can be read."""
    samplers, threads = bench.samplers(1), bench.options.threads
    before = read_bandwidth(threads)
    sample = bench.timed(lambda: generate(samplers, bench.prompts(1), new_tokens=NEW_TOKENS))
    length = PROMPT_TOKENS + NEW_TOKENS // 2
    read = bytes_per_token(bench.folder, length, RANK) * sample["tokens"]
    peak = max(before, read_bandwidth(threads))
    return {"service": {**sample, "bytes": read, "peak_bytes_per_second": peak}}


def measure_train_alone(bench: Bench) -> Sample:
    run, data = bench.run(), make_data(LENGTHS)

    def step() -> int:
        train_step(run, data)
        return sum(LENGTHS)

    return bench.timed(step)


MEASURES: dict[str, Callable[[Bench], dict[str, Sample]]] = {
    "train_padded": lambda bench: measure_train(bench, padded=True),
    "train_unpadded": lambda bench: measure_train(bench, padded=False),
    "train_groups": measure_train_groups,
    "tracking": measure_tracking,
    "roofline": measure_roofline,
    "in_process": measure_in_process,
    "decode_1": lambda bench: measure_decode(bench, 1),
    "decode_8": lambda bench: measure_decode(bench, 8),
    "decode_32": lambda bench: measure_decode(bench, 32),
    "bandwidth": measure_bandwidth,
    "speculation": measure_speculation,
    "group": measure_group,
    "group_256": lambda bench: measure_group(bench, 256),
    "score": measure_score,
    "score_prefix": measure_score_prefix,
    "http": measure_http,
    "startup": measure_startup,
    "runs": measure_runs,
    "adapters": measure_adapters,
    "context": measure_context,
    "scale": measure_scale,
}
CPU_ROWS = ("roofline", "bandwidth", "speculation")
"""Rows that compare with the limits of a processor or need compiled kernels."""
DEFAULT_ROWS = [name for name in MEASURES if name != "scale"]


def main() -> None:
    from bench_report import print_report

    from tinker_cookbook.model_files import DEFAULT_MODEL, resolve_model_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=tuple(MEASURES), default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--peer-dtype",
        choices=("float32", "bfloat16"),
        help="number format of the peers; skips the probe",
    )
    parser.add_argument(
        "--one-way",
        action="store_true",
        help="measure each side once per round instead of twice, for very slow peers",
    )
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument(
        "--tracking",
        nargs="+",
        type=int,
        default=LENGTHS,
        help="lengths of the sequences of the row `tracking`",
    )
    parser.add_argument(
        "--tracking-data",
        choices=("text", "random"),
        default="text",
        help="what the row `tracking` trains on: text of the documentation, or random tokens",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model folder or hub id")
    parser.add_argument("--json", type=Path, help="add the samples to this file")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the service and peers"
    )
    options = parser.parse_args()
    if options.device == "cuda":
        _require_cuda(options.rows or ())
    excluded = CPU_ROWS if options.device == "cuda" else ()
    options.rows = options.rows or [name for name in DEFAULT_ROWS if name not in excluded]
    # So that an external time limit also stops the service.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = _read_record(options)
    if not options.report:
        bench = Bench(options, str(resolve_model_folder(options.model)))
        try:
            _measure(bench, record)
        finally:
            bench.close()
    print_report(record)


def _require_cuda(rows: Sequence[str]) -> None:
    """End with a sentence where a GPU or one of these rows cannot be measured."""
    import torch

    for name in rows:
        if name in CPU_ROWS:
            sys.exit(f"--rows={name} measures a processor; use it with --device=cpu")
    if not torch.cuda.is_available():
        sys.exit(
            "--device=cuda needs an NVIDIA GPU and a build of torch with CUDA; this machine has "
            f"torch {torch.__version__} and no GPU that it can use. Run it on a machine with one, "
            "or use --device=cpu."
        )


def _measure(bench: Bench, record: dict[str, Any]) -> None:
    for _ in range(bench.options.rounds):
        for name in bench.options.rows:
            sides = MEASURES[name](bench)
            record["rows"].setdefault(name, []).append({k: v for k, v in sides.items() if v})
            for side, sample in sides.items():
                _print_sample(name, side, sample)
            record["skipped"].update(bench.skipped)
            for name, about in bench.about.items():
                if about.get("probe_seconds", True) or name not in record["peers"]:
                    record["peers"][name] = about
            if bench.options.json:
                text = json.dumps(record, indent=1) + "\n"
                bench.options.json.write_text(text, encoding="utf-8")


def _print_sample(row: str, side: str, sample: Sample) -> None:
    if sample:
        rate = f"{sample['tokens'] / sample['seconds']:9.1f} tokens/s" if "tokens" in sample else ""
        print(f"{row:16}{side:14}{sample['seconds']:9.3f} s {rate}", flush=True)


def _read_record(options: argparse.Namespace) -> dict[str, Any]:
    if options.json and options.json.exists():
        return json.loads(options.json.read_text(encoding="utf-8"))
    return {
        "machine": _machine(options.threads, options.device),
        "rows": {},
        "skipped": {},
        "peers": {},
    }


def _machine(threads: int, device: str) -> dict[str, Any]:
    from importlib.metadata import version

    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    packages = ("torch", "transformers", "peft", "tinker")
    gpu = {"gpu": _gpu_name()} if device == "cuda" else {}
    return {
        **gpu,
        "cpu": platform.processor() or platform.machine(),
        "features": [name for name in wanted if name in flags.split()],
        "threads": threads,
        "versions": {name: version(name) for name in packages},
    }


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
