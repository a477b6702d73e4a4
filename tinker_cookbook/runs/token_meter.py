"""Count the tokens of a run that a hosted service charges for, and their price if it is known.

All requests are counted: those of the steps, of evaluations, of references and teachers, and of
samples that no step uses. A row of metrics has the tokens of the requests that were made in its
step, and of earlier ones that were not finished then.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tinker_cookbook.utils.cost_estimation import CostTracker, TokenUsage, find_model_rates
from tinker_cookbook.utils.sdk_calls import CallEnd, bind_arguments, unwatch, watch
from tinker_cookbook.utils.sdk_compat import known_base_model
from tinker_cookbook.utils.trace import current_step

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["TokenMeter", "count_tokens"]

logger = logging.getLogger(__name__)

COST_SUM = "cost/cumulative_usd"
USAGE_FIELDS = ("sampled", "prefill_cached", "prefill_uncached", "trained")
OTHERS = "tokens/other_models"

_current: contextvars.ContextVar[TokenMeter | None] = contextvars.ContextVar("meter", default=None)
_open: list[TokenMeter] = []
_open_lock = threading.Lock()


class TokenMeter:
    """The tokens of one run, by model.

    Args:
        model_name: The model in training. Tokens of other models, such as a teacher, are counted
            apart.
        prices: A file with prices, or `fetch`; None: only tokens are counted.
    """

    def __init__(self, model_name: str, prices: str | None) -> None:
        self.model_name = model_name
        self._prices = prices
        self._lock = threading.Lock()
        self._pending: list[tuple[int | None, str, TokenUsage]] = []
        self._trackers = {model_name: self._make_tracker(model_name)}
        self._earlier_usd = 0.0  # of other models, before the run was resumed

    def resume(self, row: Mapping[str, Any]) -> None:
        """Continue the sums of a row of metrics, the last one before the run was interrupted."""
        values = {name: int(row.get(f"tokens/cumulative/{name}", 0)) for name in USAGE_FIELDS}
        tracker = self._trackers[self.model_name]
        tracker.cumulative = TokenUsage(**values)
        if tracker.rates is not None and COST_SUM in row:
            self._earlier_usd = row[COST_SUM] - tracker.rates.estimate_usd(tracker.cumulative)

    def add(self, step: int | None, model_name: str, usage: TokenUsage) -> None:
        """Count the tokens of a request that has succeeded; any thread may call this."""
        with self._lock:
            self._pending.append((step, model_name, usage))

    def take_metrics(self, step: int) -> dict[str, float]:
        """Return the tokens and the cost of a step, and the sums of the run."""
        pending = self._take_pending(step)
        others = TokenUsage()
        step_usd = 0.0
        for model, usage in pending.items():
            if model not in self._trackers:
                self._trackers[model] = self._make_tracker(model)
            if model != self.model_name:
                others += usage
                step_usd += self._trackers[model].record_step(usage).get("cost/step_usd", 0.0)
        metrics = self._trackers[self.model_name].record_step(
            pending.get(self.model_name, TokenUsage())
        )
        if others != TokenUsage():
            metrics |= others.metrics(OTHERS)
        if "cost/step_usd" in metrics:
            metrics["cost/step_usd"] += step_usd
            metrics[COST_SUM] = self._earlier_usd + sum(
                tracker.cumulative_metrics().get(COST_SUM, 0.0)
                for tracker in self._trackers.values()
            )
        return metrics

    def _take_pending(self, step: int) -> dict[str, TokenUsage]:
        """Return the usage by model, without requests of later steps, which are made ahead."""
        found: dict[str, TokenUsage] = {}
        with self._lock:
            pending, self._pending = self._pending, []
            for of_step, model, usage in pending:
                if of_step is not None and of_step > step:
                    self._pending.append((of_step, model, usage))
                else:
                    found[model] = found.get(model, TokenUsage()) + usage
        return found

    def _make_tracker(self, model_name: str) -> CostTracker:
        rates = find_model_rates(self._prices, model_name)
        if self._prices is not None and rates is None:
            logger.warning(
                "prices=%s has no prices of %s; its tokens are counted without a cost",
                self._prices,
                model_name,
            )
        return CostTracker(rates)


@contextlib.contextmanager
def count_tokens(meter: TokenMeter) -> Iterator[None]:
    """Count the requests that are made in a block, and in the tasks that it starts.

    A request of a thread that does not know its run is counted if only one run is open.
    """
    with _open_lock:
        if not _open:
            watch(_count)
        _open.append(meter)
    token = _current.set(meter)
    try:
        yield
    finally:
        _current.reset(token)
        with _open_lock:
            _open.remove(meter)
            if not _open:
                unwatch(_count)


def _count(
    client: object, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> CallEnd | None:
    if name == "optim_step":
        return None
    meter = _current.get()
    if meter is None and len(_open) == 1:
        meter = _open[0]
    if meter is None:
        return None
    given = bind_arguments(name, args, kwargs)
    model = known_base_model(client) or meter.model_name
    step = current_step()

    def finish(done: Future[Any] | None) -> None:
        if done is not None and not done.cancelled() and done.exception() is None:
            meter.add(step, model, _measure(name, given, done.result()))

    return finish


def _measure(name: str, given: Mapping[str, Any], response: Any) -> TokenUsage:
    """Return the tokens of a request, as the hosted service bills them."""
    if name == "sample":
        length, num_samples = given["prompt"].length, given["num_samples"]
        hits = getattr(response, "prompt_cache_hit_tokens", 0) or 0
        return TokenUsage(
            sampled=sum(len(sequence.tokens) for sequence in response.sequences),
            prefill_cached=hits + length * (num_samples - 1),  # the samples share one prompt
            prefill_uncached=length - hits,
        )
    if name == "compute_logprobs":
        return TokenUsage(prefill_uncached=given["prompt"].length)
    length = sum(datum.model_input.length for datum in given["data"])
    if name == "forward":
        return TokenUsage(prefill_uncached=length)
    return TokenUsage(trained=length)
