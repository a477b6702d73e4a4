"""Policies: completers of tokens and completers of messages.

A token completer continues a prompt of tokens; rollouts for training sample from one. A message
completer continues a conversation; it is for the other models of an experiment: judges, simulated
users, opponents.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, TrainingError
from tinker_cookbook.renderers.tool_calls import declared_tools
from tinker_cookbook.renderers.types import Message, ToolCall
from tinker_cookbook.utils.sdk_compat import call, service_message

if TYPE_CHECKING:
    import httpx
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "ContextOverflowError",
    "MessageCompleter",
    "OpenAIMessageCompleter",
    "StopCondition",
    "TinkerMessageCompleter",
    "TinkerTokenCompleter",
    "TokenCompleter",
    "TokenMessageCompleter",
    "TokensWithLogprobs",
]

StopCondition: TypeAlias = list[str] | list[int]

SEED_RANGE = 2**31 - 1
RETRIED_STATUS = (408, 409, 429, 500, 502, 503, 504)


class ContextOverflowError(DataValidationError):
    """A prompt fills the context of the model, so that a reply does not fit."""


@dataclass
class TokensWithLogprobs:
    """One sampled reply."""

    tokens: list[int]
    """The sampled tokens, including the stop token if one ended the reply."""
    maybe_logprobs: list[float] | None
    """The sampler's natural log probability of each token; None if not recorded."""
    stop_reason: tinker.StopReason = "stop"
    """`stop`, or `length` if the token limit cut the reply."""
    sequence_id: str | None = None
    """The name that the service gave the sample."""
    prompt_cache_hit_tokens: int = 0

    @property
    def logprobs(self) -> list[float]:
        """Return the log probabilities.

        Raises:
            DataValidationError: if they were not recorded.
        """
        if self.maybe_logprobs is None:
            raise DataValidationError(
                "logprobs=None: this reply was recorded without log probabilities, which training "
                "needs; sample it through TinkerTokenCompleter."
            )
        return self.maybe_logprobs


class TokenCompleter:
    """Continues a prompt of tokens."""

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """Sample one reply.

        Args:
            model_input: The prompt.
            stop: Strings or token ids that end the reply.
            max_tokens: A limit for this reply; the completer's own limit holds as well.
        """
        raise NotImplementedError

    def for_rollout(self, *names: int | str) -> TokenCompleter:
        """Return the completer for one rollout; with a seed, each rollout has separate draws.

        Args:
            names: What identifies this rollout: step, group, member, attempt.
        """
        del names
        return self


class MessageCompleter:
    """Continues a conversation."""

    async def __call__(self, messages: list[Message]) -> Message:
        """Return the next message."""
        raise NotImplementedError


@dataclass
class TinkerTokenCompleter(TokenCompleter):
    """Samples from a Tinker sampling client."""

    sampling_client: tinker.SamplingClient
    max_tokens: int
    temperature: float = 1.0
    context_window: int | None = None
    """Maximum tokens of prompt and reply together; None: unknown."""
    seed: int | None = None
    """With a seed, the i-th reply is a function of the seed, i and the prompt; None: random."""
    _num_calls: int = field(default=0, init=False, repr=False)

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """Sample one reply.

        Raises:
            ContextOverflowError: if the prompt fills the context window.
            TrainingError: if the service fails.
        """
        return (await self.sample_many(model_input, stop, 1, max_tokens=max_tokens))[0]

    async def sample_many(
        self,
        model_input: tinker.ModelInput,
        stop: StopCondition,
        num_samples: int,
        *,
        max_tokens: int | None = None,
    ) -> list[TokensWithLogprobs]:
        """Sample several replies to one prompt in one request.

        Raises:
            ContextOverflowError: if the prompt fills the context window.
            TrainingError: if the service fails.
        """
        import tinker

        params = tinker.SamplingParams(
            max_tokens=self._room(model_input.length, max_tokens),
            stop=stop,
            temperature=self.temperature,
            seed=self._next_seed(),
        )
        try:
            response = await call(
                self.sampling_client,
                "sample",
                prompt=model_input,
                num_samples=num_samples,
                sampling_params=params,
            )
        except (tinker.TinkerError, ValueError) as error:
            raise TrainingError(
                f"the service could not sample: {service_message(error)}"
            ) from error
        cache_hits = getattr(response, "prompt_cache_hit_tokens", 0) or 0
        return [
            TokensWithLogprobs(
                tokens=list(sequence.tokens),
                maybe_logprobs=None if sequence.logprobs is None else list(sequence.logprobs),
                stop_reason=sequence.stop_reason,
                sequence_id=getattr(sequence, "sequence_id", None),
                prompt_cache_hit_tokens=cache_hits,
            )
            for sequence in response.sequences
        ]

    def for_rollout(self, *names: int | str) -> TokenCompleter:
        """Return a copy with the seed of this rollout; without a seed, the completer itself."""
        if self.seed is None:
            return self
        return dataclasses.replace(self, seed=derive_seed(self.seed, *names))

    def _room(self, prompt_length: int, max_tokens: int | None) -> int:
        limit = self.max_tokens if max_tokens is None else min(self.max_tokens, max_tokens)
        if self.context_window is None:
            return limit
        room = self.context_window - prompt_length
        if room < 1:
            raise ContextOverflowError(
                f"prompt of {prompt_length} tokens fills the model's context of "
                f"{self.context_window} tokens, so a reply does not fit. Shorten the prompt, or "
                "set max_trajectory_tokens in the rollout limits."
            )
        return min(limit, room)

    def _next_seed(self) -> int | None:
        if self.seed is None:
            return None
        self._num_calls += 1
        return derive_seed(self.seed, self._num_calls)


class TokenMessageCompleter(MessageCompleter):
    """Renders a conversation, samples from a token completer, and parses the reply."""

    def __init__(
        self,
        token_completer: TokenCompleter,
        renderer: Renderer,
        stop_condition: StopCondition | None = None,
    ) -> None:
        self.renderer = renderer
        self.stop_condition = stop_condition or renderer.get_stop_sequences()
        self.token_completer = token_completer

    async def __call__(self, messages: list[Message]) -> Message:
        """Return the next message: role, content, and tool calls if it has any."""
        prompt = self.renderer.build_generation_prompt(messages)
        reply = await self.token_completer(prompt, self.stop_condition)
        parsed, _ = self.renderer.parse_response(reply.tokens)
        parsed = self.renderer.fit_tool_calls(parsed, declared_tools(messages))
        message: Message = {"role": parsed["role"], "content": parsed["content"]}
        calls = parsed.get("tool_calls")
        if calls:
            message["tool_calls"] = calls
        return message


class TinkerMessageCompleter(TokenMessageCompleter):
    """A message completer that samples from a Tinker sampling client."""

    def __init__(
        self,
        sampling_client: tinker.SamplingClient,
        renderer: Renderer,
        max_tokens: int,
        stop_condition: StopCondition | None = None,
        temperature: float = 1.0,
    ) -> None:
        completer = TinkerTokenCompleter(sampling_client, max_tokens, temperature)
        super().__init__(completer, renderer, stop_condition)


@dataclass
class OpenAIMessageCompleter(MessageCompleter):
    """A message completer for any server with the OpenAI chat completions API.

    `base_url` is the address before `/chat/completions`; it usually ends in `/v1`. The API key is
    read from an environment variable, so that it does not appear in configs and logs.
    """

    base_url: str
    model: str
    max_tokens: int = 1024
    temperature: float = 1.0
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; leave it unset for a server without keys."""
    timeout_seconds: float = 120.0
    max_attempts: int = 4
    """Attempts per request. A busy or failing server is retried after 1, 2, 4, ... seconds."""
    first_pause_seconds: float = 1.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"base_url={self.base_url!r} is not an address; use http://HOST:PORT/v1 or https://..."
            )

    async def __call__(self, messages: list[Message]) -> Message:
        """Return the next message.

        Raises:
            TrainingError: if the server refuses the request or does not answer.
        """
        import httpx

        body = {
            "model": self.model,
            "messages": [_openai_message(message) for message in messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        key = os.environ.get(self.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        problem = "no attempt was made"
        async with httpx.AsyncClient(timeout=self.timeout_seconds) as client:
            for attempt in range(self.max_attempts):
                if attempt:
                    await asyncio.sleep(self.first_pause_seconds * 2 ** (attempt - 1))
                try:
                    response = await client.post(self._url(), json=body, headers=headers)
                except httpx.HTTPError as error:
                    problem = f"{type(error).__name__} {error}"
                    continue
                if response.status_code == 200:
                    return self._read(response)
                problem = f"status {response.status_code}: {response.text[:500]}"
                if response.status_code not in RETRIED_STATUS:
                    break
        raise TrainingError(
            f"{self._url()} gave no reply from {self.model} ({problem}). Check the address, the "
            f"name of the model, and {self.api_key_env}."
        )

    def _url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def _read(self, response: httpx.Response) -> Message:
        try:
            choice = response.json()["choices"][0]["message"]
            message: Message = {"role": "assistant", "content": choice.get("content") or ""}
            calls = [
                ToolCall.model_validate(_known(call)) for call in choice.get("tool_calls") or ()
            ]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise TrainingError(
                f"{self._url()} does not answer as a chat completions API does ({error}); "
                "base_url usually ends in /v1."
            ) from error
        if calls:
            message["tool_calls"] = calls
        return message


def derive_seed(seed: int, *names: int | str) -> int:
    """Return a seed derived from `seed` and `names`; equal names give equal seeds."""
    words: Sequence[str] = [str(seed), *map(str, names)]
    return zlib.crc32("/".join(words).encode()) % SEED_RANGE


def _openai_message(message: Message) -> dict[str, object]:
    from tinker_cookbook.renderers.content import get_text_content

    record: dict[str, object] = {"role": message["role"], "content": get_text_content(message)}
    calls = message.get("tool_calls")
    if calls:
        record["tool_calls"] = [call.model_dump() for call in calls]
    identity = {"tool_call_id": message.get("tool_call_id"), "name": message.get("name")}
    return record | {key: value for key, value in identity.items() if value is not None}


def _known(call: dict[str, object]) -> dict[str, object]:
    """Return a tool call without the extra fields that some servers add."""
    return {key: call[key] for key in ("type", "id", "function") if key in call}
