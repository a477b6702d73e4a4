"""Sampling and scoring (SMP)."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportOptionalSubscript=false

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tinker

from tests.e2e.sdk import (
    batch,
    datum,
    fails_promptly,
    forward,
    logprobs_of,
    params,
    prompt_logprobs,
    sample,
    tensor,
    text,
    tokens,
    train_step,
)

PROMPT = tokens(10)
TOLERANCE = 1e-3  # sampler and trainer sum in different orders
EOS = 2  # <|im_end|> of the tiny models


def ids(response: tinker.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


def test_smp_01_shapes(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, 3, max_tokens=6, stop=[])
    assert len(response.sequences) == 3
    for sequence in response.sequences:
        assert len(sequence.tokens) == len(sequence.logprobs) == 6
        assert sequence.stop_reason == "length"
        assert all(logprob <= 0 for logprob in sequence.logprobs)
    assert response.prompt_logprobs is None


def test_smp_02_sequence_ids_are_unique(base_sampler) -> None:
    responses = [sample(base_sampler, PROMPT, 3) for _ in range(2)]
    found = [sequence.sequence_id for response in responses for sequence in response.sequences]
    assert all(found)
    assert len(set(found)) == 6


def test_smp_03_and_04_greedy(base_sampler) -> None:
    first = sample(base_sampler, PROMPT, temperature=0.0, max_tokens=6, stop=[])
    assert ids(first) == ids(sample(base_sampler, PROMPT, temperature=0.0, max_tokens=6, stop=[]))
    grown = list(PROMPT)
    for token in first.sequences[0].tokens:
        scored = sample(base_sampler, [*grown, 5], max_tokens=1, topk_prompt_logprobs=1)
        assert scored.topk_prompt_logprobs[-1][0][0] == token
        grown.append(token)


def test_smp_05_seeds_repeat(base_sampler) -> None:
    one = sample(base_sampler, PROMPT, seed=5, max_tokens=12, stop=[])
    other = sample(base_sampler, PROMPT, seed=5, max_tokens=12, stop=[])
    assert ids(one) == ids(other)
    assert ids(one) != ids(sample(base_sampler, PROMPT, seed=6, max_tokens=12, stop=[]))


def test_smp_06_seeded_samples_of_one_request_differ_and_repeat(base_sampler) -> None:
    one = sample(base_sampler, PROMPT, 4, seed=5, max_tokens=12, stop=[])
    assert len({tuple(item) for item in ids(one)}) == 4
    assert ids(one) == ids(sample(base_sampler, PROMPT, 4, seed=5, max_tokens=12, stop=[]))


def test_smp_07_unseeded_differ(base_sampler) -> None:
    found = ids(sample(base_sampler, PROMPT, 4, max_tokens=12, stop=[]))
    found += ids(sample(base_sampler, PROMPT, 4, max_tokens=12, stop=[]))
    assert len({tuple(item) for item in found}) == 8


def test_smp_08_no_stops(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, 8, max_tokens=40, stop=[], temperature=5.0)
    assert all(len(item) == 40 for item in ids(response))


def test_smp_09_stop_ids(base_sampler) -> None:
    free = ids(sample(base_sampler, PROMPT, seed=1, max_tokens=20, stop=[]))[0]
    stop = free[7]
    response = sample(base_sampler, PROMPT, seed=1, max_tokens=20, stop=[stop])
    (sequence,) = response.sequences
    assert list(sequence.tokens) == free[: free.index(stop) + 1]
    assert sequence.stop_reason == "stop"


@pytest.mark.parametrize("as_list", [False, True])
def test_smp_10_stop_strings(base_sampler, as_list: bool) -> None:
    tokenizer = base_sampler.get_tokenizer()
    free = ids(sample(base_sampler, PROMPT, seed=3, max_tokens=20, stop=[]))[0]
    words = [tokenizer.decode([token]) for token in free]
    position = next(i for i in range(3, 20) if words[i].isascii() and words[i].strip())
    stop = words[position]
    expected = next(i for i in range(20) if stop in tokenizer.decode(free[: i + 1]))
    response = sample(
        base_sampler, PROMPT, seed=3, max_tokens=20, stop=[stop, "☃☃"] if as_list else stop
    )
    (sequence,) = response.sequences
    assert list(sequence.tokens) == free[: expected + 1]
    assert sequence.stop_reason == "stop"


def test_smp_11_sampled_logprobs_are_the_models(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, max_tokens=10, stop=[], temperature=0.7, top_k=20)
    (sequence,) = response.sequences
    scored = prompt_logprobs(base_sampler, [*PROMPT, *sequence.tokens])
    np.testing.assert_allclose(sequence.logprobs, scored[-10:], atol=TOLERANCE)


def test_smp_12_prompt_logprobs(base_sampler, new_run) -> None:
    response = sample(base_sampler, PROMPT, max_tokens=1, include_prompt_logprobs=True)
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    (trained,) = forward(new_run(), [datum(PROMPT)])
    np.testing.assert_allclose(response.prompt_logprobs[1:], trained, atol=TOLERANCE)


def test_smp_13_topk_prompt_logprobs(base_sampler) -> None:
    response = sample(
        base_sampler, PROMPT, max_tokens=1, topk_prompt_logprobs=5, include_prompt_logprobs=True
    )
    rows = response.topk_prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    assert len(rows) == len(PROMPT)
    for row in rows[1:]:
        values = [logprob for _, logprob in row]
        assert len({token for token, _ in row}) == 5
        assert values == sorted(values, reverse=True)


def test_smp_14_topk_sample_logprobs(base_sampler) -> None:
    (sequence,) = sample(
        base_sampler, PROMPT, max_tokens=5, stop=[], temperature=0.0, topk_sample_logprobs=3
    ).sequences
    rows = sequence.topk_logprobs
    assert rows is not None
    assert len(rows) == 5
    for row, token, logprob in zip(rows, sequence.tokens, sequence.logprobs, strict=True):
        assert row[0][0] == token
        assert row[0][1] == pytest.approx(logprob, abs=1e-5)


def test_smp_15_and_16_target_prompt_logprobs(base_sampler) -> None:
    prompt = PROMPT[:5]
    wanted = np.array([[prompt[i + 1], 7] for i in range(4)])
    wanted[1, 0] = -1
    response = sample(base_sampler, prompt, target_prompt_logprobs=tensor(wanted, np.int64))
    dense = response.target_prompt_logprobs
    assert dense is not None
    values = dense.to_numpy()
    scored = prompt_logprobs(base_sampler, prompt)
    for row in (0, 2, 3):
        assert values[row, 0] == pytest.approx(scored[row], abs=TOLERANCE)
    assert values[1, 0] == 0.0
    sparse = tinker.TensorData(
        data=[prompt[1], 7],
        dtype="int64",
        shape=[4, 2],
        sparse_crow_indices=[0, 1, 1, 1, 2],
        sparse_col_indices=[0, 1],
    )
    found = sample(base_sampler, prompt, target_prompt_logprobs=sparse).target_prompt_logprobs
    assert found is not None
    assert found.sparse_crow_indices == [0, 1, 1, 1, 2]
    np.testing.assert_allclose(found.data, [values[0, 0], values[3, 1]], atol=1e-4)


def test_smp_17_prompt_alternatives(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, prompt_alt_tokens_k=4)
    alternatives = response.prompt_alt_tokens
    assert alternatives is not None
    chosen = alternatives.tokens.to_numpy()
    logprobs = alternatives.logprobs.to_numpy()
    assert chosen.shape == logprobs.shape == (len(PROMPT) - 1, 4)
    assert (logprobs <= 0).all()
    scored = sample(base_sampler, PROMPT, target_prompt_logprobs=tensor(chosen, np.int64))
    assert scored.target_prompt_logprobs is not None
    np.testing.assert_allclose(scored.target_prompt_logprobs.to_numpy(), logprobs, atol=TOLERANCE)


def test_smp_18_last_n_prompt_logprobs(base_sampler) -> None:
    values = base_sampler.compute_logprobs(text(PROMPT), prompt_logprobs_last_n=3).result()
    assert values[:-3] == [None] * (len(PROMPT) - 3)
    np.testing.assert_allclose(values[-3:], prompt_logprobs(base_sampler, PROMPT)[-3:], atol=1e-4)


def test_smp_18b_scorings_behind_one_prefix(new_run) -> None:
    """They share its computation with each other and with a later request, and nothing else."""
    run = new_run()
    train_step(run, batch())
    together, apart = (run.save_weights_and_get_sampling_client().result() for _ in range(2))
    prefix = tokens(80, seed=3)
    prompts = [prefix + tokens(4 + number % 3, seed=10 + number) for number in range(24)]
    whole = [together.compute_logprobs(text(prompt)) for prompt in prompts]
    ends = [together.compute_logprobs(text(prompt), prompt_logprobs_last_n=3) for prompt in prompts]
    for future, end, prompt, trained in zip(
        whole, ends, prompts, forward(run, [datum(prompt) for prompt in prompts]), strict=True
    ):
        values = future.result()
        np.testing.assert_allclose(values[1:], trained, atol=TOLERANCE)
        assert end.result()[:-3] == [None] * (len(prompt) - 3)
        np.testing.assert_allclose(end.result()[-3:], values[-3:], atol=1e-4)
    alone = apart.compute_logprobs(text(prompts[5])).result()
    np.testing.assert_allclose(alone[1:], whole[5].result()[1:], atol=1e-4)
    options = {"max_tokens": 1, "include_prompt_logprobs": True}
    assert sample(apart, prompts[5], **options).prompt_cache_hit_tokens >= 80


def test_smp_19_narrow_sampling_is_greedy(base_sampler) -> None:
    greedy = ids(sample(base_sampler, PROMPT, temperature=0.0, stop=[]))
    assert ids(sample(base_sampler, PROMPT, top_k=1, stop=[])) == greedy
    assert ids(sample(base_sampler, PROMPT, top_p=1e-6, stop=[])) == greedy


def next_token_probabilities(sampler: tinker.SamplingClient, k: int = 320) -> dict[int, float]:
    response = sample(sampler, [*PROMPT, 5], max_tokens=1, topk_prompt_logprobs=k)
    assert response.topk_prompt_logprobs is not None
    return {token: math.exp(logprob) for token, logprob in response.topk_prompt_logprobs[-1]}


def first_tokens(sampler: tinker.SamplingClient, count: int, **options) -> np.ndarray:
    response = sample(sampler, PROMPT, count, max_tokens=1, seed=11, stop=[], **options)
    return np.bincount([tokens[0] for tokens in ids(response)], minlength=400) / count


def test_smp_20_to_22_frequencies_follow_the_model(base_sampler) -> None:
    vocab = len(base_sampler.get_tokenizer())
    expected = np.zeros(400)
    for token, probability in next_token_probabilities(base_sampler, vocab).items():
        expected[token] = probability
    plain = first_tokens(base_sampler, 2000)
    # total variation of 2000 draws from a few likely tokens stays well below this
    assert np.abs(plain - expected).sum() / 2 < 0.15
    sharp = first_tokens(base_sampler, 500, temperature=0.3)
    assert sharp.max() > plain.max()
    top3 = set(np.argsort(expected)[-3:])
    assert set(np.flatnonzero(first_tokens(base_sampler, 300, top_k=3))) <= top3


def test_smp_23_to_26_snapshots(new_run, base_sampler, module_client) -> None:
    before = prompt_logprobs(base_sampler, PROMPT)
    run = new_run()
    train_step(run, batch())
    (trained,) = forward(run, [datum(PROMPT)])
    ephemeral = run.save_weights_and_get_sampling_client().result()
    path = run.save_weights_for_sampler("smp-25").result().path
    named = module_client.create_sampling_client(model_path=path).result()
    assert np.abs(trained - before).max() > 1e-2
    np.testing.assert_allclose(prompt_logprobs(ephemeral, PROMPT), trained, atol=TOLERANCE)
    np.testing.assert_allclose(prompt_logprobs(named, PROMPT), trained, atol=TOLERANCE)
    train_step(run, batch())
    np.testing.assert_allclose(prompt_logprobs(ephemeral, PROMPT), trained, atol=TOLERANCE)
    np.testing.assert_allclose(prompt_logprobs(named, PROMPT), trained, atol=TOLERANCE)
    np.testing.assert_allclose(prompt_logprobs(base_sampler, PROMPT), before, atol=1e-5)
    (sequence,) = sample(ephemeral, PROMPT, max_tokens=8, stop=[]).sequences
    scored = prompt_logprobs(ephemeral, [*PROMPT, *sequence.tokens])[-8:]
    np.testing.assert_allclose(sequence.logprobs, scored, atol=TOLERANCE)


def test_smp_27_and_28_many_at_once_over_mixed_adapters(new_run, base_sampler) -> None:
    runs = [new_run(seed=seed) for seed in range(2)]
    for run in runs:
        train_step(run, batch())
    samplers = [base_sampler] + [
        run.save_weights_and_get_sampling_client().result() for run in runs
    ]
    alone = [ids(sample(sampler, PROMPT, seed=2, stop=[])) for sampler in samplers]
    assert alone[0] != alone[1]
    running = [
        samplers[i % 3].sample(text(PROMPT), 1, params(8, seed=2, stop=[])) for i in range(48)
    ]
    for i, future in enumerate(running):
        assert ids(future.result()) == alone[i % 3]


def test_smp_29_pickles(base_sampler, local_service, monkeypatch) -> None:
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    copy = pickle.loads(pickle.dumps(base_sampler))
    assert ids(sample(copy, PROMPT, seed=4)) == ids(sample(base_sampler, PROMPT, seed=4))


def test_smp_30_handles_work_in_another_process(base_sampler, local_service) -> None:
    handle = base_sampler.get_sampler_handle()
    program = (
        "import sys, tinker\n"
        "client = tinker.SamplingClient.from_sampler_handle(sys.argv[1], api_key=sys.argv[2])\n"
        "prompt = tinker.ModelInput.from_ints([5, 6, 7])\n"
        "params = tinker.SamplingParams(max_tokens=4, seed=1, stop=[])\n"
        "print(list(client.sample(prompt, 1, params).result().sequences[0].tokens))\n"
    )
    command = [sys.executable, "-c", program, handle, local_service.api_key]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    expected = ids(sample(base_sampler, [5, 6, 7], max_tokens=4, seed=1, stop=[]))[0]
    assert done.stdout.strip() == str(expected)


def test_smp_31_inflight_samplers_move_with_the_run(new_run) -> None:
    run = new_run()
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    before = prompt_logprobs(first, PROMPT)
    train_step(run, batch())
    np.testing.assert_allclose(prompt_logprobs(first, PROMPT), before, atol=1e-5)
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    (trained,) = forward(run, [datum(PROMPT)])
    np.testing.assert_allclose(prompt_logprobs(second, PROMPT), trained, atol=TOLERANCE)
    np.testing.assert_allclose(prompt_logprobs(first, PROMPT), trained, atol=TOLERANCE)


def test_smp_32_metadata(base_sampler, local_service, new_run) -> None:
    assert base_sampler.get_base_model() == local_service.model
    sampler = new_run().save_weights_and_get_sampling_client().result()
    assert sampler.get_base_model() == local_service.model


def test_smp_33_training_weights_can_be_sampled(new_run, module_client) -> None:
    run = new_run()
    train_step(run, batch())
    path = run.save_state("smp-33").result().path
    sampler = module_client.create_sampling_client(model_path=path).result()
    (trained,) = forward(run, [datum(PROMPT)])
    np.testing.assert_allclose(prompt_logprobs(sampler, PROMPT), trained, atol=TOLERANCE)


def test_smp_34_sixteen_long_samples(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, 16, max_tokens=64, stop=[])
    assert [len(item) for item in ids(response)] == [64] * 16


def test_smp_35_stability_info_is_accepted(module_client, local_service) -> None:
    sampler = module_client.create_sampling_client(base_model=local_service.model).result()
    sampler._record_stability_info = True
    assert ids(sample(sampler, PROMPT))


def test_smp_36_end_of_sequence_stops(base_sampler) -> None:
    response = sample(base_sampler, PROMPT, 16, max_tokens=200, temperature=5.0, seed=0)
    stopped = [item for item in response.sequences if item.stop_reason == "stop"]
    assert stopped, "of 3,200 nearly uniform draws some are the end token"
    for sequence in stopped:
        assert sequence.tokens[-1] == EOS
        assert EOS not in sequence.tokens[:-1]


def test_a_full_context_is_refused_or_cut(base_sampler) -> None:
    prompt = tokens(1000)
    (sequence,) = sample(base_sampler, prompt, max_tokens=None, stop=[]).sequences
    assert len(sequence.tokens) == 24
    assert sequence.stop_reason == "length"
    fails_promptly(lambda: sample(base_sampler, tokens(1100)), "1100")


def test_logprobs_by_trainer_and_sampler_agree_after_training(new_run) -> None:
    run = new_run(rank=16)
    for _ in range(3):
        train_step(run, batch())
    sampler = run.save_weights_and_get_sampling_client().result()
    response = sample(sampler, PROMPT, 4, max_tokens=16, stop=[])
    data = [datum([*PROMPT, *sequence.tokens]) for sequence in response.sequences]
    result = run.forward(data, "cross_entropy").result()
    for sequence, logprobs in zip(response.sequences, logprobs_of(result), strict=True):
        np.testing.assert_allclose(sequence.logprobs, logprobs[-16:], atol=TOLERANCE)
