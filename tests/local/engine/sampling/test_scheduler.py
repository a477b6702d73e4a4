"""The scheduler against transformers and itself: batches, chunks, sharing and little memory."""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import (
    DECODERS,
    ON_TORCH,
    Sampled,
    random_adapter,
    sampled,
)
from tests.tiny_models import TINY_ARCHITECTURES
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.sequence import SequenceStatus
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import (
    LossSpec,
    SampledSequence,
    SampleSpec,
    SparseRows,
    TrainDatum,
)
from tinker_cookbook.local.errors import UserError

LOGPROB_TOLERANCE = 3e-5
"""float32 sums in different orders; logits of the tiny models reach 20."""


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(3, 320, size=length).astype(np.int32)


def training_logprobs(
    model: Sampled, adapter: StackedLora | None, prompt: np.ndarray, sequence: np.ndarray
) -> np.ndarray:
    """Return the trainer's logprobs of every token after the first."""
    spec = random_adapter(model.base, 0).adapter.spec
    run = TrainingRun(model.base, spec)
    if adapter is None:
        run.adapter.parameters.zero_()
    else:
        run.adapter = adapter.adapter
    tokens = np.concatenate([prompt, sequence])
    inputs = {
        "target_tokens": tokens[1:].astype(np.int64),
        "weights": np.ones(len(tokens) - 1, np.float32),
    }
    datum = TrainDatum(tokens[:-1], inputs)
    return run.forward_backward([datum], LossSpec("cross_entropy"), backward=False).logprobs[0]


def same(first: SampledSequence, second: SampledSequence) -> bool:
    return np.array_equal(first.tokens, second.tokens) and np.array_equal(
        first.logprobs, second.logprobs
    )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_greedy_equals_transformers_generate(architecture, decoder):
    from transformers import AutoModelForCausalLM

    model = sampled(architecture, decoder, limits=SchedulerLimits(max_batch_tokens=24))
    reference = AutoModelForCausalLM.from_pretrained(model.info.folder, dtype=torch.float32)
    specs = [
        SampleSpec(prompt_of(length), max_tokens=30, temperature=0.0, stop=[])
        for length in (1, 9, 40, 23)
    ]
    for spec, result in zip(specs, model.sample(*specs), strict=True):
        ids = torch.from_numpy(spec.prompt.astype(np.int64))[None]
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            min_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
        )[0, len(spec.prompt) :]
        assert result.sequences[0].tokens.tolist() == expected.tolist()
        assert result.sequences[0].stop_reason == "length"


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_sampler_and_trainer_agree_on_logprobs_on_every_path(architecture, decoder):
    """Batches of several adapters, chunked prompts, shared prompts, prefix hits, prompt scoring."""
    model = sampled(architecture, decoder, limits=SchedulerLimits(max_batch_tokens=20))
    adapters = [
        None,
        random_adapter(model.base, 1),
        random_adapter(model.base, 2, rank=9, train_mlp=False),
        random_adapter(model.base, 3, rank=2, train_attn=False, train_unembed=False),
    ]
    requests = [
        model.start(
            SampleSpec(prompt_of(length), 2, 25, seed=length, stop=[], prompt_logprobs=scored),
            adapter,
        )
        for length, scored in ((5, True), (33, True), (33, False), (64, False))
        for adapter in adapters
    ]
    for request, result in zip(requests, model.run(*requests), strict=True):
        for sequence in result.sequences:
            expected = training_logprobs(model, request.adapter, request.prompt, sequence.tokens)
            start = len(request.prompt) - 1
            assert np.abs(expected[start:] - sequence.logprobs).max() < LOGPROB_TOLERANCE
            if result.prompt_logprobs is not None:
                assert np.isnan(result.prompt_logprobs[0])
                difference = expected[:start] - result.prompt_logprobs[1:]
                assert np.abs(difference).max() < LOGPROB_TOLERANCE


def test_bfloat16_on_torch_agrees_with_the_trainer_within_its_rounding():
    """They round at different places: 8 bits of mantissa on logits up to 20 allow about 0.1."""
    model = sampled("qwen3", "torch", dtype=torch.bfloat16)
    adapter = random_adapter(model.base, 1)
    prompt = prompt_of(30)
    spec = SampleSpec(prompt, 4, 60, seed=1, stop=[], prompt_logprobs=True)
    result = model.sample(spec, adapter=adapter)[0]
    differences = []
    for sequence in result.sequences:
        expected = training_logprobs(model, adapter, prompt, sequence.tokens)
        differences += (expected[29:] - sequence.logprobs).tolist()
    assert np.abs(differences).max() < 0.5
    assert np.abs(differences).mean() < 0.05
    assert abs(np.mean(differences)) < 0.01  # no bias


@pytest.mark.parametrize("decoder", DECODERS)
def test_results_do_not_depend_on_what_else_is_served(decoder):
    """Compiled kernels give the same bits; torch's products may differ in the last bits."""
    adapter_seed, spec = 5, SampleSpec(prompt_of(21), 3, 40, seed=11, stop=[])
    alone_model = sampled("llama", decoder)
    alone = alone_model.sample(spec, adapter=random_adapter(alone_model.base, adapter_seed))[0]

    busy = sampled("llama", decoder, limits=SchedulerLimits(max_batch_tokens=16))
    others = [busy.start(SampleSpec(prompt_of(n, 1), 2, 60, stop=[])) for n in (3, 30, 50)]
    for _ in range(4):
        busy.scheduler.step()
    adapter = random_adapter(busy.base, adapter_seed)
    watched = busy.start(spec, adapter)
    others.append(busy.start(SampleSpec(prompt_of(40, 2), 4, 10), adapter))
    together = busy.run(watched, *others)[0]

    for first, second in zip(alone.sequences, together.sequences, strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        if decoder == "compiled":
            assert same(first, second)
        assert np.abs(first.logprobs - second.logprobs).max() < LOGPROB_TOLERANCE


def with_and_without_drafts(specs: list[SampleSpec]) -> tuple[list, list, int, int]:
    """Return results without and with draft tokens, then the numbers of steps."""
    results, steps = [], []
    for exact in (False, True):
        model = sampled("llama", "compiled")
        decoder = model.scheduler._decoder
        decoder.exact = exact
        calls = []
        for name in ("forward", "next_logits"):
            compute = getattr(decoder, name)
            counted = lambda batch, calls=calls, compute=compute: (  # noqa: E731
                calls.append(1) or compute(batch)
            )
            setattr(decoder, name, counted)
        results.append(model.sample(*specs))
        steps.append(len(calls))
    return results[0], results[1], steps[0], steps[1]


@pytest.mark.parametrize(("temperature", "num_samples"), [(0.0, 1), (1.0, 2), (0.05, 1)])
def test_draft_tokens_change_only_the_number_of_steps(temperature, num_samples):
    prompt = np.array([3, 1, 4, 1, 5, 9, 2, 6] * 3, np.int32)
    spec = SampleSpec(
        prompt,
        num_samples=num_samples,
        max_tokens=90,
        temperature=temperature,
        seed=5,
        topk_sample_logprobs=3,
    )
    plain, drafted, plain_steps, drafted_steps = with_and_without_drafts([spec])
    for one, other in zip(plain[0].sequences, drafted[0].sequences, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.array_equal(one.logprobs, other.logprobs)
        assert one.stop_reason == other.stop_reason
        assert one.topk_logprobs is not None
        assert other.topk_logprobs is not None
        assert np.array_equal(one.topk_logprobs.token_ids, other.topk_logprobs.token_ids)
    if temperature == 0:  # a tiny model soon repeats itself
        assert drafted_steps < 0.6 * plain_steps
    else:
        assert drafted_steps <= plain_steps


@pytest.mark.parametrize("decoder", DECODERS)
def test_samples_of_a_request_differ_and_repeat_with_its_seed(decoder):
    model = sampled(decoder=decoder)
    spec = SampleSpec(prompt_of(10), 4, 20, temperature=5.0, seed=3, stop=[])
    other_seed = SampleSpec(prompt_of(10), 4, 20, temperature=5.0, seed=4, stop=[])
    first, second, other = model.sample(spec, spec, other_seed)
    for a, b in zip(first.sequences, second.sequences, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        # torch's products may round a row by its place in the batch; the compiled ones do not
        tolerance = LOGPROB_TOLERANCE if decoder in ON_TORCH else 0.0
        assert np.abs(a.logprobs - b.logprobs).max() <= tolerance
    texts = {tuple(s.tokens.tolist()) for r in (first, other) for s in r.sequences}
    assert len(texts) == 8
    free = SampleSpec(prompt_of(10), 1, 20, temperature=5.0, stop=[])
    unseeded = [model.sample(free)[0] for _ in range(2)]
    assert not same(unseeded[0].sequences[0], unseeded[1].sequences[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_little_memory_changes_the_order_of_work_and_no_result(decoder):
    specs = [SampleSpec(prompt_of(20 + 5 * n), 3, 200, seed=n, stop=[]) for n in range(4)]
    plenty = sampled("qwen3", decoder)
    expected = plenty.sample(*specs)
    # Room for two sequences of 256 tokens: the others wait, or are paused and computed again.
    tight = sampled("qwen3", decoder, cache_bytes=2 * 256 * plenty.cache.bytes_per_token)
    requests = [tight.start(spec) for spec in specs]
    peak = 0
    for _ in range(20000):
        if not tight.scheduler.has_work:
            break
        tight.scheduler.step()
        peak = max(peak, tight.cache.num_bytes)
    assert peak <= tight.cache.max_bytes
    for request, result in zip(requests, expected, strict=True):
        found = request.future.result(timeout=0)
        for first, second in zip(found.sequences, result.sequences, strict=True):
            assert first.tokens.tolist() == second.tokens.tolist()


def test_a_sequence_has_a_status_from_the_queue_to_its_end():
    """Room for one row of 128 tokens: the second sequence is suspended until the first ends."""
    model = sampled(
        cache_bytes=128 * sampled().cache.bytes_per_token,
        limits=SchedulerLimits(max_batch_tokens=16),
    )
    request = model.start(SampleSpec(prompt_of(30), 2, 6, stop=[]))
    dropped = model.start(SampleSpec(prompt_of(9), 1, 6, stop=[]))
    first, second = request.waiting
    seen = [(first.status, second.status)]
    while model.scheduler.has_work:
        model.scheduler.step()
        seen.append((first.status, second.status))
        dropped.future.cancel()
    status = SequenceStatus
    assert list(dict.fromkeys(seen)) == [
        (status.WAITING, status.WAITING),
        (status.PREFILLING, status.WAITING),  # 30 tokens take two batches of 16
        (status.DECODING, status.SUSPENDED),
        (status.FINISHED, status.SUSPENDED),
        (status.FINISHED, status.PREFILLING),
        (status.FINISHED, status.DECODING),
        (status.FINISHED, status.FINISHED),
    ]
    assert dropped.waiting[0].status is status.ABORTED
    assert first.row is None
    assert second.row is None


def test_the_prompt_is_computed_once_for_all_samples_and_reused_by_later_requests():
    model = sampled()
    prompt = prompt_of(50)
    first = model.sample(SampleSpec(prompt, 8, 30, seed=1, stop=[]))[0]
    assert model.scheduler.prompt_tokens == 50
    assert first.prompt_cache_hit_tokens == 0
    second = model.sample(SampleSpec(prompt, 8, 30, seed=1, stop=[]))[0]
    assert second.prompt_cache_hit_tokens == 49
    assert model.scheduler.prompt_tokens == 51
    assert second.sequences[0].tokens.tolist() == first.sequences[0].tokens.tolist()
    turn = np.concatenate([prompt, first.sequences[5].tokens, prompt_of(6)]).astype(np.int32)
    assert model.sample(SampleSpec(turn, 1, 3))[0].prompt_cache_hit_tokens == 79
    adapter = random_adapter(model.base, 1)
    other_weights = model.sample(SampleSpec(prompt, 1, 3), adapter=adapter)[0]
    assert other_weights.prompt_cache_hit_tokens == 0


def test_a_pool_of_keys_grows_once_for_all_rows_that_are_expected():
    cache = sampled(cache_bytes=64 * 2**20).cache
    rows = [cache.allocate(100, expected=16)]
    assert rows[0] is not None
    pool, kv = rows[0].pool, rows[0].pool.kv
    rows += [cache.allocate(100) for _ in range(15)]
    assert pool.kv is kv
    assert all(row is not None and row.pool is pool for row in rows)
    fitting = cache.max_bytes // pool.bytes_per_row
    other = sampled(cache_bytes=2 * pool.bytes_per_row).cache
    assert fitting > 16
    assert [other.allocate(100, expected=16) is None for _ in range(3)] == [False, False, True]


def test_requests_that_come_together_share_their_prompt():
    model = sampled()
    prompt = prompt_of(60)
    results = model.sample(*[SampleSpec(prompt, 1, 10, seed=n, stop=[]) for n in range(8)])
    assert model.scheduler.prompt_tokens == 60 + 7
    assert sum(result.prompt_cache_hit_tokens for result in results) == 7 * 59


# --- what may be asked about the prompt ----------------------------------------------------------


@pytest.fixture(scope="module")
def scoring() -> tuple[Sampled, np.ndarray, np.ndarray]:
    """Return a model, a prompt, and the logprobs [P, V] of transformers."""
    from transformers import AutoModelForCausalLM

    model = sampled("qwen2", limits=SchedulerLimits(max_batch_tokens=16))
    prompt = prompt_of(70)
    reference = AutoModelForCausalLM.from_pretrained(model.info.folder, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0]
    return model, prompt, torch.log_softmax(logits.float(), -1).numpy()


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_prompt_logprobs(scoring, max_tokens):
    model, prompt, expected = scoring
    spec = SampleSpec(prompt, 1, max_tokens, prompt_logprobs=True, topk_prompt_logprobs=4)
    result = model.sample(spec)[0]
    assert np.isnan(result.prompt_logprobs[0])
    own = expected[np.arange(69), prompt[1:]]
    assert np.abs(result.prompt_logprobs[1:] - own).max() < LOGPROB_TOLERANCE
    topk = result.topk_prompt_logprobs
    assert (topk.token_ids[0, 0], topk.logprobs[0, 0]) == (0, -99999.0)
    best = np.sort(expected[:69], axis=1)[:, ::-1][:, :4]
    assert np.abs(topk.logprobs[1:] - best).max() < LOGPROB_TOLERANCE
    assert topk.token_ids[1:, 0].tolist() == expected[:69].argmax(1).tolist()


def test_prompt_logprobs_of_the_last_tokens_leave_the_rest_to_the_prefix_cache(scoring):
    _, prompt, expected = scoring
    model = sampled("qwen2", limits=SchedulerLimits(max_batch_tokens=16))
    model.sample(SampleSpec(prompt, 1, 4))
    spec = SampleSpec(
        prompt, 1, 1, prompt_logprobs=True, prompt_logprobs_last_n=5, topk_prompt_logprobs=2
    )
    result = model.sample(spec)[0]
    assert np.isnan(result.prompt_logprobs[:65]).all()
    own = expected[np.arange(64, 69), prompt[65:]]
    assert np.abs(result.prompt_logprobs[65:] - own).max() < LOGPROB_TOLERANCE
    assert (result.topk_prompt_logprobs.logprobs[:65, 0] == -99999.0).all()
    assert result.prompt_cache_hit_tokens == 64


def test_target_prompt_logprobs_dense_and_sparse(scoring):
    model, prompt, expected = scoring
    targets = np.full((69, 3), -1, np.int64)
    targets[4], targets[68, 1] = [0, 7, 319], 12
    wanted = np.zeros((69, 3), np.float32)
    wanted[4], wanted[68, 1] = expected[4, [0, 7, 319]], expected[68, 12]
    dense = model.sample(SampleSpec(prompt, 1, 1, target_prompt_logprobs=targets))[0]
    assert np.abs(dense.target_prompt_logprobs - wanted).max() < LOGPROB_TOLERANCE

    crow = np.concatenate([np.zeros(5, int), np.full(64, 3), [4]])
    rows = SparseRows(np.array([0, 7, 319, 12]), crow, np.array([0, 1, 2, 1]), (69, 3))
    sparse = model.sample(SampleSpec(prompt, 1, 1, target_prompt_logprobs=rows))[0]
    values = sparse.target_prompt_logprobs.values
    assert np.abs(values - wanted[[4, 4, 4, 68], [0, 1, 2, 1]]).max() < LOGPROB_TOLERANCE
    assert dense.prompt_logprobs is None


def test_alternatives_follow_the_model_at_the_requests_temperature(scoring):
    model, prompt, expected = scoring
    spec = SampleSpec(prompt[:4], 1, 1, temperature=0.5, seed=1, prompt_alt_tokens_k=1000)
    alternatives = model.sample(spec)[0].prompt_alt_tokens
    assert alternatives.token_ids.shape == (3, 1000)
    for row in range(3):
        drawn = alternatives.token_ids[row]
        assert np.abs(alternatives.logprobs[row] - expected[row, drawn]).max() < LOGPROB_TOLERANCE
        sharpened = np.exp(expected[row].astype(float) * 2)
        sharpened /= sharpened.sum()
        shares = np.bincount(drawn, minlength=320) / 1000
        assert np.abs(shares - sharpened).max() < 0.07  # over four standard deviations
    greedy = model.sample(SampleSpec(prompt[:4], 1, 1, temperature=0.0, prompt_alt_tokens_k=2))[0]
    assert greedy.prompt_alt_tokens.token_ids[:, 1].tolist() == expected[:3].argmax(1).tolist()


def test_scoring_alone_generates_nothing_and_keeps_only_prefixes():
    model = sampled()
    specs = [SampleSpec(prompt_of(n), 1, 1, prompt_logprobs=True) for n in (30, 2, 80, 1)]
    model.sample(*specs)
    assert model.cache.num_bytes == model.cache.prefixes.num_bytes
    assert model.scheduler.prompt_tokens == 113


# --- the end of a completion ---------------------------------------------------------------------


def test_stop_tokens_are_the_last_token_and_max_tokens_ends_the_rest():
    model = sampled()
    free = model.sample(SampleSpec(prompt_of(12), 1, 40, seed=2, stop=[]))[0].sequences[0]
    stop = int(free.tokens[17])
    first = free.tokens.tolist().index(stop)
    ended = model.sample(SampleSpec(prompt_of(12), 1, 40, seed=2, stop=[stop]))[0].sequences[0]
    assert ended.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert ended.stop_reason == "stop"
    assert free.stop_reason == "length"


def test_topk_of_sampled_tokens_contains_the_greedy_choice():
    model = sampled()
    spec = SampleSpec(prompt_of(12), 2, 9, temperature=0.0, stop=[], topk_sample_logprobs=3)
    for sequence in model.sample(spec)[0].sequences:
        assert sequence.topk_logprobs.token_ids.shape == (9, 3)
        assert sequence.topk_logprobs.token_ids[:, 0].tolist() == sequence.tokens.tolist()
        assert np.array_equal(sequence.topk_logprobs.logprobs[:, 0], sequence.logprobs)


def test_without_max_tokens_the_context_is_the_limit():
    model = sampled()
    result = model.sample(SampleSpec(prompt_of(1000), 1, None, stop=[]))[0]
    assert len(result.sequences[0].tokens) == model.info.max_context_length - 1000


def test_tokens_are_streamed_in_order_with_their_logprobs():
    model = sampled()
    seen: list[tuple[int, int, float]] = []
    spec = SampleSpec(prompt_of(12), 2, 15, stop=[])
    request = model.start(spec, on_token=lambda *event: seen.append(event))
    result = model.run(request)[0]
    for index, sequence in enumerate(result.sequences):
        own = [(token, logprob) for number, token, logprob in seen if number == index]
        assert [token for token, _ in own] == sequence.tokens.tolist()
        assert [logprob for _, logprob in own] == pytest.approx(sequence.logprobs.tolist())


# --- requests that end early ---------------------------------------------------------------------


def test_cancelling_stops_a_request_and_frees_its_memory():
    model = sampled()
    kept_spec = SampleSpec(prompt_of(12), 1, 30, seed=1, stop=[])
    expected = model.sample(kept_spec)[0].sequences[0].tokens.tolist()
    kept = model.start(kept_spec)
    dropped = model.start(SampleSpec(prompt_of(30), 3, 500, stop=[]))
    for _ in range(5):
        model.scheduler.step()
    assert dropped.future.cancel()
    model.scheduler.step()
    assert model.scheduler.num_running == 1
    assert model.run(kept)[0].sequences[0].tokens.tolist() == expected


def test_clients_get_their_answers_before_rows_are_put_away():
    model = sampled()
    seen = []
    specs = [SampleSpec(prompt_of(20, seed), 2, 6, stop=[]) for seed in range(3)]
    for request in [model.start(spec) for spec in specs]:
        request.future.add_done_callback(
            lambda _: seen.append((model.scheduler.num_running, len(model.cache.prefixes)))
        )
    model.run()
    assert seen == [(0, 0)] * 3
    assert len(model.cache.prefixes) == 6


def test_a_failing_callback_or_diverged_weights_fail_their_own_request_only():
    model = sampled()
    diverged = random_adapter(model.base, 1)
    diverged.adapter.parameters.fill_(float("nan"))

    def explode(*event: object) -> None:
        raise OSError("listener is gone")

    spec = SampleSpec(prompt_of(12), 2, 10, seed=1, stop=[])
    fine = model.start(spec)
    bad_listener = model.start(spec, on_token=explode)
    bad_weights = model.start(spec, diverged)
    for _ in range(30):
        model.scheduler.step()
    assert not model.scheduler.has_work
    assert len(fine.future.result(0).sequences) == 2
    assert isinstance(bad_listener.future.exception(0), OSError)
    assert "not finite" in str(bad_weights.future.exception(0))


def test_a_request_that_can_never_fit_is_refused_with_numbers():
    model = sampled(cache_bytes=100_000)
    with pytest.raises(UserError, match=r"max_tokens=900 need \d+ MiB.*enough for \d+ tokens"):
        model.start(SampleSpec(prompt_of(100), 1, 900))
