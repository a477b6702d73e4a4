"""Multiple choice by likelihood: which ending does the model find the most probable?

Nothing is sampled. The text has no chat format: the model scores `context + ending` for each
ending, and `acc` and `acc_norm` are those of lm-evaluation-harness.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from tinker_cookbook.eval.benchmarks._data import BenchmarkData, Row
from tinker_cookbook.eval.benchmarks._settings import hash_messages
from tinker_cookbook.eval.benchmarks._types import (
    BenchmarkBuilder,
    BenchmarkConfig,
    Grade,
    Logs,
    StoredTurn,
)
from tinker_cookbook.eval.endpoint import EndpointClient
from tinker_cookbook.eval.graders.choices import grade_likelihood
from tinker_cookbook.exceptions import DataValidationError, TrainingError
from tinker_cookbook.utils.sdk_compat import call, service_message

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["LikelihoodBenchmark", "LikelihoodEnv", "split_tokens"]


def split_tokens(renderer: Renderer, context: str, ending: str) -> tuple[list[int], int]:
    """Return the tokens of context and ending together, and the number that count as the ending.

    Spaces at the end of the context belong to the ending. The ending starts where its tokens first
    differ from those of the context alone, because a token may cover the border.
    """
    stripped = context.rstrip()
    ending = context[len(stripped) :] + ending
    alone, whole = renderer.encoder.encode_batch([stripped, stripped + ending])
    common = 0
    while common < min(len(alone), len(whole)) and alone[common] == whole[common]:
        common += 1
    if not 0 < common < len(whole):
        raise DataValidationError(
            f"context={context[-40:]!r} and ending={ending[:40]!r} cannot be separated into "
            "tokens; both need text."
        )
    return whole, len(whole) - common


class LikelihoodEnv:
    """One context with its endings."""

    def __init__(
        self,
        benchmark: LikelihoodBenchmark,
        config: BenchmarkConfig,
        renderer: Renderer,
        logs: Logs,
        example_id: str,
    ) -> None:
        """Set the example.

        Args:
            benchmark: Grades the log probabilities.
            config: The settings of the evaluation.
            renderer: Its encoder makes the tokens; its chat format is not used.
            logs: `context`, `endings` (JSON), `expected` (an index).
            example_id: The name of the example.
        """
        self.example_id = example_id
        self.prompt_key = hash_messages([logs["context"], logs["endings"]])
        self.turns: list[StoredTurn] = [StoredTurn("user", str(logs["context"]))]
        self._benchmark = benchmark
        self._config = config
        self._renderer = renderer
        self._logs = logs

    async def score_directly(
        self, sampling_client: tinker.SamplingClient | EndpointClient
    ) -> Grade:
        """Score every ending, and grade the likeliest one."""
        context, endings = str(self._logs["context"]), json.loads(str(self._logs["endings"]))
        found = await asyncio.gather(
            *(self._score(sampling_client, context, f" {ending}") for ending in endings)
        )
        for ending, (logprob, num_tokens) in zip(endings, found, strict=True):
            metadata = {"logprob": logprob, "num_tokens": num_tokens}
            self.turns.append(StoredTurn("environment", ending, metadata=metadata))
        logs = self._logs | {"logprobs": json.dumps([logprob for logprob, _ in found])}
        grade = await self._benchmark.grade("", logs, self._config)
        return replace(grade, logs=logs | grade.logs)

    async def _score(
        self, client: tinker.SamplingClient | EndpointClient, context: str, ending: str
    ) -> tuple[float, int]:
        """Return the log probability of an ending and its number of tokens."""
        import tinker

        if isinstance(client, EndpointClient):
            return await client.score_ending(context, ending)
        tokens, count = split_tokens(self._renderer, context, ending)
        window = self._config.context_window
        if window is not None and len(tokens) > window:
            raise DataValidationError(
                f"{len(tokens)} tokens are more than context_window={window}; choose a model with "
                "a longer context."
            )
        prompt = tinker.ModelInput.from_ints(tokens)
        try:
            logprobs = await call(client, "compute_logprobs", prompt, **_last_n(client, count))
        except (tinker.TinkerError, ValueError) as error:
            raise TrainingError(f"the service could not score: {service_message(error)}") from error
        scored = [value for value in logprobs[-count:] if value is not None]
        if len(scored) != count:
            raise TrainingError(
                f"the service scored {len(scored)} of {count} tokens; it must score every one."
            )
        return math.fsum(scored), count


def _last_n(client: tinker.SamplingClient, count: int) -> dict[str, int]:
    """Return the argument that leaves out the context's log probabilities, if the SDK has it."""
    method = getattr(client, "compute_logprobs", None)
    known = method is not None and (
        "prompt_logprobs_last_n" in inspect.signature(method).parameters
    )
    return {"prompt_logprobs_last_n": count} if known else {}


class LikelihoodBenchmark(BenchmarkBuilder):
    """A benchmark of contexts with endings, one of which is right."""

    data: ClassVar[BenchmarkData]
    main_metric: ClassVar[Literal["acc", "acc_norm"]] = "acc"
    """Which of the two is the score; both are among the metrics."""

    @abstractmethod
    def context(self, row: Row) -> str:
        """Return the text before the ending."""

    @abstractmethod
    def endings(self, row: Row) -> list[str]:
        """Return the endings, without the space that separates them from the context."""

    @abstractmethod
    def expected(self, row: Row) -> int:
        """Return the index of the right ending."""

    def make_envs(self, renderer: Renderer, config: BenchmarkConfig) -> Sequence[LikelihoodEnv]:
        """Return one environment per row."""
        found = self.data.load(config)
        return [
            LikelihoodEnv(self, config, renderer, self._logs(row), example_id)
            for row, example_id in list(zip(found.rows, found.ids, strict=True))[
                : config.max_examples
            ]
        ]

    def _logs(self, row: Row) -> Logs:
        endings = json.dumps(self.endings(row), ensure_ascii=False)
        return {"context": self.context(row), "endings": endings, "expected": self.expected(row)}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Grade the log probabilities in the logs; there is no reply."""
        del reply, config
        logprobs, endings = json.loads(str(logs["logprobs"])), json.loads(str(logs["endings"]))
        verdict = grade_likelihood(logprobs, endings, int(logs["expected"]))
        metrics = {"acc": verdict.acc, "acc_norm": verdict.acc_norm}
        return Grade(
            metrics[self.main_metric],
            dict(metrics),
            {"choice": verdict.choice, "choice_norm": verdict.choice_norm},
        )

    def data_key(self, config: BenchmarkConfig) -> str:
        """Return the source of the rows."""
        return self.data.load(config).source
