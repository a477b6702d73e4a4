"""Logits to tokens: the draw follows the distribution, its restrictions and its random numbers."""

# pyright: reportArgumentType=false

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinker_cookbook.local.engine.native import softmax
from tinker_cookbook.local.engine.sampling.logits import (
    SamplingParams,
    draw_tokens,
    logsumexp,
    topk_logprobs,
)
from tinker_cookbook.local.engine.sampling.random_numbers import draw_uniforms


def params(num_rows: int, temperature=1.0, top_k=-1, top_p=1.0) -> SamplingParams:
    return SamplingParams(
        np.full(num_rows, temperature, float), np.full(num_rows, top_k), np.full(num_rows, top_p)
    )


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def draw_many(logits: np.ndarray, num_draws: int, **settings) -> np.ndarray:
    rows = torch.from_numpy(np.tile(logits.astype(np.float32), (num_draws, 1)))
    uniforms = (np.arange(num_draws) + 0.5) / num_draws
    return draw_tokens(rows, params(num_draws, **settings), uniforms).tokens_N


@pytest.mark.parametrize("vocab", [5, 128, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_evenly_spread_uniforms_give_every_token_its_share(vocab, temperature):
    logits = np.random.default_rng(vocab).normal(size=vocab) * 2
    tokens = draw_many(logits, 4000, temperature=temperature)
    shares = np.bincount(tokens, minlength=vocab) / 4000
    # A stretch of the unit interval holds its length times 4000 of the points, give or take one.
    assert np.abs(shares - probabilities(logits, temperature)).max() < 2 / 4000


def test_greedy_is_argmax_and_top_k_1_and_tiny_top_p_equal_it():
    logits = np.random.default_rng(0).normal(size=(6, 300)).astype(np.float32)
    rows, uniforms = torch.from_numpy(logits), np.linspace(0, 0.999, 6)
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}):
        draws = draw_tokens(rows, params(6, **settings), uniforms)
        assert draws.tokens_N.tolist() == logits.argmax(-1).tolist(), settings


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-40, 1e-310, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float):
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)) * 8
    params = SamplingParams(np.full(5, temperature), np.full(5, -1), np.ones(5))
    drawn = draw_tokens(logits, params, np.linspace(0, 0.999, 5))
    np.testing.assert_array_equal(drawn.tokens_N, logits.argmax(-1).numpy())


def test_top_k_keeps_the_k_most_likely_and_renormalises():
    logits = np.random.default_rng(1).normal(size=300)
    best = np.argsort(-logits)[:4]
    shares = np.bincount(draw_many(logits, 4000, top_k=4), minlength=300) / 4000
    expected = probabilities(logits)[best] / probabilities(logits)[best].sum()
    assert set(np.flatnonzero(shares)) == set(best)
    assert np.abs(shares[best] - expected).max() < 2 / 4000


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05]))
    assert set(draw_many(logits, 1000, top_p=0.6)) == {0, 1}
    assert set(draw_many(logits, 1000, top_p=0.75)) == {0, 1, 2}
    # top_k first: of the renormalised 0.5 / 0.7 the first token alone reaches 0.7
    assert set(draw_many(logits, 1000, top_k=2, top_p=0.7)) == {0}


def test_a_nucleus_wider_than_the_first_candidates_is_found():
    logits = np.zeros(2000)
    tokens = draw_many(logits, 2000, top_p=0.9)
    assert len(set(tokens.tolist())) in (1800, 1801)


def test_logprobs_are_the_models_own():
    logits = np.random.default_rng(2).normal(size=(3, 300)).astype(np.float32) * 3
    settings = SamplingParams(
        np.array([0.3, 1.0, 2.0]), np.array([-1, 5, -1]), np.array([1, 1, 0.5])
    )
    draws = draw_tokens(torch.from_numpy(logits), settings, np.array([0.2, 0.5, 0.9]))
    expected = np.log([probabilities(logits[n])[token] for n, token in enumerate(draws.tokens_N)])
    assert draws.logprobs_N == pytest.approx(expected, abs=2e-6)


def test_a_row_does_not_depend_on_the_others():
    logits = torch.from_numpy(np.random.default_rng(3).normal(size=(16, 1000)).astype(np.float32))
    mixed = SamplingParams(
        np.tile([0.0, 1.0, 0.7, 1.0], 4), np.tile([-1, -1, 20, -1], 4), np.tile([1, 1, 1, 0.8], 4)
    )
    uniforms = np.random.default_rng(4).random(16)
    together = draw_tokens(logits, mixed, uniforms)
    for row in range(16):
        one = SamplingParams(
            mixed.temperature_N[row : row + 1],
            mixed.top_k_N[row : row + 1],
            mixed.top_p_N[row : row + 1],
        )
        alone = draw_tokens(logits[row : row + 1], one, uniforms[row : row + 1])
        assert alone.tokens_N[0] == together.tokens_N[row]
        assert alone.logprobs_N[0] == together.logprobs_N[row]


def test_rows_that_are_not_finite_are_marked():
    logits = torch.zeros(2, 300)
    logits[1, 7] = float("nan")
    draws = draw_tokens(logits, params(2), np.array([0.5, 0.5]))
    assert np.isfinite(draws.logprobs_N).tolist() == [True, False]


@pytest.mark.parametrize("vocab", [5, 128, 1000, 4096])
@pytest.mark.parametrize("tempered", [False, True])
def test_compiled_exponentials_equal_float64(vocab: int, tempered: bool):
    wide = torch.randn(7, vocab + 3, generator=torch.Generator().manual_seed(vocab)) * 20
    wide[2, : vocab // 2] = float("-inf")
    logits = wide[:, :vocab]
    inverse = torch.linspace(0.3, 3.0, 7) if tempered else None
    found = softmax.exp_blocks(logits, inverse, keep_weights=True)
    if found is None:
        pytest.skip("no C compiler here")
    weights, sums, lse = found
    assert weights is not None
    scaled = logits.double() * (1 if inverse is None else inverse.double()[:, None])
    expected = (scaled - scaled.amax(1, keepdim=True)).exp()
    flat = weights.flatten(1).double()
    torch.testing.assert_close(flat[:, :vocab], expected, rtol=2e-5, atol=1e-12)
    assert not flat[:, vocab:].any()
    torch.testing.assert_close(sums, weights.double().sum(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse.double(), scaled.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(logsumexp(logits[3:4]), logsumexp(logits)[3:4])


@pytest.mark.parametrize("vocab", [5, 128, 1000, 4099])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e-38])
def test_draws_in_one_compiled_call_have_the_bits_of_the_other_path(vocab: int, temperature: float):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab + 3, generator=generator)[:, :vocab] * 4
    logits[3, : vocab // 2] = float("-inf")
    uniforms = np.linspace(0, np.nextafter(1, 0), 40)
    settings = params(40, temperature)
    compiled = draw_tokens(logits, settings, uniforms)
    settings.temperature_N[7] = 0  # a greedy row: the exponentials of all rows are kept
    other = draw_tokens(logits, settings, uniforms)
    rows = np.arange(40) != 7
    np.testing.assert_array_equal(compiled.tokens_N[rows], other.tokens_N[rows])
    np.testing.assert_array_equal(compiled.logprobs_N[rows], other.logprobs_N[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_logsumexp_of_a_row_that_is_not_finite_is_not_a_number(value: float):
    logits = torch.zeros(2, 300)
    logits[1, 299] = value
    assert torch.isfinite(logsumexp(logits)).tolist() == [True, False]


def test_topk_logprobs_pads_a_small_vocabulary():
    logits = torch.log(torch.tensor([[0.2, 0.7, 0.1]]))
    ids, logprobs = topk_logprobs(logits, logsumexp(logits), 5)
    assert ids.tolist() == [[1, 0, 2, 0, 0]]
    assert logprobs[0, :3] == pytest.approx(np.log([0.7, 0.2, 0.1]), abs=1e-6)
    assert logprobs[0, 3:].tolist() == [-99999.0, -99999.0]


def test_uniforms_depend_on_each_part_of_their_address_alone():
    seeds = np.repeat(np.arange(20, dtype=np.uint64), 400)
    streams = np.tile(np.repeat(np.arange(20, dtype=np.uint64), 20), 20)
    positions = np.tile(np.arange(20, dtype=np.uint64), 400)
    values = draw_uniforms(seeds, streams, positions)
    assert len(set(values.tolist())) == 8000
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(800, abs=120)
    assert draw_uniforms(seeds[77:78], streams[77:78], positions[77:78])[0] == values[77]
