"""Examples in messages: the samples of an example with a model behind an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tinker_cookbook.completers import derive_seed
from tinker_cookbook.eval.benchmarks._sampling import message_turn
from tinker_cookbook.eval.benchmarks._types import (
    METRIC_MAX_TOKENS_REACHED,
    BenchmarkConfig,
    StoredTrajectory,
    StoredTurn,
)
from tinker_cookbook.eval.endpoint import ChatReply, EndpointClient
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.message_env import MessageEnv

__all__ = ["Conversations"]


class Conversations:
    """The conversations of one example; the first replies of all samples are one request."""

    def __init__(
        self, client: EndpointClient, config: BenchmarkConfig, seed: int | None, num_samples: int
    ) -> None:
        self._client = client
        self._config = config
        self._seed = seed
        self._num_samples = num_samples
        self._prompt: list[Message] | None = None
        self._first: asyncio.Task[list[ChatReply]] | None = None

    async def run(self, sample: int, env: object, found: StoredTrajectory) -> None:
        """Hold one conversation, and write its turns, reward, metrics, and logs into `found`.

        Raises:
            ConfigurationError: if the environment is one of tokens.
        """
        message_env = getattr(env, "message_env", None)
        if not isinstance(message_env, MessageEnv):
            raise ConfigurationError(
                f"benchmark={found.benchmark} has environments of tokens, and an endpoint takes "
                "messages; evaluate it with a Tinker sampling client."
            )
        messages = await message_env.initial_observation()
        known: list[StoredTurn] = []
        turn = 0
        while True:
            found.turns = _turns(messages, known)
            reply = await self._reply(sample, turn, messages)
            known.append(_reply_turn(reply))
            found.turns.append(known[-1])
            if reply.is_cut:
                found.metrics[METRIC_MAX_TOKENS_REACHED] = 1
                return
            result = await message_env.step(reply.message)
            found.reward += result.reward
            found.metrics |= result.metrics
            found.logs |= result.logs
            if result.episode_done:
                return
            messages, turn = result.next_messages, turn + 1

    async def _reply(self, sample: int, turn: int, messages: list[Message]) -> ChatReply:
        if turn == 0 and (self._prompt is None or messages == self._prompt):
            if self._first is None:
                self._prompt = messages
                self._first = asyncio.ensure_future(
                    self._ask(messages, self._num_samples, self._seed)
                )
            # A sample that is cancelled must not take the request away from the others.
            return (await asyncio.shield(self._first))[sample]
        seed = None if self._seed is None else derive_seed(self._seed, "sample", sample, turn)
        return (await self._ask(messages, 1, seed))[0]

    async def _ask(
        self, messages: Sequence[Message], num_samples: int, seed: int | None
    ) -> list[ChatReply]:
        return await self._client.chat(
            messages,
            num_samples=num_samples,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            seed=seed,
        )

    def close(self) -> None:
        """Cancel a request that nobody awaits any more."""
        if self._first is not None:
            self._first.cancel()


def _turns(messages: Sequence[Message], known: Sequence[StoredTurn]) -> list[StoredTurn]:
    """Return the turns of a prompt; replies of the model keep their token counts."""
    replies = iter(known)
    return [
        (next(replies, None) if message["role"] == "assistant" else None) or message_turn(message)
        for message in messages
    ]


def _reply_turn(reply: ChatReply) -> StoredTurn:
    metadata: dict[str, object] = {"stop_reason": "length" if reply.is_cut else "stop"}
    if reply.finish_reason != metadata["stop_reason"]:
        metadata["finish_reason"] = reply.finish_reason
    return StoredTurn("assistant", get_text_content(reply.message), reply.num_tokens, metadata)
