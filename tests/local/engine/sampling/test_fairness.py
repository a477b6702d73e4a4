"""Clients share the scheduler: however much one has submitted, another gets its share of the work.

Work is counted in tokens, not in seconds: a pass over n tokens costs n and the decoder's overhead.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import Sampled, sampled
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.hf_model import HfModel
from tinker_cookbook.local.engine.sampling.fairness import FairTurns
from tinker_cookbook.local.engine.sampling.hf_decoder import HfCache, HfDecoder
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.request_checks import check_sample_spec
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.stops import build_stop_rule, load_tokenizer
from tinker_cookbook.local.engine.types import ModelInfo, SampleSpec

SMALL = SchedulerLimits(max_sequences=32)


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, 320, size=length).astype(np.int32)


def short(seed: int = 1) -> SampleSpec:
    """Return a request whose client waits for a short answer."""
    return SampleSpec(prompt_of(12, seed=99), 1, 20, seed=seed, stop=[])


@dataclass
class Load:
    """A scheduler, and the cost of each of its passes."""

    scheduler: Scheduler
    info: ModelInfo
    costs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        decoder = self.scheduler._decoder
        forward = decoder.forward

        def counted(batch):
            self.costs.append(decoder.overhead_tokens + len(batch.tokens()))
            return forward(batch)

        decoder.forward = counted

    def start(self, client: str, spec: SampleSpec) -> Request:
        rule = build_stop_rule(
            spec.stop,
            eos_token_ids=(),
            vocab_size=self.info.vocab_size,
            get_tokenizer=lambda: load_tokenizer(self.info.folder),
        )
        limit = check_sample_spec(spec, self.info)
        request = Request(spec, None, Future(), rule, limit, client=client)
        self.scheduler.add(request)
        return request

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()

    def cost_of(self, client: str, *specs: SampleSpec) -> int:
        """Return the cost of all passes from a client's requests to its last answer."""
        first = len(self.costs)
        requests = [self.start(client, spec) for spec in specs]
        while not all(request.future.done() for request in requests):
            self.scheduler.step()
        return sum(self.costs[first:])


def of_native(decoder: str = "compiled", **options) -> Load:
    model: Sampled = sampled("llama", decoder, **options)
    return Load(model.scheduler, model.info)


def of_transformers(folder: Path | None = None) -> Load:
    folder = folder or tiny_model()
    base = HfModel(folder, dtype=torch.float32)
    info = ModelInfo(str(folder), str(folder), base.vocab_size, base.max_positions, (2,))
    return Load(Scheduler(HfDecoder(base), HfCache(base), SMALL), info)


@pytest.mark.parametrize("decoder", ["torch", "compiled"])
def test_a_short_answer_takes_twice_as_long_beside_a_client_with_hundreds_of_samples(decoder):
    alone = of_native(decoder).cost_of("b", short())
    busy = of_native(decoder)
    for number in range(64):
        busy.start("a", SampleSpec(prompt_of(20, number), 4, 400, seed=number, stop=[]))
    busy.steps(30)
    assert busy.scheduler.num_running == 128
    before = busy.scheduler.sampled_tokens
    costs = [busy.cost_of("b", short(seed)) for seed in range(4)]
    # a pass of the other client's 128 rows may come between the first and the last token
    assert sum(costs) < 2.5 * 4 * alone + 4 * 150
    assert busy.scheduler.sampled_tokens - before > 4 * 20 + 128  # client a still decodes


def test_a_full_memory_makes_room_for_a_client_that_has_nothing():
    alone_load = of_native()
    alone = alone_load.start("b", short())
    alone_load.steps(25)
    row_bytes = 512 * sampled().cache.bytes_per_token
    busy = of_native(cache_bytes=6 * row_bytes)
    long = [
        busy.start("a", SampleSpec(prompt_of(30, number), 2, 300, seed=number, stop=[]))
        for number in range(8)
    ]
    busy.steps(40)
    waiting = busy.scheduler.num_waiting
    assert waiting > 4
    asked = busy.start("b", short())
    busy.steps(80)
    found, expected = asked.future.result(timeout=0), alone.future.result(timeout=0)
    assert found.sequences[0].tokens.tolist() == expected.sequences[0].tokens.tolist()
    assert np.array_equal(found.sequences[0].logprobs, expected.sequences[0].logprobs)
    assert not any(request.future.done() for request in long)
    plenty = of_native()
    same = [plenty.start("a", request.spec) for request in long]
    for load in (busy, plenty):
        while load.scheduler.has_work:
            load.scheduler.step()
    for one, other in zip(long, same, strict=True):  # pausing changed no bit of the others
        pairs = zip(one.future.result(0).sequences, other.future.result(0).sequences, strict=True)
        for first, second in pairs:
            assert first.tokens.tolist() == second.tokens.tolist()
            assert np.array_equal(first.logprobs, second.logprobs)


def test_models_of_transformers_are_shared_too():
    alone = of_transformers().cost_of("b", short())
    busy = of_transformers()
    for number in range(35):
        busy.start("a", SampleSpec(prompt_of(8, number), 2, 30, seed=number, stop=[]))
    busy.steps(4)
    assert busy.cost_of("b", short()) < 2.5 * alone + 2 * 80


def test_long_prompts_to_score_do_not_hold_up_others():
    alone = of_native().cost_of("b", short())
    busy = of_native()
    for number in range(50):
        prompt = prompt_of(900, number)
        busy.start("a", SampleSpec(prompt, 1, 1, prompt_logprobs=True))
    busy.steps(2)
    assert busy.cost_of("b", short()) < 2.5 * alone + 2 * 900
    assert busy.scheduler.num_waiting > 20


def test_a_request_for_many_samples_gets_places_while_another_client_holds_all():
    busy = of_native(limits=SMALL)
    for number in range(60):
        busy.start("a", SampleSpec(prompt_of(9, number), 1, 900, seed=number, stop=[]))
    busy.steps(20)
    assert busy.scheduler.num_running == 32
    busy.start("b", SampleSpec(prompt_of(9, 77), 30, 900, seed=1, stop=[]))
    busy.steps(20)
    assert busy.scheduler.places()["b"] == SMALL.own_sequences
    assert busy.scheduler.places()["a"] == 32


def test_clients_with_as_much_work_share_every_pass():
    spec = SampleSpec(prompt_of(10), 4, 50, seed=1, stop=[])
    together, one = of_native(), of_native()
    requests = [together.start(client, spec) for client in ("a", "b")]
    while not all(request.future.done() for request in requests):
        together.scheduler.step()
    one.cost_of("a", spec)
    assert len(together.costs) <= len(one.costs) + 2


def test_a_client_alone_is_never_held_back():
    turns = FairTurns(8)
    for _ in range(3):
        assert turns.choose({"a": 128}) == {"a"}
        turns.charge({"a": 128}, {"a": 128})


@pytest.mark.parametrize("sizes", [(1, 128), (1, 2, 120), (30, 128), (1, 1, 1, 500)])
def test_each_of_k_clients_has_a_kth_of_its_own_speed(sizes):
    overhead = 8
    turns, clients = FairTurns(overhead), {str(number): size for number, size in enumerate(sizes)}
    elapsed, tokens = 0, dict.fromkeys(clients, 0)
    while elapsed < 100_000:
        served = {client: clients[client] for client in turns.choose(clients)}
        turns.charge(clients, served)
        elapsed += overhead + sum(served.values())
        for client, count in served.items():
            tokens[client] += count
    for client, size in clients.items():
        alone = elapsed * size / (overhead + size)
        assert tokens[client] > 0.9 * alone / len(clients)
