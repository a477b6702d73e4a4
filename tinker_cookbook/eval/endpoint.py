"""A model behind an OpenAI-compatible endpoint, for benchmarks: chats, and scores of endings.

Such an endpoint takes messages and text, not tokens, so that no tokenizer is needed here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tinker_cookbook.completers import RETRIED_STATUS, ContextOverflowError
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, TrainingError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message, ToolCall

if TYPE_CHECKING:
    import httpx

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["ChatReply", "EndpointClient", "EndpointFormat", "endpoint_format"]

API_KEY_VARIABLE = "OPENAI_API_KEY"
_CUT = ("length", "max_tokens")
_WINDOW_WORDS = ("context_length_exceeded", "context length", "context window", "maximum context")
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class ChatReply:
    """One reply of an endpoint."""

    message: Message
    finish_reason: str
    """The reason as the endpoint names it, such as `stop`, `length`, or `tool_calls`."""
    num_tokens: int = 0
    """Number of sampled tokens, if the endpoint tells; of several replies, their mean."""

    @property
    def is_cut(self) -> bool:
        """Return whether the token limit cut the reply."""
        return self.finish_reason in _CUT


@dataclass
class EndpointClient:
    """A model of an OpenAI-compatible endpoint.

    `base_url` is the address before `/chat/completions`; it usually ends in `/v1`. The API key is
    read from an environment variable, so that it does not appear in configs and logs.
    """

    base_url: str
    model: str
    api_key_env: str = API_KEY_VARIABLE
    """Environment variable with the API key; leave it unset for an endpoint without keys."""
    timeout_seconds: float = 300.0
    _limit_name: str = field(default="max_tokens", init=False, repr=False)
    """Name of the token limit; newer models of some providers take only another one."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"endpoint={self.base_url!r} is not an address; use http://HOST:PORT/v1 or "
                "https://..."
            )

    def get_base_model(self) -> str:
        """Return the name of the model."""
        return self.model

    @property
    def weights_name(self) -> str:
        """Return what identifies the weights: the endpoint, and the model's name there."""
        return f"{self.model} at {self.base_url.rstrip('/')}"

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        num_samples: int = 1,
        max_tokens: int,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> list[ChatReply]:
        """Return several replies to a conversation, in one request if the endpoint allows it.

        Raises:
            ConfigurationError: if the endpoint refuses the request.
            ContextOverflowError: if the conversation does not fit the model's context.
            TrainingError: if the endpoint fails; another attempt may succeed.
        """
        body: JsonObject = {
            "model": self.model,
            "messages": [_openai_message(message) for message in messages],
            "temperature": temperature,
        }
        replies: list[ChatReply] = []
        while len(replies) < num_samples:
            missing = num_samples - len(replies)
            more: JsonObject = {} if missing == 1 else {"n": missing}
            if seed is not None:
                more["seed"] = seed + len(replies)
            found = self._read_replies(await self._chat(body | more, max_tokens))
            replies += found[:missing]
        return replies

    async def score_ending(self, context: str, ending: str) -> tuple[float, int]:
        """Return the log probability of `ending` after `context`, and its number of tokens.

        Tokens that reach past the end of the context count as the ending's.

        Raises:
            ConfigurationError: if the endpoint does not return log probabilities of a prompt.
            TrainingError: if the endpoint fails; another attempt may succeed.
        """
        stripped = context.rstrip()
        if not stripped or not ending.strip():
            raise DataValidationError(
                f"context={context[-40:]!r} and ending={ending[:40]!r} both need text."
            )
        text = context + ending
        body = {
            "model": self.model,
            "prompt": text,
            "echo": True,
            "logprobs": 1,
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = await self._post("completions", body)
        scored = _scores_after(answer, len(stripped), len(text))
        if scored is None:
            raise ConfigurationError(
                f"{self._url('completions')} returns no log probabilities of the prompt (echo and "
                "logprobs of /completions). Likelihood benchmarks need them: use an endpoint that "
                "has them, or a benchmark that is graded by replies."
            )
        return math.fsum(scored), len(scored)

    async def _chat(self, body: JsonObject, max_tokens: int) -> JsonObject:
        try:
            return await self._post("chat/completions", body | {self._limit_name: max_tokens})
        except ConfigurationError as error:
            other = "max_completion_tokens"
            if self._limit_name == other or other not in str(error):
                raise
            self._limit_name = other
        return await self._post("chat/completions", body | {self._limit_name: max_tokens})

    def _read_replies(self, answer: JsonObject) -> list[ChatReply]:
        try:
            choices = answer["choices"]
            sampled = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            found = [
                ChatReply(
                    _message(choice["message"]),
                    str(choice.get("finish_reason") or "stop"),
                    round(sampled / len(choices)),
                )
                for choice in choices
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._not_understood("chat/completions", error) from error
        if not found:
            raise TrainingError(f"{self._url('chat/completions')} returned no reply.")
        return found

    async def _post(self, path: str, body: JsonObject) -> JsonObject:
        import httpx

        key = os.environ.get(self.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with httpx.AsyncClient(timeout=self.timeout_seconds) as client:
                response = await client.post(self._url(path), json=body, headers=headers)
        except httpx.HTTPError as error:
            raise TrainingError(
                f"{self._url(path)} does not answer: {type(error).__name__} {error}"
            ) from error
        if response.status_code != 200:
            raise self._refusal(path, response)
        try:
            return cast("JsonObject", response.json())
        except ValueError as error:
            raise self._not_understood(path, error) from error

    def _refusal(self, path: str, response: httpx.Response) -> Exception:
        problem = f"status {response.status_code}: {' '.join(response.text[:500].split())}"
        if response.status_code in RETRIED_STATUS:
            return TrainingError(f"{self._url(path)} failed ({problem})")
        if response.status_code == 400 and any(
            words in response.text.lower() for words in _WINDOW_WORDS
        ):
            return ContextOverflowError(problem)
        return ConfigurationError(
            f"{self._url(path)} refused the request ({problem}). Check the address, the model's "
            f"name {self.model!r}, and the key in {self.api_key_env}."
        )

    def _not_understood(self, path: str, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"{self._url(path)} does not answer as an OpenAI-compatible endpoint does "
            f"({type(error).__name__}: {error}); its address usually ends in /v1."
        )

    def _url(self, path: str) -> str:
        return f"{self.base_url.rstrip('/')}/{path}"


class EndpointFormat:
    """Takes the place of a renderer: the endpoint itself applies the chat format."""

    _renderer_name = "chat format of the endpoint"

    def __getattr__(self, name: str) -> object:
        """Refuse everything that a renderer does with tokens."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigurationError(
            f"this benchmark calls {name}() of a renderer, but an endpoint takes messages, not "
            "tokens; evaluate it with a Tinker sampling client."
        )


def endpoint_format() -> Renderer:
    """Return what `run_benchmark` takes as its renderer together with an `EndpointClient`."""
    return cast("Renderer", EndpointFormat())


def _scores_after(answer: JsonObject, start: int, end: int) -> list[float] | None:
    """Return the log probabilities of the tokens that end in (start, end]; None if there are none.

    The tokens after `end` are sampled ones: an echo samples at least one with most servers.
    """
    try:
        found = answer["choices"][0]["logprobs"]
        offsets, logprobs = found["text_offset"], found["token_logprobs"]
        ends = [*offsets[1:], offsets[-1] + len(found["tokens"][-1])]
        rows = zip(offsets, ends, logprobs, strict=True)
        scored = [value for begin, stop, value in rows if stop > start and begin < end]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    if not scored or offsets[0] >= end or any(value is None for value in scored):
        return None
    return [float(value) for value in scored]


def _openai_message(message: Message) -> JsonObject:
    record: JsonObject = {"role": message["role"], "content": _openai_content(message)}
    calls = message.get("tool_calls")
    if calls:
        record["tool_calls"] = [call.model_dump() for call in calls]
    identity = {"tool_call_id": message.get("tool_call_id"), "name": message.get("name")}
    return record | {key: value for key, value in identity.items() if value is not None}


def _openai_content(message: Message) -> str | list[JsonObject]:
    content = message["content"]
    if isinstance(content, str) or all(part["type"] in ("text", "thinking") for part in content):
        return get_text_content(message)
    return [_openai_part(cast("JsonObject", part)) for part in content]


def _openai_part(part: Mapping[str, Any]) -> JsonObject:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image" and isinstance(part["image"], str):
        return {"type": "image_url", "image_url": {"url": part["image"]}}
    raise ConfigurationError(
        f"content part {part['type']!r} cannot be sent to an endpoint; use text, or images as "
        "URLs or data URIs."
    )


def _message(choice: Mapping[str, Any]) -> Message:
    found: Message = {"role": "assistant", "content": choice.get("content") or ""}
    calls = [
        ToolCall.model_validate({key: call[key] for key in ("type", "id", "function")})
        for call in choice.get("tool_calls") or ()
    ]
    if calls:
        found["tool_calls"] = calls
    return found
