"""Grades of sampled replies to held-out requests, by a rule that training does not see."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.utils.durable_files import write_atomically

from .own_replies import HELD_OUT_TOPICS, count_reward, draw_requests, sample_replies, score

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

FIRST_REPLIES_FILE = "replies_before.json"


class WordCountEvaluator(SamplingClientEvaluator):
    """Grades sampled replies, and compares them with those of the model before training.

    The first evaluation writes its replies into the run directory; the later ones of the run,
    resumed or not, are compared with them.
    """

    def __init__(self, renderer: Renderer, log_path: str, num_requests: int, samples: int) -> None:
        self._renderer = renderer
        self._first = Path(log_path) / FIRST_REPLIES_FILE
        self._requests = draw_requests(HELD_OUT_TOPICS, num_requests, seed=1)
        self._samples = samples

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return reward, win rate and exact share with standard errors over requests, and words."""
        questions = [question for question, _ in self._requests]
        replies = await asyncio.to_thread(
            sample_replies, sampling_client, self._renderer, questions, self._samples, 7
        )
        if not self._first.exists():
            write_atomically(self._first, json.dumps(replies))
        first = json.loads(self._first.read_text())
        grades, exact, wins = [], [], []
        for (_, words), found, before in zip(self._requests, replies, first, strict=True):
            own = [score(reply, words) for reply in found]
            grades.append(statistics.fmean(own))
            exact.append(statistics.fmean(count_reward(text, words) == 1.0 for text, _ in found))
            wins.append(win_rate(own, [score((text, ended), words) for text, ended in before]))
        lengths = [len(text.split()) for found in replies for text, _ in found]
        return {
            **_mean_and_error("test/reward", grades),
            **_mean_and_error("test/exact", exact),
            **_mean_and_error("test/win_rate", wins),
            "test/words": statistics.fmean(lengths),
        }


def win_rate(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the share of couples of an own and another reply that the own one wins.

    Equal grades count half.
    """
    return statistics.fmean((a > b) + 0.5 * (a == b) for a in own for b in other)


def _mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {name: statistics.fmean(values), f"{name}/stderr": error}


@chz.chz
class WordCountEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    model_name: str
    renderer_name: str
    log_path: str
    num_requests: int = 48
    samples: int = 4

    def __call__(self) -> WordCountEvaluator:
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        return WordCountEvaluator(renderer, self.log_path, self.num_requests, self.samples)
