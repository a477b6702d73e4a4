"""Scorings that begin alike: the prefix is computed once, and results are those of each one alone.

The compiled kernels give the same bits. torch's products may round a row by its place in the
batch, so results of the torch decoder agree within `LOGPROB_TOLERANCE`.
"""

# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from tests.local.engine.sampling_models import (
    DECODERS,
    ON_TORCH,
    PAIRS,
    Sampled,
    random_adapter,
    sampled,
)
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.prefix_index import (
    PrefixIndex,
    hash_beginnings,
    num_shared,
)
from tinker_cookbook.local.engine.types import SampleResult, SampleSpec, SparseRows

LOGPROB_TOLERANCE = 3e-5


def tokens_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, 320, size=length).astype(np.int32)


def behind(prefix: np.ndarray, count: int, length: int = 5) -> list[np.ndarray]:
    """Return prompts that begin with a prefix and end differently."""
    return [np.concatenate([prefix, tokens_of(length, seed)]) for seed in range(1, count + 1)]


def scoring(prompt: np.ndarray, **asked) -> SampleSpec:
    return SampleSpec(prompt, 1, 1, **({"prompt_logprobs": True, "seed": 7} | asked))


def targets(prompt: np.ndarray, rows: slice, width: int = 3) -> np.ndarray:
    """Return target ids for some rows of a prompt; the other rows ask nothing."""
    ids = np.full((len(prompt) - 1, width), -1, np.int64)
    ids[rows] = np.random.default_rng(len(prompt)).integers(0, 320, ids[rows].shape)
    return ids


def sparse(prompt: np.ndarray) -> SparseRows:
    """Return one target in every third row."""
    rows = np.arange(0, len(prompt) - 1, 3)
    crow = np.concatenate([[0], np.cumsum(np.isin(np.arange(len(prompt) - 1), rows))])
    return SparseRows(rows % 320, crow, np.zeros(len(rows), np.int64), (len(prompt) - 1, 1))


ASKED = {
    "all logprobs": lambda prompt: scoring(prompt),
    "last logprobs": lambda prompt: scoring(prompt, prompt_logprobs_last_n=5),
    "logprobs from within the prefix": lambda p: scoring(p, prompt_logprobs_last_n=23),
    "most likely": lambda prompt: scoring(prompt, topk_prompt_logprobs=4),
    "last most likely": lambda p: scoring(
        p, prompt_logprobs=False, topk_prompt_logprobs=3, prompt_logprobs_last_n=6
    ),
    "targets at the end": lambda p: scoring(p, target_prompt_logprobs=targets(p, slice(-5, None))),
    "targets everywhere": lambda p: scoring(
        p, prompt_logprobs=False, target_prompt_logprobs=targets(p, slice(None))
    ),
    "sparse targets": lambda p: scoring(p, target_prompt_logprobs=sparse(p)),
    "alternatives": lambda p: scoring(p, seed=3, prompt_alt_tokens_k=2, prompt_logprobs_last_n=4),
    "one token": lambda p: SampleSpec(p, 2, 1, seed=4, topk_sample_logprobs=3),
}


def numbers(result: SampleResult) -> list[np.ndarray]:
    """Return everything in a result, except how it was computed."""
    found = [s.logprobs for s in result.sequences] + [s.tokens for s in result.sequences]
    for topk in (result.topk_prompt_logprobs, result.prompt_alt_tokens):
        found += [] if topk is None else [topk.token_ids, topk.logprobs]
    asked = result.target_prompt_logprobs
    if asked is not None:
        found.append(asked.values if isinstance(asked, SparseRows) else asked)
    if result.prompt_logprobs is not None:
        found.append(result.prompt_logprobs)
    return found


def assert_same(first: SampleResult, second: SampleResult, decoder: str) -> None:
    for one, other in zip(numbers(first), numbers(second), strict=True):
        if decoder not in ON_TORCH:
            assert np.array_equal(one, other, equal_nan=True)
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=LOGPROB_TOLERANCE)


def peak_of(model: Sampled) -> int:
    """Serve everything and return the most memory that keys and values took."""
    peak = 0
    while model.scheduler.has_work:
        model.scheduler.step()
        peak = max(peak, model.cache.num_bytes)
    return peak


def computed(model: Sampled) -> dict[str, int]:
    """Return a count of the rows that pass through the head from now on."""
    decoder, count = model.scheduler._decoder, {"rows": 0}
    logits = decoder.logits

    def counted(hidden: Tensor, adapters: list) -> Tensor:
        count["rows"] += len(hidden)
        return logits(hidden, adapters)

    decoder.logits = counted
    return count


@pytest.mark.parametrize("decoder", [*DECODERS, PAIRS])
@pytest.mark.parametrize("asked", ASKED)
def test_scorings_give_the_same_alone_and_behind_a_common_prefix(asked, decoder):
    """The limit makes the prefix several chunks, and the endings several batches."""
    prompts = behind(tokens_of(41), 9)
    specs = [ASKED[asked](prompt) for prompt in prompts]
    together = sampled("llama", decoder, limits=SchedulerLimits(max_batch_tokens=24))
    results = together.sample(*specs)
    assert together.scheduler.prompt_tokens < 46 + 8 * 9
    for spec, result in zip(specs, results, strict=True):
        alone = sampled("llama", decoder).sample(spec)[0]
        assert alone.prompt_cache_hit_tokens == 0
        assert_same(alone, result, decoder)


@pytest.mark.parametrize("decoder", [*DECODERS, PAIRS])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures_adapters_and_questions_in_one_batch(architecture, decoder):
    prompts = behind(tokens_of(30), 3)
    model, alone = sampled(architecture, decoder), sampled(architecture, decoder)
    requests, expected = [], []
    for seed in (0, 1, 2):
        adapter = random_adapter(model.base, seed) if seed else None
        for prompt in prompts:
            for ask in ASKED.values():
                requests.append(model.start(ask(prompt), adapter))
                alone.cache.prefixes.forget(0 if adapter is None else adapter.key)
                expected.append(alone.sample(ask(prompt), adapter=adapter)[0])
    others = [model.start(SampleSpec(p, 2, 9, seed=1, stop=[])) for p in prompts]
    found = model.run(*requests, *others)
    for one, other in zip(expected, found[: len(expected)], strict=True):
        assert_same(one, other, decoder)
    shared = sum(result.prompt_cache_hit_tokens for result in found)
    assert shared > 0.7 * 28 * len(requests)


def test_a_prefix_is_computed_once_for_all_that_come_together():
    model = sampled(decoder="compiled")
    results = model.sample(
        *[scoring(p, prompt_logprobs_last_n=5) for p in behind(tokens_of(64), 64)]
    )
    assert model.scheduler.prompt_tokens == 69 + 63 * 5
    assert [result.prompt_cache_hit_tokens for result in results] == [0] + [64] * 63


def test_each_of_several_prefixes_is_computed_once_without_waiting_for_the_others():
    model = sampled(decoder="compiled")
    groups = [behind(tokens_of(40, seed), 4) for seed in range(5)]
    requests = [model.start(scoring(prompt)) for group in groups for prompt in group]
    model.scheduler.step()
    assert model.scheduler.prompt_tokens == 5 * 45  # the first of each group
    model.run(*requests)
    assert model.scheduler.prompt_tokens == 5 * (45 + 3 * 5)


def test_nested_prefixes_are_shared_at_every_level():
    model = sampled(decoder="compiled")
    header = tokens_of(200)
    questions = [np.concatenate([header, tokens_of(24, seed)]) for seed in range(1, 4)]
    prompts = [prompt for question in questions for prompt in behind(question, 4, length=4)]
    model.sample(*[scoring(prompt) for prompt in prompts])
    assert model.scheduler.prompt_tokens == 200 + 3 * 24 + 12 * 4


def test_logprobs_of_the_prefix_itself_are_computed_once():
    model = sampled(decoder="compiled")
    prompts = behind(tokens_of(64), 16)
    count = computed(model)
    model.sample(*[scoring(prompt) for prompt in prompts])
    # all of the first prompt; of the others the border and the ending; and the token each draws
    assert count["rows"] == 68 + 15 * 5 + 16
    count["rows"] = 0
    asked = [scoring(prompt, topk_prompt_logprobs=2) for prompt in prompts]
    model.sample(asked[0])
    model.sample(*asked[1:])
    assert count["rows"] == 68 + 15 * 5 + 16
    assert model.scheduler.prompt_tokens < 69 + 15 * 5 + 16 * 6


def test_requests_that_come_later_read_what_earlier_ones_stored():
    model = sampled(decoder="compiled")
    first, second, third = behind(tokens_of(80), 3)
    model.sample(scoring(first))
    result = model.sample(scoring(second, prompt_logprobs_last_n=5))[0]
    assert result.prompt_cache_hit_tokens == 80
    alone = sampled(decoder="compiled").sample(scoring(third))[0]
    assert_same(alone, model.sample(scoring(third))[0], "compiled")
    again = model.sample(scoring(first))[0]
    assert again.prompt_cache_hit_tokens == 84  # the last token is computed, with those up to four


@pytest.mark.parametrize("decoder", ["compiled", PAIRS])
def test_completions_and_scorings_share_with_each_other(decoder):
    model, prompt = sampled(decoder=decoder), tokens_of(60)
    completion = model.sample(SampleSpec(prompt, 1, 12, seed=1, stop=[]))[0].sequences[0]
    whole = np.concatenate([prompt, completion.tokens]).astype(np.int32)
    scored = model.sample(scoring(whole, prompt_logprobs_last_n=12))[0]
    assert scored.prompt_cache_hit_tokens >= 56
    assert np.array_equal(scored.prompt_logprobs[-12:], completion.logprobs)
    other = tokens_of(70, seed=4)
    model.sample(scoring(other))
    sample = SampleSpec(other, 2, 8, seed=2, stop=[], prompt_logprobs=True)
    continued = model.sample(sample)[0]
    assert continued.prompt_cache_hit_tokens == 69
    assert_same(sampled(decoder=decoder).sample(sample)[0], continued, decoder)


@pytest.mark.parametrize("decoder", ["compiled", PAIRS])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_little_memory_changes_no_result(rows, decoder):
    """Stored prefixes and running sequences stay within one budget, whatever is evicted for it."""
    groups = [behind(tokens_of(60, seed), 3, length=9) for seed in range(6)]
    specs = [scoring(prompt) for group in groups for prompt in group]
    specs += [SampleSpec(tokens_of(20, seed), 2, 40, seed=seed, stop=[]) for seed in range(3)]
    expected = sampled(decoder=decoder).sample(*specs)
    size = 128 * sampled(decoder=decoder).cache.bytes_per_token
    tight = sampled(decoder=decoder, cache_bytes=rows * size)
    for _ in range(2):
        requests = [tight.start(spec) for spec in specs]
        assert peak_of(tight) <= tight.cache.max_bytes
        assert tight.cache.prefixes.num_bytes <= tight.cache.max_bytes // 4
        for request, result in zip(requests, expected, strict=True):
            assert_same(result, request.future.result(timeout=0), decoder)


def test_prompts_that_are_scored_once_do_not_evict_a_prefix_that_is_used():
    model = sampled(cache_bytes=6 * 4 * 100 * sampled().cache.bytes_per_token)
    prompts = behind(tokens_of(90), 4)
    model.sample(*[scoring(prompt) for prompt in prompts[:2]])
    for seed in range(20):
        model.sample(scoring(tokens_of(95, seed + 50)))
    assert model.sample(scoring(prompts[3]))[0].prompt_cache_hit_tokens == 88


def test_many_short_prompts_are_bounded_in_number():
    model = sampled()
    model.sample(*[scoring(tokens_of(17, seed)) for seed in range(560)])
    assert len(model.cache.prefixes) == 512


def test_other_weights_share_nothing_and_gone_weights_leave_nothing():
    model = sampled(decoder="compiled")
    first, second = (random_adapter(model.base, seed) for seed in (1, 2))
    prompts = behind(tokens_of(50), 3)
    model.sample(scoring(prompts[0]), adapter=first)
    changed = model.sample(scoring(prompts[1]), adapter=second)[0]
    assert changed.prompt_cache_hit_tokens == 0
    model.scheduler.forget(first.key)
    assert model.sample(scoring(prompts[1]), adapter=first)[0].prompt_cache_hit_tokens == 0
    model.scheduler.forget(first.key)
    model.scheduler.forget(second.key)
    assert model.cache.num_bytes == 0


def test_weights_that_go_while_they_are_in_use_leave_nothing_afterwards():
    model = sampled(decoder="compiled", limits=SchedulerLimits(max_batch_tokens=16))
    adapter = random_adapter(model.base, 1)
    requests = [model.start(scoring(p), adapter) for p in behind(tokens_of(50), 5)]
    for _ in range(5):
        model.scheduler.step()
    model.scheduler.forget(adapter.key)  # some read the prefix, and one may fill another
    expected = sampled(decoder="compiled")
    for request, result in zip(requests, model.run(*requests), strict=True):
        assert_same(expected.sample(request.spec, adapter=adapter)[0], result, "compiled")
    model.scheduler.forget(adapter.key)
    assert model.cache.num_bytes == 0


@pytest.mark.parametrize("steps", range(8))
def test_a_cancelled_request_leaves_nothing_and_the_others_go_on(steps):
    model = sampled(decoder="compiled", limits=SchedulerLimits(max_batch_tokens=16))
    prompts = behind(tokens_of(50), 5)
    requests = [model.start(scoring(prompt)) for prompt in prompts]
    for _ in range(steps):
        model.scheduler.step()
    cancelled = [request for request in (requests[0], requests[3]) if request.future.cancel()]
    kept = [request for request in requests if request not in cancelled]
    alone = sampled(decoder="compiled")
    for request, result in zip(kept, model.run(*kept), strict=True):
        alone.scheduler.forget(0)
        assert_same(alone.sample(request.spec)[0], result, "compiled")
    assert not model.scheduler.has_work
    assert model.cache.num_bytes == model.cache.prefixes.num_bytes
    model.scheduler.forget(0)
    assert model.cache.num_bytes == 0


def test_when_all_are_cancelled_nothing_is_stored():
    model = sampled(limits=SchedulerLimits(max_batch_tokens=16))
    requests = [model.start(scoring(prompt)) for prompt in behind(tokens_of(50), 5)]
    model.scheduler.step()
    for request in requests:
        request.future.cancel()
    model.scheduler.step()
    assert not model.scheduler.has_work
    assert model.cache.num_bytes == 0


def test_a_request_that_fails_stores_nothing():
    model = sampled()
    diverged = random_adapter(model.base, 1)
    diverged.adapter.parameters.fill_(float("nan"))
    requests = [model.start(scoring(p), diverged) for p in behind(tokens_of(50), 3)]
    for _ in range(9):
        model.scheduler.step()
    assert not model.scheduler.has_work
    assert all("not finite" in str(request.future.exception(0)) for request in requests)
    assert model.cache.num_bytes == 0


def test_clients_share_prefixes_of_the_same_weights():
    model = sampled(decoder="compiled")
    prompts = behind(tokens_of(64), 6)
    requests = [model.start(scoring(p), client=str(n % 3)) for n, p in enumerate(prompts)]
    model.run(*requests)
    assert model.scheduler.prompt_tokens == 69 + 5 * 5


def test_last_n_hides_what_another_request_asked_about():
    model = sampled(decoder="compiled")
    prompt = tokens_of(40)
    model.sample(scoring(prompt, topk_prompt_logprobs=2))
    spec = scoring(prompt, topk_prompt_logprobs=2, prompt_logprobs_last_n=3)
    result = model.sample(spec)[0]
    assert np.isnan(result.prompt_logprobs[:37]).all()
    assert result.topk_prompt_logprobs.logprobs[:37].tolist() == [[-99999.0, 0.0]] * 37
    plain = model.sample(replace(spec, topk_prompt_logprobs=0))[0]
    assert plain.topk_prompt_logprobs is None


def test_an_index_finds_those_that_share_the_most():
    index = PrefixIndex[str]()
    first = tokens_of(40)
    second = np.concatenate([first[:24], tokens_of(16, seed=1)])
    for name, tokens in (("first", first), ("second", second)):
        index.add(name, hash_beginnings(0, tokens))
    hashes = hash_beginnings(0, first[:30])
    assert index.find(hashes) == ["second", "first"]
    assert index.num_shared(hashes, with_items=2) == 24
    assert index.find(hash_beginnings(0, first)) == ["first"]
    assert index.find(hash_beginnings(1, first)) == []
    index.discard("first", hash_beginnings(0, first))
    assert index.find(hash_beginnings(0, first)) == ["second"]
    assert num_shared(first, second) >= 24
