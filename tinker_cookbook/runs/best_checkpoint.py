"""The best weights of a run by a held-out metric, and when to stop because nothing improves.

A name decides whether a lower value is better (`test/nll`, `loss`, `error` ...) or a higher one
(`reward`, `accuracy`, `score` ...); see `utils.metric_names`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.runs.checkpoints import load_checkpoints_file, submit_checkpoint
from tinker_cookbook.utils.jsonl_log import read_rows
from tinker_cookbook.utils.metric_names import lower_is_better
from tinker_cookbook.utils.ml_log import METRICS_FILE
from tinker_cookbook.utils.sdk_compat import rest_client_of

if TYPE_CHECKING:
    from tinker_cookbook.runs.open_run import Run

__all__ = ["BestWeights"]

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 60


class BestWeights:
    """Saves the weights after each evaluation that is better than all before."""

    def __init__(self, run: Run[Any], metric: str | None, *, patience: int = 0) -> None:
        """Read the evaluations before the first step of this start.

        Args:
            run: The run, begun.
            metric: The metric; None: nothing is saved.
            patience: Number of evaluations without a better value after which `is_exhausted` is
                true; 0: never.
        """
        self.metric = metric
        self.best = math.nan
        self.best_step = 0
        self._run = run
        self._patience = patience
        self._sign = -1.0 if metric is not None and lower_is_better(metric) else 1.0
        self._num_worse = 0
        self._last_step = -1
        self._warned = False
        self._saved: str | None = None
        if metric is None:
            return
        for row in read_rows(Path(run.log_path) / METRICS_FILE):
            if metric in row and row["step"] < run.start_step:
                self._note(row["step"], row[metric])
        # A record is written before the row of its step, which may have been lost.
        for record in load_checkpoints_file(run.log_path):
            if record.get("best_metric", None) == metric and record.batch == run.start_step:
                self._note(run.start_step, record.get("best_value"))

    @property
    def is_exhausted(self) -> bool:
        """Whether the last `patience` evaluations were not better than the best."""
        return 0 < self._patience <= self._num_worse

    def describe(self) -> str:
        """Return why the run stops."""
        return (
            f"stopped  {self.metric} has not improved in {self._num_worse} evaluations; best "
            f"{self.best:.4f} after step {self.best_step}"
        )

    async def update(self, step: int, metrics: dict[str, float]) -> None:
        """Note an evaluation after `step` steps; if it is the best, save these weights.

        The service keeps them without a time limit until this object saves better ones, and from
        then on for `ttl_seconds`. Those of an earlier start get no limit: after a copy of the run
        directory, they may be the best ones of the other copy as well. The weights before training
        are not saved: they are the base model, or the checkpoint that the run started from.

        Call this before the next optimizer step is submitted.
        """
        if self.metric is None or step == self._last_step:
            return
        value = metrics.get(self.metric)
        if value is None:
            self._warn_once(step, metrics)
            return
        if not self._note(step, value) or step == 0:
            return
        paths = await submit_checkpoint(
            self._run.training_client,
            f"best_{step:06d}",
            self._run.log_path,
            {"batch": step, "best_metric": self.metric, "best_value": value},
            kind="sampler",
        ).finish()
        superseded, self._saved = self._saved, paths["sampler_path"]
        if superseded is not None:
            await self._limit(superseded)

    async def _limit(self, path: str) -> None:
        """Let the service keep weights that are no longer the best for `ttl_seconds` only."""
        import tinker

        rest = rest_client_of(self._run.service_client)
        limited = rest.set_checkpoint_ttl_from_tinker_path(path, self._run.config.ttl_seconds)
        try:
            await asyncio.wait_for(limited, timeout=LIMIT_SECONDS)
        except (tinker.TinkerError, TimeoutError, ValueError) as error:
            logger.info("weights %s are kept without a time limit: %s", path, error)

    def _note(self, step: int, value: float) -> bool:
        """Count an evaluation, and return whether it is better than all before."""
        self._last_step = step
        is_better = math.isnan(self.best) or self._sign * value > self._sign * self.best
        if is_better:
            self.best, self.best_step, self._num_worse = value, step, 0
        else:
            self._num_worse += 1
        return is_better

    def _warn_once(self, step: int, metrics: dict[str, float]) -> None:
        if self._warned or not metrics or not self._patience:
            return
        self._warned = True
        logger.warning(
            "best_metric=%s is not a metric of the evaluation after %d steps, so the run does not "
            "stop early; its metrics: %s",
            self.metric,
            step,
            ", ".join(sorted(metrics)),
        )
