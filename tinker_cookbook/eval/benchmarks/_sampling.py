"""Policies of an evaluation: several replies to one prompt in one request, and a record of both."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from tinker_cookbook.completers import (
    StopCondition,
    TinkerTokenCompleter,
    TokenCompleter,
    TokensWithLogprobs,
    derive_seed,
)
from tinker_cookbook.eval.benchmarks._types import StoredTurn, TurnRole
from tinker_cookbook.renderers.content import format_content_as_string, get_text_content
from tinker_cookbook.rl.message_env import EnvFromMessageEnv

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer
    from tinker_cookbook.renderers.types import Message

__all__ = ["FirstReplies", "RecordingPolicy", "message_turn"]


class FirstReplies:
    """The first replies of all samples of an example, from one request with `num_samples`."""

    def __init__(self, completer: TinkerTokenCompleter, num_samples: int) -> None:
        self._completer = completer
        self._num_samples = num_samples
        self._prompt: list[int] | None = None
        self._request: asyncio.Task[list[TokensWithLogprobs]] | None = None

    def policy(self, sample: int) -> TokenCompleter:
        """Return the policy of one sample: the shared first request, then separate ones."""
        return _SamplePolicy(self, self._completer, sample)

    async def reply(
        self, sample: int, prompt: tinker.ModelInput, stop: StopCondition
    ) -> TokensWithLogprobs | None:
        """Return a sample's first reply; None if its prompt differs from the shared one."""
        try:
            tokens = prompt.to_ints()
        except ValueError:  # the prompt holds images
            tokens = None
        if self._request is None:
            self._prompt = tokens
            sampling = self._completer.sample_many(prompt, stop, self._num_samples)
            self._request = asyncio.ensure_future(sampling)
        elif tokens is None or tokens != self._prompt:
            return None
        # A sample that is cancelled must not take the request away from the others.
        return (await asyncio.shield(self._request))[sample]

    def close(self) -> None:
        """Cancel a request that nobody awaits any more."""
        if self._request is not None:
            self._request.cancel()


class _SamplePolicy(TokenCompleter):
    def __init__(self, first: FirstReplies, completer: TinkerTokenCompleter, sample: int) -> None:
        self._first: FirstReplies | None = first
        self._sample = sample
        seed = completer.seed
        self._later = replace(
            completer, seed=None if seed is None else derive_seed(seed, "sample", sample)
        )

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        first, self._first = self._first, None
        if first is not None and max_tokens is None:
            reply = await first.reply(self._sample, model_input, stop)
            if reply is not None:
                return reply
        return await self._later(model_input, stop, max_tokens=max_tokens)


class RecordingPolicy(TokenCompleter):
    """Passes prompts on to a policy and keeps the conversation as text."""

    def __init__(self, policy: TokenCompleter, env: object, renderer: Renderer) -> None:
        self._policy = policy
        self._env = env
        self._renderer = renderer
        self._before: list[StoredTurn] = []
        self._replies: list[StoredTurn] = []

    @property
    def turns(self) -> list[StoredTurn]:
        """The messages of the last prompt, and the last reply if there is one."""
        return [*self._before, *self._replies[-1:]]

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """Record the prompt, sample, and record the reply."""
        self._before = self._prompt_turns(model_input)
        reply = await self._policy(model_input, stop, max_tokens=max_tokens)
        self._replies.append(self._reply_turn(reply))
        return reply

    def _prompt_turns(self, model_input: tinker.ModelInput) -> list[StoredTurn]:
        if not isinstance(self._env, EnvFromMessageEnv):
            text = self._renderer.encoder.decode(model_input.to_ints())
            return [StoredTurn("user", text, metadata={"rendered": True})]
        replies = iter(self._replies)
        turns = []
        for message in self._env.messages:
            # A reply of the policy keeps its token count; other assistant turns are examples.
            known = next(replies, None) if message["role"] == "assistant" else None
            turns.append(known or message_turn(message))
        return turns

    def _reply_turn(self, reply: TokensWithLogprobs) -> StoredTurn:
        message, _ = self._renderer.parse_response(reply.tokens)
        content = get_text_content(message)
        metadata: dict[str, object] = {"stop_reason": str(reply.stop_reason)}
        raw = self._renderer.encoder.decode(reply.tokens)
        if raw != content:
            metadata["raw"] = raw
        return StoredTurn("assistant", content, len(reply.tokens), metadata)


def message_turn(message: Message) -> StoredTurn:
    """Return a message of a prompt as a turn."""
    role = message["role"]
    known: dict[str, TurnRole] = {"user": "user", "assistant": "assistant"}
    metadata = {} if role in known else {"role": role}
    content = format_content_as_string(message["content"])
    return StoredTurn(known.get(role, "environment"), content, metadata=metadata)
