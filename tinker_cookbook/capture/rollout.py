"""One rollout of an agent: renders its calls, samples the replies, and records both.

The agent sends the whole conversation with every call, as text. Encoding an earlier reply again may
give other tokens than were sampled. So where the agent sends a reply back unchanged, the prompt
keeps the sampled tokens: it is the earlier prompt, the earlier reply, and the tokens that the
renderer writes after that reply.

    rendered before   A              tokens of the first call's messages
    sampled           x y <end>      the reply
    rendered now      A z <end> B    `z` is another encoding of the text of `x y`
    prompt            A x y <end> B

The tokens `z <end>` are found as those up to the first stop token after A, and they must parse to
the same message as the sample. Otherwise the prompt is as rendered and starts a new sequence.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.capture.calls import RecordedCall, count_sequences, ordered, prompt
from tinker_cookbook.capture.samplers import Sampler, SamplingWishes
from tinker_cookbook.capture.store import CallStore
from tinker_cookbook.completers import ContextOverflowError, StopCondition, TokensWithLogprobs
from tinker_cookbook.exceptions import DataValidationError, TrainingError
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments
from tinker_cookbook.renderers.types import Message, ToolSpec

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "Address",
    "CallLimits",
    "CallRefusedError",
    "Reply",
    "Rollout",
    "new_key",
    "stop_condition",
]


class CallRefusedError(DataValidationError):
    """A call that a limit of its rollout forbids."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The limit, as the stop reason of an episode."""


@dataclass(frozen=True)
class CallLimits:
    """Limits on the calls of one rollout; None means unlimited."""

    max_calls: int = 1000
    """Maximum number of calls."""
    max_turn_tokens: int | None = None
    """Maximum sampled tokens of one reply."""
    max_sampled_tokens: int | None = None
    """Maximum sampled tokens of all replies together."""
    max_sequence_tokens: int | None = None
    """Maximum tokens of a prompt and its reply together."""
    max_tool_calls: int | None = None
    """Maximum number of tool calls in all replies together."""
    call_timeout_seconds: float | None = None
    """Maximum seconds to sample one reply."""


@dataclass(frozen=True)
class Address:
    """Where an agent finds the model of its rollout."""

    base_url: str
    """Address of the OpenAI API, which ends in /v1."""
    api_key: str
    model: str

    @property
    def anthropic_base_url(self) -> str:
        """Address of the Anthropic API, to which its clients add /v1."""
        return self.base_url.removesuffix("/v1")

    def environment(self) -> dict[str, str]:
        """Return the environment variables that clients read."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "OPENAI_MODEL": self.model,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
            "ANTHROPIC_MODEL": self.model,
        }


@dataclass(frozen=True)
class Reply:
    """A recorded reply, as tokens and as a message."""

    call: RecordedCall
    message: Message
    """The parsed reply, with arguments of tool calls in the types that the tools declare."""
    prompt_tokens: int
    """Number of tokens of the whole prompt."""


@dataclass(frozen=True)
class _Rendered:
    """The prompt of a call as the renderer wrote it, before sampled tokens took their place."""

    length: int
    digest: bytes
    tools: tuple[ToolSpec, ...]


class Rollout:
    """The calls of one run of an agent."""

    def __init__(
        self,
        sampler: Sampler,
        renderer: Renderer,
        address: Address,
        *,
        name: str,
        limits: CallLimits,
        log: CallStore | None = None,
    ) -> None:
        """Begin without calls. `RecordingEndpoint.open` makes a rollout that has an address."""
        self.name = name
        self.address = address
        self.renderer = renderer
        self.calls: list[RecordedCall] = []
        """The recorded calls, in the order in which they ended."""
        self.refused: str | None = None
        """The limit that the last refused call met."""
        self.failure: Exception | None = None
        """Why the last call could not be sampled; None after a call that was."""
        self.is_closed = False
        self.free_tool_choice = False
        """Whether requests that force a tool call are sampled as those that do not."""
        self._sampler = sampler
        self._limits = limits
        self._log = log
        self._rendered: list[_Rendered] = []
        self._num_started = 0
        self._num_sampled = 0
        self._num_tool_calls = 0
        self._running: set[asyncio.Task[Reply]] = set()

    @property
    def num_sequences(self) -> int:
        """Number of token sequences that the calls merge into."""
        return count_sequences(self.calls)

    def ordered_calls(self) -> list[tuple[RecordedCall, list[int]]]:
        """Return the calls with their whole prompts; see `calls.ordered` for the order."""
        return [(call, prompt(self.calls, call.index)) for call in ordered(self.calls)]

    def start(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        stops: Sequence[str] = (),
        wishes: SamplingWishes | None = None,
    ) -> asyncio.Task[Reply]:
        """Start a call: render the conversation, sample, and record. `close` cancels it.

        The task raises `CallRefusedError` at a limit, `RendererError` for a conversation that
        cannot be rendered, and the error of the sampler.
        """
        work = self._sample(messages, tools, stops, wishes or SamplingWishes())
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """Return the tokens of a prompt, before sampled tokens take the place of earlier replies.

        Raises:
            RendererError: the conversation cannot be rendered.
        """
        declared = self.renderer.declare_tools(messages, tools)
        return _text_tokens(
            await asyncio.to_thread(self.renderer.build_generation_prompt, declared)
        )

    def close(self) -> None:
        """Cancel running calls and refuse new ones."""
        self.is_closed = True
        for task in list(self._running):
            task.cancel()

    async def _sample(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec],
        stops: Sequence[str],
        wishes: SamplingWishes,
    ) -> Reply:
        self._check_counts()
        self._num_started += 1
        rendered = await self.render(messages, tools)
        parent, new_prompt = self._continue(rendered, tools)
        whole = new_prompt if parent is None else self._whole(parent) + new_prompt
        max_tokens = self._room(len(whole), wishes.max_tokens)
        try:
            sampled = await self._call_sampler(whole, stops, wishes, max_tokens)
        except ContextOverflowError as error:
            raise self._refuse("context_overflow", str(error)) from error
        except Exception as error:
            self.failure = error
            raise
        call = self._record(parent, new_prompt, sampled, wishes)
        self._rendered.append(_Rendered(len(rendered), _digest(rendered), tuple(tools)))
        message = self._parse(sampled.tokens, tools)
        self._num_tool_calls += len(message.get("tool_calls") or ())
        return Reply(call, message, len(whole))

    async def _call_sampler(
        self,
        whole: list[int],
        stops: Sequence[str],
        wishes: SamplingWishes,
        max_tokens: int | None,
    ) -> TokensWithLogprobs:
        import tinker

        wishes = SamplingWishes(
            max_tokens, wishes.temperature, wishes.top_p, wishes.top_k, wishes.seed
        )
        stop = stop_condition(self.renderer, stops)
        sampling = self._sampler(tinker.ModelInput.from_ints(whole), stop, wishes)
        timer = asyncio.timeout(self._limits.call_timeout_seconds)
        try:
            async with timer:
                return await sampling
        except TimeoutError as error:
            if not timer.expired():
                raise  # the sampler itself raised it
            raise TrainingError(
                "sampling one reply took longer than "
                f"call_timeout_seconds={self._limits.call_timeout_seconds}; raise it, or lower "
                "max_tokens."
            ) from error

    def _record(
        self,
        parent: int | None,
        new_prompt: list[int],
        sampled: TokensWithLogprobs,
        wishes: SamplingWishes,
    ) -> RecordedCall:
        """Record a call, in the log first: what the agent sees is already there."""
        if len(sampled.logprobs) != len(sampled.tokens):
            raise DataValidationError(
                f"the sampler returned {len(sampled.tokens)} tokens with {len(sampled.logprobs)} "
                "logprobs; it must return one per token."
            )
        call = RecordedCall(
            rollout=self.name,
            index=len(self.calls),
            parent=parent,
            new_prompt=new_prompt,
            tokens=sampled.tokens,
            logprobs=sampled.logprobs,
            stop_reason=sampled.stop_reason,
            temperature=wishes.temperature,
            sequence_id=sampled.sequence_id,
            time=time.time(),
        )
        if self._log is not None:
            self._log.append(call)
        self.calls.append(call)
        self._num_sampled += len(sampled.tokens)
        self.failure = None
        return call

    # ---- the call that a prompt continues ----

    def _whole(self, index: int) -> list[int]:
        """Return the prompt and the reply of a call."""
        return prompt(self.calls, index) + self.calls[index].tokens

    def _continue(
        self, rendered: list[int], tools: Sequence[ToolSpec]
    ) -> tuple[int | None, list[int]]:
        """Return the call that a prompt continues, and the tokens after its reply."""
        for index in self._prefixes(rendered):
            tail = rendered[self._rendered[index].length :]
            rest = self._after_reply(index, tail, tools)
            if rest is not None:
                return index, rest
        return None, rendered

    def _prefixes(self, rendered: list[int]) -> list[int]:
        """Return the calls whose rendered prompts begin this one, the longest first."""
        by_length = sorted(range(len(self._rendered)), key=lambda i: self._rendered[i].length)
        data = _as_bytes(rendered)
        hasher = hashlib.blake2b(digest_size=16)
        done, found = 0, []
        for index in by_length:
            length = self._rendered[index].length
            if length > len(rendered):
                break
            hasher.update(data[4 * done : 4 * length])
            done = length
            if hasher.copy().digest() == self._rendered[index].digest:
                found.append(index)
        return found[::-1]

    def _after_reply(
        self, index: int, tail: list[int], tools: Sequence[ToolSpec]
    ) -> list[int] | None:
        """Return the tokens after the reply of call `index`; None if `tail` does not begin with it.

        Args:
            index: The call.
            tail: What is rendered after the call's prompt.
            tools: The tools of the new call.
        """
        sampled = self.calls[index].tokens
        if tail[: len(sampled)] == sampled:
            return tail[len(sampled) :]
        if not sampled or sampled[-1] not in tail:
            return None
        end = tail.index(sampled[-1]) + 1
        # The last token ends the reply only if both parse cleanly, so an ordinary token, where the
        # token limit cut the reply, is not taken for an end.
        ours, our_end = self.renderer.parse_response(sampled)
        theirs, their_end = self.renderer.parse_response(tail[:end])
        if not (our_end.is_clean and their_end.is_clean):
            return None
        ours = self._fit(ours, self._rendered[index].tools)
        return tail[end:] if _is_same(ours, self._fit(theirs, tools)) else None

    def _parse(self, tokens: Sequence[int], tools: Sequence[ToolSpec]) -> Message:
        return self._fit(self.renderer.parse_response(tokens)[0], tools)

    def _fit(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        return self.renderer.fit_tool_calls(message, tools)

    # ---- limits ----

    def _check_counts(self) -> None:
        limits = self._limits
        if self.is_closed:
            raise CallRefusedError("closed", f"rollout {self.name} is closed.")
        if self._num_started >= limits.max_calls:
            raise self._refuse("max_turns", f"max_calls={limits.max_calls} is reached.")
        sampled = limits.max_sampled_tokens
        if sampled is not None and self._num_sampled >= sampled:
            raise self._refuse("max_sampled_tokens", f"max_sampled_tokens={sampled} is reached.")
        tool_calls = limits.max_tool_calls
        if tool_calls is not None and self._num_tool_calls >= tool_calls:
            raise self._refuse("max_tool_calls", f"max_tool_calls={tool_calls} is reached.")

    def _room(self, prompt_length: int, max_tokens: int | None) -> int | None:
        """Return the maximum tokens of a reply."""
        limits = self._limits
        room = [max_tokens, limits.max_turn_tokens]
        if limits.max_sampled_tokens is not None:
            room.append(max(1, limits.max_sampled_tokens - self._num_sampled))
        if limits.max_sequence_tokens is not None:
            left = limits.max_sequence_tokens - prompt_length
            if left < 1:
                raise self._refuse(
                    "context_overflow",
                    f"prompt of {prompt_length} tokens fills "
                    f"max_sequence_tokens={limits.max_sequence_tokens}.",
                )
            room.append(left)
        return min((tokens for tokens in room if tokens is not None), default=None)

    def _refuse(self, reason: str, message: str) -> CallRefusedError:
        self.refused = reason
        return CallRefusedError(reason, message)


def _is_same(first: Message, second: Message) -> bool:
    """Return whether two replies say the same.

    Arguments of calls are compared as JSON values: some clients read them and write them again.
    """
    if {**first, "tool_calls": []} != {**second, "tool_calls": []}:
        return False
    return _calls_as_values(first) == _calls_as_values(second)


def _calls_as_values(message: Message) -> list[tuple[str, object]]:
    calls = (call_name_and_arguments(call) for call in message.get("tool_calls") or ())
    return [(name, json.loads(arguments)) for name, arguments in calls]


def new_key() -> str:
    """Return a key that cannot be guessed."""
    return f"rollout-{secrets.token_hex(16)}"


def _text_tokens(model_input: object) -> list[int]:
    chunks = getattr(model_input, "chunks", ())
    if any(getattr(chunk, "tokens", None) is None for chunk in chunks):
        raise DataValidationError("the messages contain an image; only text can be recorded.")
    return [token for chunk in chunks for token in chunk.tokens]


def _as_bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(_as_bytes(tokens), digest_size=16).digest()


def stop_condition(renderer: Renderer, stops: Sequence[str]) -> StopCondition:
    """Return what ends a reply: the renderer's stop sequences, and the texts of the request.

    A sampler takes either texts or token ids. With texts, stop tokens are given as texts too.
    """
    own = renderer.get_stop_sequences()
    if not stops:
        return own
    texts = [
        stop if isinstance(stop, str) else str(renderer.tokenizer.decode([stop])) for stop in own
    ]
    return [*stops, *texts]
