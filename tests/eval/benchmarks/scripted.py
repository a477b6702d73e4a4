"""A sampling client that answers from a function, and a benchmark of three questions."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tests.tiny_models import tiny_model
from tinker_cookbook.eval.benchmarks import BenchmarkBuilder, BenchmarkConfig, Grade
from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._questions import QuestionEnv
from tinker_cookbook.renderers import Renderer, load_renderer
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.rl.types import Logs

__all__ = ["CUT", "HANG", "Capitals", "ScriptedClient", "chatml"]

CUT = " [cut]"
"""A reply that ends with this was cut by the token limit."""
HANG = "hang"
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}


@functools.cache
def chatml() -> Renderer:
    return load_renderer("chatml", str(tiny_model(tied=False)))


class ScriptedClient:
    """Answers each prompt with texts from a function of the prompt and the number of the call."""

    def __init__(self, answer: Callable[[str, int], Sequence[str] | Exception]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, int]] = []
        """The text of each prompt, and the number of samples asked for."""

    def get_base_model(self) -> str:
        return "scripted"

    async def sample(self, *, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
        text = chatml().encoder.decode(prompt.to_ints())
        self.requests.append((text, num_samples))
        found = self.answer(text, len(self.requests))
        if isinstance(found, Exception):
            raise found
        if found[0] == HANG:
            await asyncio.sleep(3600)
        sequences = [self._sequence(reply) for reply in found]
        assert len(sequences) == num_samples
        return SimpleNamespace(sequences=sequences)

    def _sequence(self, reply: str) -> Any:
        tokens = chatml().encoder.encode_batch([reply.removesuffix(CUT)])[0]
        cut = reply.endswith(CUT)
        if not cut:
            tokens += chatml().encoder.encode_markup("<|im_end|>")
        reason = "length" if cut else "stop"
        return SimpleNamespace(tokens=tokens, logprobs=None, stop_reason=reason)


class Capitals(BenchmarkBuilder):
    """Three questions; a reply is correct if it contains the capital."""

    name = "capitals"

    def __init__(self, version: str = "1", question: str = "Capital of {}?") -> None:
        self.grader_version = version  # pyright: ignore[reportAttributeAccessIssue]
        self.template = question

    def make_envs(self, renderer: Renderer, config: BenchmarkConfig) -> list[EnvFromMessageEnv]:
        return [
            EnvFromMessageEnv(
                renderer,
                QuestionEnv(
                    self,
                    config,
                    build_messages(self.template.format(country), config.system_prompt),
                    {"expected": capital},
                    country,
                ),
                failed_parse_reward=0.0,
                context_overflow_reward=0.0,
            )
            for country, capital in CAPITALS.items()
        ]

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        if "raise" in reply:
            raise RuntimeError("this reply cannot be graded")
        return Grade(float(str(logs["expected"]) in reply), {"length": len(reply)})
