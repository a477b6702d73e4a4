"""Steps with static shapes give the tokens of the decoder that takes batches as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import Sampled, random_adapter, sampled
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.architecture import ArchConfig, read_arch
from tinker_cookbook.local.engine.model.ops import RopeTable
from tinker_cookbook.local.engine.model.weights import ModelWeights, describe_weights
from tinker_cookbook.local.engine.sampling.adapter_bank import (
    MAX_PLACES,
    NO_ADAPTER,
    AdapterBank,
    BankRouter,
)
from tinker_cookbook.local.engine.sampling.adapters import LoraRouter, StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.cache_rows import Pool, cache_shape
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.static_decoder import StaticDecoder
from tinker_cookbook.local.engine.sampling.static_step import StaticStep, plan_step
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.sampling.torch_layers import TorchLayers
from tinker_cookbook.local.engine.types import SampledSequence, SampleSpec

Job = tuple[SampleSpec, StackedLora | None, int]
"""A request, its adapter and the step before which it arrives."""


def spec_of(length: int, max_tokens: int, temperature: float = 1.0) -> SampleSpec:
    prompt = np.random.default_rng(length).integers(3, 320, size=length).astype(np.int32)
    return SampleSpec(prompt, max_tokens=max_tokens, temperature=temperature, seed=length, stop=[])


def serve(model: Sampled, jobs: Sequence[Job]) -> list[SampledSequence]:
    """Serve requests that arrive over time."""
    requests, step = {}, 0
    while len(requests) < len(jobs) or model.scheduler.has_work:
        for number, (spec, adapter, arrives) in enumerate(jobs):
            if number not in requests and arrives <= step:
                requests[number] = model.start(spec, adapter)
        model.scheduler.step()
        step += 1
    results = [requests[number].future.result(timeout=0) for number in range(len(jobs))]
    return [sequence for result in results for sequence in result.sequences]


def check(jobs: Sequence[Job], architecture: str = "llama", **options) -> int:
    """Compare the decoders; return the number of static steps."""
    expected = serve(sampled(architecture, "torch", **options), jobs)
    model = sampled(architecture, "static", **options)
    for ours, theirs in zip(serve(model, jobs), expected, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=5e-5)
    decoder = model.scheduler._decoder
    assert isinstance(decoder, StaticDecoder)
    return decoder.num_static_batches


@pytest.fixture(scope="module")
def adapters() -> list[StackedLora]:
    """Adapters of several ranks; one trains attention alone, one also the output embedding."""
    base = sampled("llama", "static").base
    return [
        random_adapter(base, 1),
        random_adapter(base, 2, rank=8),
        random_adapter(base, 3, rank=2, train_mlp=False),
        random_adapter(base, 4, train_unembed=True),
        *(random_adapter(base, seed, train_unembed=False) for seed in range(5, 11)),
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_one_sequence_across_the_lengths_that_are_rounded(architecture: str) -> None:
    # 50 to 290 tokens: lengths of 64, 128, 256 and 512, rows of 256 and 512 tokens
    assert check([(spec_of(50, 240), None, 0)], architecture) == 239


def test_rows_come_and_go_and_prompts_come_between() -> None:
    jobs = [(spec_of(5 + 3 * n, 6 + 5 * (n % 4)), None, 2 * n) for n in range(12)]
    assert check(jobs, limits=SchedulerLimits(max_batch_tokens=16)) > 10


def test_sequences_in_pools_of_several_capacities() -> None:
    jobs = [(spec_of(length, 40), None, 0) for length in (10, 100, 300, 20, 200)]
    assert check(jobs) > 30


def test_greedy_rows_between_others() -> None:
    assert check([(spec_of(9 + n, 12, float(n % 2)), None, 0) for n in range(5)]) > 8


def test_adapters_of_several_ranks_and_the_base_in_one_batch(adapters: list[StackedLora]) -> None:
    chosen = [None, *adapters[:4], adapters[1], None]
    jobs = [(spec_of(8 + n, 20, 0.0), adapter, n // 3) for n, adapter in enumerate(chosen)]
    assert check(jobs) > 15


def test_more_adapters_than_places_are_computed_without_static_shapes(
    adapters: list[StackedLora],
) -> None:
    assert len(adapters) > MAX_PLACES
    jobs = [(spec_of(8 + n, 10, 0.0), adapter, 0) for n, adapter in enumerate(adapters)]
    assert check(jobs) < 3


def test_weights_that_replace_others_are_used(adapters: list[StackedLora]) -> None:
    # one after another, each with the newest weights of a run
    jobs = [(spec_of(8, 10, 0.0), adapter, 12 * n) for n, adapter in enumerate(adapters)]
    assert check(jobs) > 80


def test_clients_that_take_turns_do_not_touch_each_others_rows() -> None:
    results = []
    for decoder in ("torch", "static"):
        model = sampled("llama", decoder, limits=SchedulerLimits(max_batch_tokens=8))
        requests = [model.start(spec_of(20 + n, 30), client="ab"[n % 2], seed=n) for n in range(8)]
        results.append([result.sequences[0].tokens.tolist() for result in model.run(*requests)])
    assert results[0] == results[1]


def test_an_unselected_row_is_not_written() -> None:
    base = sampled("llama", "static").base
    pool = Pool(cache_shape(base.arch, base.weights), 128)
    pool.resize(4)
    for _ in range(3):
        pool.add().activate()
    numbers = np.array([0, 2])
    plan = plan_step(pool, numbers, numbers + 5, numbers + 7, np.array([NO_ADAPTER, 0]))
    assert plan is not None
    assert plan.num_rows == 4
    assert plan.num_places == 1
    assert plan.inputs[2].tolist() == [0, 3, 2, 3]  # row 1 is another sequence's, row 3 is spare
    pool.add()
    assert plan_step(pool, numbers, numbers, numbers, np.zeros(2, np.int64)) is None


def test_a_bank_gives_the_products_of_each_adapter(adapters: list[StackedLora]) -> None:
    bank = AdapterBank(torch.float32, torch.device("cpu"))
    base = sampled("llama", "static").base
    for batch in (adapters[:1], [None, adapters[2], *adapters[:2]], adapters[:1]):
        places = bank.place(batch)
        assert places is not None
        router = BankRouter(bank, torch.from_numpy(places), int(places.max()) + 1)
        x = torch.randn(len(batch), base.arch.hidden_size)
        weight = torch.randn(base.arch.q_size + 2 * base.arch.kv_size, base.arch.hidden_size)
        found = router.project(x, weight, 1, "qkv")
        exact = LoraRouter([(adapter, 1) for adapter in batch], x.device)
        torch.testing.assert_close(found, exact.project(x, weight, 1, "qkv"), atol=1e-4, rtol=1e-4)
    assert bank.moves == 4  # a first adapter, a higher rank, a second and a third place


def test_memory_stays_where_it_is_while_weights_are_replaced(adapters: list[StackedLora]) -> None:
    bank = AdapterBank(torch.float32, torch.device("cpu"))
    for adapter in adapters[4:6]:
        for _ in range(70):  # the first one becomes idle
            assert bank.place([adapter, None]) is not None
    moves = bank.moves
    for adapter in adapters[6:]:
        bank.place([adapter])
    assert moves < bank.moves <= 4  # weights in use at the same time get places next to each other
    moves, size = bank.moves, bank.num_bytes
    for _ in range(3):
        for adapter in adapters[4:]:
            assert bank.place([adapter]) is not None
    assert (bank.moves, bank.num_bytes) == (moves, size)


def test_weights_that_are_not_finite_do_not_reach_other_rows(adapters: list[StackedLora]) -> None:
    base = sampled("llama", "static").base
    broken = random_adapter(base, 20)
    broken.adapter.parameters[5] = torch.nan
    bank = AdapterBank(torch.float32, torch.device("cpu"))
    assert bank.place([adapters[0], broken]) is None
    assert bank.place([adapters[0], None]) is not None


def model_without_memory() -> tuple[ArchConfig, ModelWeights, Pool]:
    """Reading one of its tensors on the processor, as `item` does, is an error."""
    arch = read_arch(tiny_model("qwen3"))
    assert arch is not None
    weights = describe_weights(arch, stored_dtype=torch.bfloat16, dtype=torch.bfloat16)
    pool = Pool(cache_shape(arch, weights), 128)
    pool.resize(4)
    pool.add().activate()
    return arch, weights, pool


def test_a_step_waits_for_no_number() -> None:
    arch, weights, pool = model_without_memory()
    layers, device = TorchLayers(arch, weights), torch.device("meta")
    rope, bank = RopeTable(arch.rope, arch.head_dim, device), AdapterBank(torch.bfloat16, device)
    step, zero = StaticStep(layers, rope, bank), np.zeros(1, np.int64)
    plan = plan_step(pool, zero, zero, zero, zero + NO_ADAPTER)
    assert plan is not None
    step.compute(plan)
    assert step.outputs(plan.num_rows)[1].shape == (1, arch.vocab_size)


def test_a_batch_with_prompts_waits_for_no_number() -> None:
    arch, weights, pool = model_without_memory()
    chunks = [Chunk(np.arange(5), start, pool.add(), None) for start in (0, 3)]
    batch = Batch([1], [7], [None], [], [pool.rows[0]], chunks)
    decoder = TorchDecoder(arch, weights)
    hidden = decoder.forward(batch)
    assert decoder.logits(hidden, batch.adapters()).shape == (11, arch.vocab_size)
