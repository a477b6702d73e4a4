"""Tokens and cost of a run on a hosted service, from a table of prices.

Nothing is fetched unless `fetch_model_pricing` or `load_model_pricing` is called with a URL; a file
with the same content can be read instead. A table is a JSON list of models (or an object with that
list as `models`), with prices in dollars per million tokens:

    [{"model_name": "org/model", "prefill_usd_per_million": 0.1,
      "cached_prefill_usd_per_million": 0.02, "sample_usd_per_million": 0.3,
      "train_usd_per_million": 0.4}]
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "PRICING_URL",
    "TOKENS_PER_MILLION",
    "CostTracker",
    "TokenCostRates",
    "TokenUsage",
    "fetch_model_pricing",
    "find_model_rates",
    "find_rates",
    "load_model_pricing",
    "rates_from_pricing_entry",
    "read_prices",
]

logger = logging.getLogger(__name__)

TOKENS_PER_MILLION = 1_000_000
PRICING_URL = "https://tinker-docs.thinkingmachines.ai/tinker/models.json"
TIMEOUT_SECONDS = 5.0
PRICES_FETCHED = "fetch"
"""Value of the setting `prices` that fetches the public table."""
MODEL_KEYS = ("model_name", "name", "id", "model")
PRICE_KEYS = ("pricing", "prices")
"""An entry may hold its prices in an object of one of these names."""
RATE_KEYS: dict[str, tuple[str, ...]] = {
    "prefill_usd_per_million": ("prefill", "input"),
    "cached_prefill_usd_per_million": ("cached_prefill", "prefill_cached", "cached_input"),
    "sample_usd_per_million": ("sample", "sampling", "output"),
    "train_usd_per_million": ("train", "training"),
}
"""Other names of the prices in a table."""


@dataclass(frozen=True)
class TokenUsage:
    """Numbers of tokens that a service charges for."""

    sampled: int = 0
    prefill_cached: int = 0
    """Tokens of prompts that were computed for an earlier request."""
    prefill_uncached: int = 0
    trained: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(
            self.sampled + other.sampled,
            self.prefill_cached + other.prefill_cached,
            self.prefill_uncached + other.prefill_uncached,
            self.trained + other.trained,
        )

    def metrics(self, prefix: str) -> dict[str, int]:
        """Return the numbers as metrics `PREFIX/sampled` and so on."""
        return {f"{prefix}/{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class TokenCostRates:
    """Prices of a model, in dollars per million tokens."""

    prefill_usd_per_million: float
    cached_prefill_usd_per_million: float
    sample_usd_per_million: float
    train_usd_per_million: float

    def estimate_usd(self, usage: TokenUsage) -> float:
        """Return the price of some tokens."""
        total = (
            usage.prefill_uncached * self.prefill_usd_per_million
            + usage.prefill_cached * self.cached_prefill_usd_per_million
            + usage.sampled * self.sample_usd_per_million
            + usage.trained * self.train_usd_per_million
        )
        return total / TOKENS_PER_MILLION


def rates_from_pricing_entry(entry: Mapping[str, object]) -> TokenCostRates | None:
    """Return the prices of an entry of a table; None if it does not have all of them.

    Without a price of cached prompts, they cost as much as others.
    """
    nested = next((entry[key] for key in PRICE_KEYS if isinstance(entry.get(key), Mapping)), entry)
    assert isinstance(nested, Mapping)
    found = {name: _find_price(nested, (name, *others)) for name, others in RATE_KEYS.items()}
    if found["cached_prefill_usd_per_million"] is None:
        found["cached_prefill_usd_per_million"] = found["prefill_usd_per_million"]
    known = {name: value for name, value in found.items() if value is not None}
    return TokenCostRates(**known) if len(known) == len(found) else None


def load_model_pricing(
    *, url: str = PRICING_URL, timeout: float = TIMEOUT_SECONDS
) -> list[dict[str, object]] | None:
    """Fetch a table of prices; None, with a warning, if that fails."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return _entries(json.loads(answer.read()))
    except (OSError, ValueError) as error:
        logger.warning("no prices from %s: %s", url, error)
        return None


def fetch_model_pricing(
    model_name: str, *, url: str = PRICING_URL, timeout: float = TIMEOUT_SECONDS
) -> TokenCostRates | None:
    """Fetch the prices of a model; None if the table cannot be fetched or lacks the model."""
    table = load_model_pricing(url=url, timeout=timeout)
    return None if table is None else find_rates(table, model_name)


def read_prices(path: str | Path) -> list[dict[str, object]]:
    """Read a file with a table of prices.

    Raises:
        ConfigurationError: if the file cannot be read, or has another form.
    """
    try:
        found = _entries(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigurationError(f"prices={path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigurationError(
            f"prices={path} is not a table of prices ({error}); it must be a JSON list of models, "
            "each with model_name and its prices in dollars per million tokens."
        ) from error
    return found


def find_rates(table: Sequence[Mapping[str, object]], model_name: str) -> TokenCostRates | None:
    """Return the prices of a model; None if the table does not have them."""
    wanted = model_name.partition(":")[0].lower()
    for entry in table:
        names = {str(entry[key]).lower() for key in MODEL_KEYS if key in entry}
        if wanted in names:
            return rates_from_pricing_entry(entry)
    return None


def find_model_rates(prices: str | None, model_name: str) -> TokenCostRates | None:
    """Return the prices of a model by the setting `prices`: a file, `fetch`, or None.

    Raises:
        ConfigurationError: if the file cannot be read, or has another form.
    """
    if prices is None:
        return None
    if prices == PRICES_FETCHED:
        return fetch_model_pricing(model_name)
    return find_rates(read_prices(prices), model_name)


class CostTracker:
    """Adds up the tokens of a run, and their price if it is known.

    Args:
        rates: Prices; None: only tokens are counted.
        cumulative: Tokens of the steps before, for a resumed run.
        discarded: Tokens that were sampled for groups that were not trained on.
    """

    def __init__(
        self,
        rates: TokenCostRates | None = None,
        *,
        cumulative: TokenUsage = TokenUsage(),
        discarded: TokenUsage = TokenUsage(),
    ) -> None:
        self.rates = rates
        self.cumulative = cumulative
        self.discarded = discarded
        self._step = TokenUsage()

    def record_discarded_sampling(self, usage: TokenUsage) -> None:
        """Count tokens that no step uses."""
        self.discarded += usage
        self.cumulative += usage

    def cumulative_metrics(self) -> dict[str, float]:
        """Return the sums so far: `tokens/cumulative/...` and, with prices, their cost."""
        metrics: dict[str, float] = {**self.cumulative.metrics("tokens/cumulative")}
        if self.rates is not None:
            metrics["cost/cumulative_usd"] = self.rates.estimate_usd(self.cumulative)
        return metrics

    def record_step(self, usage: TokenUsage) -> dict[str, float]:
        """Count a new step, and return its metrics and the sums."""
        self._step = TokenUsage()
        return self.extend_step(usage)

    def extend_step(self, usage: TokenUsage) -> dict[str, float]:
        """Count more tokens of the same step, such as those of an evaluation."""
        self._step += usage
        self.cumulative += usage
        metrics: dict[str, float] = {**self._step.metrics("tokens")}
        if self.rates is not None:
            metrics["cost/step_usd"] = self.rates.estimate_usd(self._step)
        return metrics | self.cumulative_metrics()


def _entries(content: object) -> list[dict[str, object]]:
    listed = content.get("models") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise ValueError("it has no list of models")
    return listed


def _find_price(entry: Mapping[str, object], names: Sequence[str]) -> float | None:
    for name in names:
        value = entry.get(name)
        if isinstance(value, str):
            value = _number(value.strip().lstrip("$"))
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            return float(value)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
