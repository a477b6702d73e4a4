"""What does not fit is refused with numbers in advance; idle adapters move to disk and back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.host import EngineHost
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, SampleSpec, TrainDatum
from tinker_cookbook.local.errors import UserError

MODEL = str(tiny_model(tied=False))
LORA = LoraSpec(rank=8, seed=0)
GIB = 2**30


class Memory:
    """Free memory, as the test sets it."""

    def __init__(self) -> None:
        self.free = 8 * GIB

    def __call__(self) -> int:
        return self.free


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def host(tmp_path: Path, memory: Memory) -> Iterator[EngineHost]:
    settings = EngineSettings("cpu", "float32", kv_cache_bytes=2**22, spill_dir=tmp_path / "spill")
    host = EngineHost(settings, free_bytes=memory)
    yield host
    host.close(RuntimeError("closed"))


def data(length: int = 20, seed: int = 0) -> list[TrainDatum]:
    tokens = np.random.default_rng(seed).integers(3, 300, length + 1)
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(length, np.float32)}
    return [TrainDatum(tokens[:-1].astype(np.int32), inputs)]


def backward(host: EngineHost, run: str, batch: list[TrainDatum]) -> None:
    host.forward_backward(run, batch, LossSpec("cross_entropy"))


def logprobs(host: EngineHost, run: str) -> np.ndarray:
    loss = LossSpec("cross_entropy")
    result = host.forward_backward(run, data(), loss, backward=False)
    return result.logprobs[0]


def sample(host: EngineHost, sampler: str) -> tuple[list[int], list[float]]:
    future: Future = Future()
    spec = SampleSpec(data()[0].tokens, max_tokens=12, seed=3, stop=[])
    host.sample(sampler, spec, future, None)
    while host.has_sampling_work:
        host.sampling_step()
    sequence = future.result().sequences[0]
    return sequence.tokens.tolist(), sequence.logprobs.tolist()


def train(host: EngineHost, run: str, *, spill_between: bool) -> np.ndarray:
    """Train three steps of two accumulated batches; perhaps spill between the batches."""
    host.create_run(run, MODEL, LORA)
    for step in range(3):
        for part in range(2):
            backward(host, run, data(seed=10 * step + part))
            if spill_between:
                assert host.spill_idle(0.0) == 1
        host.optim_step(run, AdamSpec(learning_rate=1e-2))
        if spill_between:
            assert host.spill_idle(0.0) == 1
    return logprobs(host, run)


def test_a_run_comes_back_bit_for_bit(host, tmp_path) -> None:
    stayed = train(host, "stays", spill_between=False)
    host.free_run("stays")
    moved = train(host, "moves", spill_between=True)
    np.testing.assert_array_equal(moved, stayed)
    assert list((tmp_path / "spill").iterdir()) == []  # what came back is not kept twice


def test_a_sampler_comes_back_bit_for_bit(host) -> None:
    train(host, "run", spill_between=False)
    host.create_sampler("snapshot", MODEL, run_id="run")
    before = sample(host, "snapshot")
    backward(host, "run", data(seed=99))
    host.optim_step("run", AdamSpec(learning_rate=1e-2))
    assert host.spill_idle(0.0) == 2
    assert host.stats()["spilled_samplers"] == 1
    assert host.stats()["spilled_bytes"] > 0
    assert sample(host, "snapshot") == before
    assert host.stats()["spilled_samplers"] == 0
    assert host.stats()["spilled_runs"] == 1


def test_a_runs_older_samplers_move_out_as_newer_ones_come(host) -> None:
    host.create_run("r", MODEL, LORA)
    replies = {}
    for step in range(4):
        backward(host, "r", data(seed=step))
        host.optim_step("r", AdamSpec(learning_rate=1e-2))
        host.create_sampler(f"s{step}", MODEL, run_id="r")
        replies[f"s{step}"] = sample(host, f"s{step}")
        assert host.stats()["spilled_samplers"] == max(0, step - 1)
    host.create_run("other", MODEL, LORA)
    host.create_sampler("of another run", MODEL, run_id="other")
    assert host.stats()["spilled_samplers"] == 2, "runs do not move each other's samplers out"
    for name, reply in replies.items():
        assert sample(host, name) == reply


def test_a_sampler_in_use_stays_when_newer_ones_come(host) -> None:
    host.create_run("r", MODEL, LORA)
    host.create_sampler("s0", MODEL, run_id="r")
    future: Future = Future()
    host.sample("s0", SampleSpec(data()[0].tokens, max_tokens=12, seed=3, stop=[]), future, None)
    for step in range(1, 4):
        host.create_sampler(f"s{step}", MODEL, run_id="r")
    assert host.stats()["spilled_samplers"] == 1
    while host.has_sampling_work:
        host.sampling_step()
    assert len(future.result().sequences[0].tokens) == 12


def test_samplers_of_a_runs_checkpoints_are_counted_together(host, tmp_path) -> None:
    host.create_run("r", MODEL, LORA)
    for step in range(3):
        folder = tmp_path / str(step)
        folder.mkdir()
        host.save_run("r", folder, with_optimizer=False)
        host.create_sampler(f"s{step}", MODEL, folder=folder, saved_by="r")
    assert host.stats()["spilled_samplers"] == 1


def test_only_what_is_idle_moves(host) -> None:
    host.create_run("run", MODEL, LORA)
    assert host.spill_idle(60.0) == 0
    host.create_sampler("snapshot", MODEL, run_id="run")
    future: Future = Future()
    spec = SampleSpec(data()[0].tokens, max_tokens=4, stop=[])
    host.sample("snapshot", spec, future, None)
    assert host.spill_idle(0.0) == 1  # the run; the sampler is sampling
    while host.has_sampling_work:
        host.sampling_step()
    assert host.spill_idle(0.0) == 1


def test_freeing_removes_the_files(host, tmp_path) -> None:
    host.create_run("run", MODEL, LORA)
    host.create_sampler("snapshot", MODEL, run_id="run")
    assert host.spill_idle(0.0) == 2
    host.free_run("run")
    host.free_sampler("snapshot")
    assert list((tmp_path / "spill").iterdir()) == []
    assert host.stats()["spilled_bytes"] == 0


def test_memory_short_moves_the_oldest_out_and_then_unloads_models(host, memory) -> None:
    host.create_run("old", MODEL, LORA)
    host.create_run("new", MODEL, LORA)

    class Filling(Memory):
        """Free memory that grows a little with each spilled adapter."""

        def __call__(self) -> int:
            return int(host.stats()["spilled_runs"]) * GIB + (0 if host.loaded_models() else GIB)

    host._free_bytes = Filling()
    other = str(tiny_model("qwen2"))
    backward(host, "new", data())
    assert host.stats()["spilled_runs"] == 1
    assert host._residents.runs["old"].file is not None
    assert np.isfinite(logprobs(host, "old")).all()
    memory.free = 8 * GIB
    host._free_bytes = memory
    host.load_model(other)
    assert set(host.loaded_models()) == {MODEL, other}


def test_a_model_of_spilled_runs_can_be_unloaded_and_comes_back(host, memory) -> None:
    host.create_run("run", MODEL, LORA)
    backward(host, "run", data())
    host.optim_step("run", AdamSpec(learning_rate=1e-2))
    before = logprobs(host, "run")
    other = str(tiny_model("qwen2"))
    host._free_bytes = lambda: GIB if not host.loaded_models() else 0
    host.load_model(other)
    assert host.loaded_models() == [other]
    host._free_bytes = memory
    np.testing.assert_array_equal(logprobs(host, "run"), before)
    assert set(host.loaded_models()) == {MODEL, other}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda h: h.create_run("big", MODEL, LoraSpec(rank=512)), "rank=512 makes an adapter of"),
        (lambda h: backward(h, "run", data(1000)), "1,000 tokens in one sequence"),
        (lambda h: h.create_sampler("s", MODEL, run_id="run"), "a snapshot of the run"),
        (lambda h: h.load_model(str(tiny_model("qwen3"))), "model .* needs about"),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(host, memory, call, match: str) -> None:
    host.create_run("run", MODEL, LORA)
    memory.free = 20_000
    with pytest.raises(UserError, match=rf"{match}.*[\d.]+ [MG]iB of memory and 0.0 MiB are free"):
        call(host)
    memory.free = GIB
    backward(host, "run", data())
    assert host.optim_step("run", AdamSpec())["grad_norm"] > 0


def test_the_limit_counts_what_the_process_holds(tmp_path) -> None:
    host = EngineHost(EngineSettings("cpu", "float32", memory_bytes=2**20))
    with pytest.raises(UserError, match=r"0\.0 MiB are free"):
        host.load_model(MODEL)
    roomy = EngineHost(EngineSettings("cpu", "float32", memory_bytes=16 * GIB))
    assert roomy.load_model(MODEL).vocab_size


def test_a_full_disk_keeps_what_is_in_memory(host, tmp_path) -> None:
    host.create_run("run", MODEL, LORA)
    before = logprobs(host, "run")
    (tmp_path / "spill").write_text("a file where the folder should be")
    assert host.spill_idle(0.0) == 0
    np.testing.assert_array_equal(logprobs(host, "run"), before)


def test_a_damaged_file_is_named_and_the_rest_works(host, tmp_path) -> None:
    host.create_run("run", MODEL, LORA)
    host.create_run("other", MODEL, LORA)
    assert host.spill_idle(0.0) == 2
    path = host._residents.runs["run"].file
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=path.name):
        logprobs(host, "run")
    assert np.isfinite(logprobs(host, "other")).all()
