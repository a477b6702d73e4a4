"""The engine thread: order, fairness, isolation of failures, memory, and its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    LoraSpec,
    LossSpec,
    SampleSpec,
    TrainDatum,
)
from tinker_cookbook.local.engine.worker import EngineWorker
from tinker_cookbook.local.errors import UserError

MODEL = str(tiny_model("llama"))
OTHER_MODEL = str(tiny_model("qwen3"))
LORA = LoraSpec(rank=4, seed=1)
CROSS_ENTROPY = LossSpec("cross_entropy")
STEP = AdamSpec(learning_rate=0.02)
PROMPT = np.arange(5, 25, dtype=np.int32)
SECONDS = 60


def datum(length: int = 30, seed: int = 0) -> TrainDatum:
    tokens = np.random.default_rng(seed).integers(3, 320, size=length + 1).astype(np.int32)
    inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(length, np.float32)}
    return TrainDatum(tokens[:-1], inputs)


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    engine = EngineWorker(EngineSettings("cpu", "float32", kv_cache_bytes=32 * 2**20))
    yield engine
    engine.close()


def loss(worker: EngineWorker, run_id: str) -> float:
    result = worker.forward_backward(run_id, [datum()], CROSS_ENTROPY, backward=False)
    return result.result(SECONDS).metrics["loss:sum"]


def scores(worker: EngineWorker, sampler_id: str) -> np.ndarray:
    spec = SampleSpec(datum().tokens, 1, 1, prompt_logprobs=True)
    result = worker.sample(sampler_id, spec).result(SECONDS)
    assert result.prompt_logprobs is not None
    return result.prompt_logprobs[1:]


def test_importing_and_building_the_worker_needs_no_torch():
    code = (
        "import sys, threading\n"
        "import tinker_cookbook.local.engine.worker as worker\n"
        "assert 'torch' not in sys.modules\n"
        "print(worker.EngineWorker.__name__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


def test_a_model_is_loaded_once_and_described(worker):
    first, second = worker.load_model(MODEL), worker.load_model(MODEL)
    info = first.result(SECONDS)
    assert second.result(SECONDS) is info
    assert (info.vocab_size, info.max_context_length, info.eos_token_ids) == (320, 1024, (2,))
    missing = worker.load_model(str(Path(MODEL) / "nothing-here")).exception(SECONDS)
    assert missing is not None


def test_operations_of_a_run_execute_in_order(worker):
    """Samplers that are created between queued steps hold the weights of exactly that point."""
    worker.create_run("run", MODEL, LORA)
    created = []
    for step in range(3):
        created.append(worker.create_sampler(f"s{step}", MODEL, run_id="run"))
        worker.forward_backward("run", [datum()], CROSS_ENTROPY)
        worker.optim_step("run", STEP)
    forward = worker.forward_backward("run", [datum()], CROSS_ENTROPY, backward=False)
    sums = [-float(scores(worker, f"s{step}").sum()) for step in range(3)]
    assert all(future.result(0) is None for future in created)
    assert sums[0] > sums[1] > sums[2]
    trained = forward.result(SECONDS).logprobs[0]
    frozen = scores(worker, "s1")
    worker.forward_backward("run", [datum()], CROSS_ENTROPY)
    worker.optim_step("run", STEP).result(SECONDS)
    assert np.array_equal(scores(worker, "s1"), frozen)
    worker.refresh_sampler("s0", "run").result(SECONDS)
    assert -float(scores(worker, "s0").sum()) < -float(trained[:-1].sum())


def test_the_sampler_of_a_fresh_run_is_the_base_model(worker):
    worker.create_run("run", MODEL, LORA)
    worker.create_sampler("fresh", MODEL, run_id="run")
    worker.create_sampler("base", MODEL)
    assert np.array_equal(scores(worker, "fresh"), scores(worker, "base"))


def test_runs_and_samplers_of_several_models_do_not_touch_each_other(worker):
    for name, model in (("a", MODEL), ("b", OTHER_MODEL)):
        worker.create_run(name, model, LORA)
        worker.create_sampler(f"{name}-start", model, run_id=name)
    before = loss(worker, "b")
    start = scores(worker, "b-start")
    for _ in range(2):
        worker.forward_backward("a", [datum()], CROSS_ENTROPY)
        worker.optim_step("a", STEP)
    assert loss(worker, "b") == before
    assert np.array_equal(scores(worker, "b-start"), start)


def test_a_failure_stays_in_its_operation(worker):
    worker.create_run("run", MODEL, LORA)
    bad_datum = TrainDatum(np.array([5, 6, 7]), {"target_tokens": np.array([1, 2])})
    bad = worker.forward_backward("run", [datum(), bad_datum], CROSS_ENTROPY)
    bad_step = worker.optim_step("run", AdamSpec(learning_rate=float("nan")))
    good = worker.forward_backward("run", [datum()], CROSS_ENTROPY)
    step = worker.optim_step("run", STEP)
    assert isinstance(bad.exception(SECONDS), UserError)
    assert isinstance(bad_step.exception(SECONDS), UserError)
    assert good.result(SECONDS).metrics["loss:sum"] > 0
    assert step.result(SECONDS)["grad_norm"] > 0


def test_unknown_runs_and_samplers_are_user_errors(worker):
    worker.load_model(MODEL)
    for future in (
        worker.optim_step("nobody", STEP),
        worker.forward_backward("nobody", [datum()], CROSS_ENTROPY),
        worker.create_sampler("s", MODEL, run_id="nobody"),
        worker.sample("nobody", SampleSpec(PROMPT)),
        worker.refresh_sampler("nobody", "nobody"),
    ):
        error = future.exception(SECONDS)
        assert isinstance(error, UserError)
        assert "nobody" in str(error)
    assert worker.free_run("nobody").result(SECONDS) is None
    assert worker.free_sampler("nobody").result(SECONDS) is None


def test_saving_and_loading_continues_a_run_exactly(worker, tmp_path):
    worker.create_run("run", MODEL, LORA)
    worker.forward_backward("run", [datum()], CROSS_ENTROPY)
    worker.optim_step("run", STEP)
    worker.save_run("run", tmp_path, with_optimizer=True).result(SECONDS)
    spec = worker.create_run_from("copy", tmp_path, with_optimizer=True).result(SECONDS)
    assert spec.rank == LORA.rank
    worker.create_sampler("saved", MODEL, folder=tmp_path)
    worker.create_sampler("live", MODEL, run_id="run")
    assert np.array_equal(scores(worker, "saved"), scores(worker, "live"))
    for name in ("run", "copy"):
        worker.forward_backward(name, [datum()], CROSS_ENTROPY)
        worker.optim_step(name, STEP)
    assert loss(worker, "run") == loss(worker, "copy")
    worker.load_run("run", tmp_path, with_optimizer=True).result(SECONDS)
    assert loss(worker, "run") > loss(worker, "copy")


def test_sampling_goes_on_while_a_long_batch_trains(worker):
    """Sampling runs between the packs of a large batch instead of waiting for its end."""
    worker.create_run("run", MODEL, LORA)
    worker.create_sampler("base", MODEL).result(SECONDS)
    done: list[str] = []
    training = worker.forward_backward("run", [datum(1000, n) for n in range(12)], CROSS_ENTROPY)
    training.add_done_callback(lambda _: done.append("training"))
    sample = worker.sample("base", SampleSpec(PROMPT, 1, 12, stop=[]))
    sample.add_done_callback(lambda _: done.append("sample"))
    training.result(SECONDS)
    sample.result(SECONDS)
    assert done == ["sample", "training"]


def test_training_goes_on_while_samples_keep_coming(worker):
    worker.create_run("run", MODEL, LORA)
    worker.create_sampler("base", MODEL).result(SECONDS)
    samples = [worker.sample("base", SampleSpec(PROMPT, 4, 900, stop=[])) for _ in range(8)]
    assert loss(worker, "run") > 0
    assert not all(sample.done() for sample in samples)
    for sample in samples:
        sample.cancel()


def test_cancelled_operations_do_not_run(worker):
    worker.create_run("run", MODEL, LORA).result(SECONDS)
    before = loss(worker, "run")
    busy = worker.forward_backward("run", [datum(1000, n) for n in range(3)], CROSS_ENTROPY)
    step = worker.optim_step("run", STEP)
    assert step.cancel()
    busy.result(SECONDS)
    assert loss(worker, "run") == before
    with pytest.raises(CancelledError):
        step.result(0)


def test_tokens_stream_from_the_engine_thread(worker):
    worker.create_sampler("base", MODEL)
    events: list[tuple[int, int, float]] = []
    threads: set[str] = set()

    def listen(index: int, token: int, logprob: float) -> None:
        events.append((index, token, logprob))
        threads.add(threading.current_thread().name)

    spec = SampleSpec(PROMPT, 2, 6, stop=[])
    result = worker.sample("base", spec, on_token=listen).result(SECONDS)
    assert threads == {"engine"}
    for index, sequence in enumerate(result.sequences):
        assert [t for i, t, _ in events if i == index] == sequence.tokens.tolist()


def test_samplers_are_dropped_but_finish_what_they_serve(worker):
    worker.create_sampler("base", MODEL).result(SECONDS)
    running = worker.sample("base", SampleSpec(PROMPT, 1, 200, stop=[]))
    worker.free_sampler("base").result(SECONDS)
    assert isinstance(worker.sample("base", SampleSpec(PROMPT)).exception(SECONDS), UserError)
    assert len(running.result(SECONDS).sequences[0].tokens) == 200


def test_stop_strings_end_completions(worker):
    worker.create_sampler("base", MODEL)
    from tinker_cookbook.local.engine.sampling.stops import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    free = worker.sample("base", SampleSpec(PROMPT, 1, 60, seed=3, stop=[])).result(SECONDS)
    text = tokenizer.decode(free.sequences[0].tokens.tolist(), skip_special_tokens=False)
    stop = next(text[i : i + 3] for i in range(10, len(text)) if "\ufffd" not in text[i : i + 3])
    ended = worker.sample("base", SampleSpec(PROMPT, 1, 60, seed=3, stop=[stop])).result(SECONDS)
    tokens = ended.sequences[0].tokens.tolist()
    assert ended.sequences[0].stop_reason == "stop"
    assert tokens == free.sequences[0].tokens[: len(tokens)].tolist()
    assert stop in tokenizer.decode(tokens, skip_special_tokens=False)
    assert stop not in tokenizer.decode(tokens[:-1], skip_special_tokens=False)


def test_stats_count_work(worker):
    worker.create_sampler("base", MODEL)
    worker.sample("base", SampleSpec(PROMPT, 3, 7, stop=[])).result(SECONDS)
    stats = worker.stats()
    assert stats["sampled_tokens"] == 21
    assert stats["prompt_tokens"] == len(PROMPT)
    assert stats["running_sequences"] == 0
    assert stats["sampled_tokens_per_second"] > 0


def test_an_adapter_that_cannot_fit_is_refused_with_numbers(worker):
    error = worker.create_run("huge", MODEL, LoraSpec(rank=10**7)).exception(SECONDS)
    assert isinstance(error, UserError)
    assert "rank=10000000" in str(error)


def test_closing_fails_what_is_unfinished(worker):
    worker.create_run("run", MODEL, LORA)
    worker.create_sampler("base", MODEL).result(SECONDS)
    pending = [worker.sample("base", SampleSpec(PROMPT, 8, 1000, stop=[])) for _ in range(3)]
    pending.append(worker.optim_step("missing", STEP))
    worker.close()
    worker.close()
    pending.append(worker.load_model(MODEL))
    assert isinstance(pending[-1].exception(0), RuntimeError)
    for future in pending[:3]:
        assert "closed" in str(future.exception(0))


def test_closing_does_not_wait_for_the_end_of_a_long_batch(worker):
    worker.create_run("run", MODEL, LORA).result(SECONDS)
    batch = worker.forward_backward("run", [datum(1000, n) for n in range(200)], CROSS_ENTROPY)
    while not batch.running():
        time.sleep(0.01)
    worker.close()
    assert "closed" in str(batch.exception(0))


def test_unusable_settings_fail_every_operation_with_the_reason():
    engine = EngineWorker(EngineSettings(device="no-such-device"))
    error = engine.load_model(MODEL).exception(SECONDS)
    assert "no-such-device" in str(error)
    later = engine.load_model(MODEL).exception(SECONDS)
    assert "no-such-device" in str(later)
    engine.close()


def test_idle_models_make_room_and_used_ones_stay():
    """With memory for one model only, an idle model is unloaded and one with a run is not."""
    from tinker_cookbook.local.engine.host import EngineHost

    host: EngineHost
    gib = 2**30

    def free_bytes() -> int:
        return gib if not host.loaded_models() else gib // 4

    settings = EngineSettings("cpu", "float32", kv_cache_bytes=2**20)
    host = EngineHost(settings, free_bytes=free_bytes)
    host.load_model(MODEL)
    host.load_model(OTHER_MODEL)
    assert host.loaded_models() == [OTHER_MODEL]
    host.create_run("run", OTHER_MODEL, LORA)
    with pytest.raises(UserError, match=r"needs about 0\.5 GiB.*0\.2 GiB are free"):
        host.load_model(MODEL)
    host.free_run("run")
    host.load_model(MODEL)
    assert host.loaded_models() == [MODEL]


def test_other_architectures_train_and_sample_through_transformers(worker, tmp_path):
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    PhiForCausalLM(config).save_pretrained(tmp_path)
    model = str(tmp_path)
    worker.create_run("run", model, LORA)
    worker.forward_backward("run", [datum()], CROSS_ENTROPY)
    worker.optim_step("run", STEP)
    worker.create_sampler("trained", model, run_id="run")
    spec = SampleSpec(datum().tokens, 3, 8, seed=1, stop=[], prompt_logprobs=True)
    result = worker.sample("trained", spec).result(SECONDS)
    tokens = np.concatenate([spec.prompt, result.sequences[2].tokens])
    targets = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(len(tokens) - 1)}
    whole = TrainDatum(tokens[:-1], targets)
    forward = worker.forward_backward("run", [whole], CROSS_ENTROPY, backward=False)
    expected = forward.result(SECONDS).logprobs[0]
    sampled = np.concatenate([result.prompt_logprobs[1:], result.sequences[2].logprobs])
    assert np.abs(sampled - expected).max() < 3e-5
    again = worker.sample("trained", spec).result(SECONDS)
    assert again.sequences[1].tokens.tolist() == result.sequences[1].tokens.tolist()
