"""Tokens and their price: tables in several forms, sums over steps, and no network unasked."""

import json
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils import cost_estimation
from tinker_cookbook.utils.cost_estimation import CostTracker, TokenCostRates, TokenUsage

RATES = TokenCostRates(1.0, 0.1, 3.0, 4.0)
ENTRY = {
    "model_name": "org/model",
    "prefill_usd_per_million": 1.0,
    "cached_prefill_usd_per_million": 0.1,
    "sample_usd_per_million": 3.0,
    "train_usd_per_million": 4.0,
}


def test_each_kind_of_token_has_its_price():
    assert RATES.estimate_usd(TokenUsage(sampled=1_000_000)) == 3.0
    usage = TokenUsage(sampled=10, prefill_cached=20, prefill_uncached=30, trained=40)
    assert RATES.estimate_usd(usage) == pytest.approx((30 + 2 + 30 + 160) / 1_000_000)
    assert usage.metrics("tokens")["tokens/prefill_cached"] == 20


@pytest.mark.parametrize(
    "entry",
    [
        ENTRY,
        {"pricing": {"prefill": "$1.0", "cached_prefill": 0.1, "sample": 3, "train": "4"}},
    ],
)
def test_prices_are_read_in_both_forms(entry: dict):
    assert cost_estimation.rates_from_pricing_entry(entry) == RATES


def test_an_entry_without_a_price_gives_none():
    assert (
        cost_estimation.rates_from_pricing_entry({**ENTRY, "train_usd_per_million": None}) is None
    )
    without = {key: value for key, value in ENTRY.items() if "cached" not in key}
    found = cost_estimation.rates_from_pricing_entry(without)
    assert found is not None
    assert found.cached_prefill_usd_per_million == 1.0


def test_a_file_of_prices(tmp_path: Path):
    path = tmp_path / "prices.json"
    for content in ([ENTRY], {"models": [ENTRY]}):
        path.write_text(json.dumps(content))
        table = cost_estimation.read_prices(path)
        assert cost_estimation.find_rates(table, "org/model:128k") == RATES
        assert cost_estimation.find_rates(table, "org/other") is None
    # The same content is read from an address, here one of a file.
    assert cost_estimation.fetch_model_pricing("org/model", url=path.as_uri()) == RATES
    assert cost_estimation.load_model_pricing(url=(tmp_path / "none").as_uri()) is None
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="no list of models"):
        cost_estimation.read_prices(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        cost_estimation.read_prices(tmp_path / "none")


def test_steps_add_up_and_a_resumed_run_continues_the_sums():
    tracker = CostTracker(RATES, cumulative=TokenUsage(trained=1_000_000))
    first = tracker.record_step(TokenUsage(trained=500_000))
    assert first["tokens/trained"] == 500_000
    assert (first["cost/step_usd"], first["cost/cumulative_usd"]) == (2.0, 6.0)
    more = tracker.extend_step(TokenUsage(sampled=1_000_000))
    assert (more["cost/step_usd"], more["cost/cumulative_usd"]) == (5.0, 9.0)
    tracker.record_discarded_sampling(TokenUsage(sampled=1_000_000))
    assert tracker.cumulative_metrics()["cost/cumulative_usd"] == 12.0
    assert tracker.record_step(TokenUsage())["cost/step_usd"] == 0.0
    assert "cost/step_usd" not in CostTracker().record_step(TokenUsage(trained=1))
