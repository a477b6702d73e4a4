"""Response objects of all endpoints: whole, or as the events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinker_cookbook.dialects.chat import chat_delta, chat_message, chat_usage
from tinker_cookbook.dialects.pieces import (
    Ending,
    Piece,
    ReplyWriter,
    data_event,
    join_texts,
    named_event,
)
from tinker_cookbook.local.engine.types import SampleResult, SampleSpec
from tinker_cookbook.local.openai_api.codec import TextCodec, TextStream
from tinker_cookbook.local.openai_api.errors import describe_error
from tinker_cookbook.local.openai_api.reply import ReplyReader
from tinker_cookbook.local.openai_api.reply_choice import (
    Choice,
    FinishReason,
    LogprobEntry,
    draws_of,
)
from tinker_cookbook.local.openai_api.requests import ChatRequest, SamplingChoice
from tinker_cookbook.local.openai_api.sampling import Drawn
from tinker_cookbook.local.service.protocol.failures import Failure
from tinker_cookbook.local.service.protocol.json_body import JsonObject

__all__ = ["Answer", "ChatAnswer", "ChatContext", "CompletionAnswer", "WriterAnswer"]


class Answer(Protocol):
    """Builds the answer to one request, at once or token by token."""

    def whole(self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]) -> JsonObject:
        """Return the response object of a request without streaming."""
        ...

    def opening(self, specs: Sequence[SampleSpec]) -> Iterator[JsonObject]:
        """Yield the events before the first token."""
        ...

    def take(self, drawn: Drawn) -> Iterator[JsonObject]:
        """Yield the events of a token; none while a mark or character is incomplete."""
        ...

    def closing(
        self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]
    ) -> Iterator[JsonObject]:
        """Yield the events after the last token."""
        ...

    def frame(self, event: JsonObject) -> bytes:
        """Return an event as it is sent."""
        ...

    def failure(self, failure: Failure, /) -> JsonObject:
        """Return the event of an error that ends the stream."""
        ...

    @property
    def last_frame(self) -> bytes:
        """What ends every stream."""
        ...


def _ending(
    specs: Sequence[SampleSpec],
    results: Sequence[SampleResult],
    *,
    reason: FinishReason = "stop",
    stop_text: str | None = None,
    wants_none: bool = False,
) -> Ending:
    sampled = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
    return Ending(
        reason,
        prompt_tokens=sum(len(spec.prompt) for spec in specs),
        sampled_tokens=0 if wants_none else sampled,
        cached_tokens=sum(result.prompt_cache_hit_tokens for result in results),
        stop_text=stop_text,
    )


class _Answer:
    """What both of OpenAI's older endpoints share: one `Choice` per completion."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        *,
        choice: SamplingChoice,
        end_ids: frozenset[int],
    ) -> None:
        self._codec = codec
        self._asked = choice
        self._end_ids = end_ids
        self._choices: list[Choice] = []
        self._reader: Callable[[], ReplyReader | None] = lambda: None
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def _text_before(self, number: int) -> Sequence[int]:
        """Return the last tokens of prompt `number` whose text its completions continue."""
        return ()

    def _new_choice(self, number: int) -> Choice:
        return Choice(
            self._codec,
            end_ids=self._end_ids,
            stops=self._asked.stops,
            reader=self._reader(),
            after=self._text_before(number),
        )

    def _usage(self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]) -> JsonObject:
        return chat_usage(_ending(specs, results, wants_none=self._asked.max_tokens == 0))

    # --- whole ---------------------------------------------------------------------------------

    def whole(self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]) -> JsonObject:
        """Return the response object of a request without streaming."""
        choices: list[JsonObject] = []
        for number, result in enumerate(results):
            for sequence in result.sequences:
                choice = self._new_choice(number)
                # for max_tokens=0 the engine still sampled one token, to score the prompt
                draws = draws_of(sequence)[: self._asked.max_tokens]
                pieces = [piece for drawn in draws for piece in choice.push(drawn)]
                pieces += choice.finish()
                shown = self._show_choice(choice, pieces, result, number)
                shown |= {"index": len(choices)}
                shown |= {"finish_reason": choice.finish_reason(sequence.stop_reason)}
                if self._asked.return_token_ids:
                    shown["token_ids"] = choice.token_ids
                choices.append(shown)
        usage = self._usage(specs, results)
        return self._head | {"object": self.object_name, "choices": choices, "usage": usage}

    def _show_choice(
        self, choice: Choice, pieces: list[Piece], result: SampleResult, number: int
    ) -> JsonObject:
        raise NotImplementedError

    # --- streamed ------------------------------------------------------------------------------

    last_frame = b"data: [DONE]\n\n"

    def frame(self, event: JsonObject) -> bytes:
        """Return a chunk as it is sent."""
        return data_event(event)

    def failure(self, failure: Failure, /) -> JsonObject:
        """Return the chunk of an error that ends the stream."""
        return {"error": describe_error(failure)}

    def opening(self, specs: Sequence[SampleSpec]) -> Iterator[JsonObject]:
        """Yield the chunks before the first token."""
        count = sum(spec.num_samples for spec in specs)
        self._choices = [self._new_choice(index // self._asked.n) for index in range(count)]
        yield from ()

    def take(self, drawn: Drawn) -> Iterator[JsonObject]:
        """Yield the chunks of a token; none while a mark or character is incomplete."""
        choice = self._choices[drawn.index]
        pieces = choice.push(drawn)
        yield from self._show_pieces(drawn.index, choice, pieces, token_ids=[drawn.token])

    def closing(
        self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]
    ) -> Iterator[JsonObject]:
        """Yield the chunks after the last token: text that was held back, finish reasons, usage."""
        sequences = [sequence for result in results for sequence in result.sequences]
        for index, (choice, sequence) in enumerate(zip(self._choices, sequences, strict=True)):
            yield from self._show_pieces(index, choice, choice.finish(), token_ids=[])
            reason = choice.finish_reason(sequence.stop_reason)
            yield self._chunk(index, self._last_delta(), finish_reason=reason)
        if self._asked.include_usage:
            usage = self._usage(specs, results)
            yield self._head | {"object": self.chunk_name, "choices": [], "usage": usage}

    def _show_pieces(
        self, index: int, choice: Choice, pieces: list[Piece], *, token_ids: list[int]
    ) -> Iterator[JsonObject]:
        entries = choice.take_entries() if self._asked.top_logprobs is not None else []
        wants_ids = self._asked.return_token_ids and token_ids
        if not pieces and (entries or wants_ids):
            pieces = [Piece("content")]
        for number, piece in enumerate(pieces):
            shown = self._delta(choice, piece)
            if number == 0 and self._asked.top_logprobs is not None:
                shown["logprobs"] = self._logprobs(choice, entries)
            if number == 0 and wants_ids:
                shown["token_ids"] = token_ids
            yield self._chunk(index, shown)

    def _chunk(
        self, index: int, shown: JsonObject, *, finish_reason: str | None = None
    ) -> JsonObject:
        shown = {"index": index, "logprobs": None, "finish_reason": finish_reason} | shown
        return self._head | {"object": self.chunk_name, "choices": [shown]}

    def _delta(self, choice: Choice, piece: Piece) -> JsonObject:
        raise NotImplementedError

    def _last_delta(self) -> JsonObject:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, entries: Sequence[LogprobEntry]) -> Mapping[str, object]:
        raise NotImplementedError


@dataclass(frozen=True)
class ChatContext:
    """A chat request, and what its rendered prompt tells about the reply."""

    model: str
    """Name of the model for the client."""
    codec: TextCodec
    chat: ChatRequest
    end_ids: frozenset[int]
    """Tokens that end the completion."""
    starts_in_thinking: bool
    """Whether the prompt ends inside the reasoning."""

    def reader(self) -> ReplyReader:
        """Return a reader that splits a reply into reasoning, content and tool calls."""
        return ReplyReader(
            starts_in_thinking=self.starts_in_thinking,
            tools=self.chat.tools,
            token_marks=self.codec.mark_texts.values(),
        )


class ChatAnswer(_Answer):
    """`chat.completion` and its chunks."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, context: ChatContext) -> None:
        choice = context.chat.sampling
        super().__init__(context.model, context.codec, choice=choice, end_ids=context.end_ids)
        self._reader = context.reader

    def _show_choice(
        self, choice: Choice, pieces: list[Piece], result: SampleResult, number: int
    ) -> JsonObject:
        wants = self._asked.top_logprobs is not None
        return {
            "message": chat_message(pieces),
            "logprobs": self._logprobs(choice, choice.entries) if wants else None,
        }

    def opening(self, specs: Sequence[SampleSpec]) -> Iterator[JsonObject]:
        yield from super().opening(specs)
        for index in range(len(self._choices)):
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def _delta(self, choice: Choice, piece: Piece) -> JsonObject:
        at = choice.next_call_index() if piece.kind == "tool_call" else 0
        return {"delta": chat_delta(piece, at)}

    def _last_delta(self) -> JsonObject:
        return {"delta": {}}

    def _logprobs(self, choice: Choice, entries: Sequence[LogprobEntry]) -> Mapping[str, object]:
        return choice.chat_logprobs(entries)


class WriterAnswer:
    """The answer in a dialect that has a `ReplyWriter`: one completion of a chat."""

    last_frame = b""

    def __init__(
        self,
        writer: ReplyWriter,
        context: ChatContext,
        *,
        failure: Callable[[Failure], JsonObject],
    ) -> None:
        """Begin an answer.

        Args:
            writer: writes the reply in its dialect.
            context: the request and its prompt.
            failure: returns the event of an error that ends the stream.
        """
        self._writer = writer
        self.failure = failure
        self._choice = Choice(
            context.codec,
            end_ids=context.end_ids,
            stops=context.chat.sampling.stops,
            reader=context.reader(),
        )

    def whole(self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]) -> JsonObject:
        """Return the response object."""
        [sequence] = results[0].sequences
        pieces = [piece for drawn in draws_of(sequence) for piece in self._choice.push(drawn)]
        pieces += self._choice.finish()
        return self._writer.whole(pieces, self._ending(specs, results))

    def opening(self, specs: Sequence[SampleSpec]) -> Iterator[JsonObject]:
        """Yield the events before the first token."""
        return self._writer.opening(_ending(specs, []).prompt_tokens)

    def take(self, drawn: Drawn) -> Iterator[JsonObject]:
        """Yield the events of a token."""
        for piece in self._choice.push(drawn):
            yield from self._writer.take(piece)

    def closing(
        self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]
    ) -> Iterator[JsonObject]:
        """Yield the events after the last token."""
        for piece in self._choice.finish():
            yield from self._writer.take(piece)
        yield from self._writer.closing(self._ending(specs, results))

    def frame(self, event: JsonObject) -> bytes:
        """Return an event as it is sent."""
        return named_event(event)

    def _ending(self, specs: Sequence[SampleSpec], results: Sequence[SampleResult]) -> Ending:
        reason = self._choice.finish_reason(results[0].sequences[0].stop_reason)
        return _ending(specs, results, reason=reason, stop_text=self._choice.stop_text)


class CompletionAnswer(_Answer):
    """`text_completion`, whole or in chunks with the same name."""

    object_name, chunk_name, id_prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        *,
        choice: SamplingChoice,
        end_ids: frozenset[int],
        prompts: Sequence[Sequence[int]],
        echo: bool,
    ) -> None:
        """With `echo`, each prompt is shown at the start of its completions."""
        super().__init__(model, codec, choice=choice, end_ids=end_ids)
        self._prompts = prompts
        self._echo = echo

    def _text_before(self, number: int) -> Sequence[int]:
        return self._codec.text_before(self._prompts[number])

    def _show_choice(
        self, choice: Choice, pieces: list[Piece], result: SampleResult, number: int
    ) -> JsonObject:
        text = join_texts(pieces, "content")
        wants = self._asked.top_logprobs is not None
        logprobs = self._logprobs(choice, choice.entries) if wants else None
        if self._echo:
            prompt = self._prompts[number]
            shown = self._codec.decode(prompt)
            text = shown + text
            if wants:
                # Programs that score a prompt expect one entry per sampled token behind it.
                sampled = choice.entries + choice.end_entries
                own = choice.completion_logprobs(sampled, offset=len(shown))
                scored = _prompt_logprobs(self._codec, prompt, result)
                logprobs = {key: scored[key] + own[key] for key in own}
        return {"text": text, "logprobs": logprobs}

    def _delta(self, choice: Choice, piece: Piece) -> JsonObject:
        return {"text": piece.text}

    def _last_delta(self) -> JsonObject:
        return {"text": ""}

    def _logprobs(self, choice: Choice, entries: Sequence[LogprobEntry]) -> Mapping[str, object]:
        return choice.completion_logprobs(entries)


def _prompt_logprobs(
    codec: TextCodec, prompt: Sequence[int], result: SampleResult
) -> dict[str, list[object]]:
    """Return the `logprobs` object of a prompt. The first token has no logprob."""
    texts = [codec.token_text(token) for token in prompt]
    stream, offsets, length = TextStream(codec, hide_control=False), [], 0
    for token in prompt:
        offsets.append(length)
        length += len(stream.push(token))
    logprobs: list[float | None] = [None] * len(prompt)
    if result.prompt_logprobs is not None:
        logprobs[1:] = result.prompt_logprobs[1:].tolist()
    top: list[dict[str, float] | None] = [None] * len(prompt)
    ranked = result.topk_prompt_logprobs
    if ranked is not None:
        for index in range(1, len(prompt)):
            row = zip(
                ranked.token_ids[index].tolist(), ranked.logprobs[index].tolist(), strict=True
            )
            top[index] = {codec.token_text(token): logprob for token, logprob in row}
    return {
        "tokens": [*texts],
        "token_logprobs": [*logprobs],
        "top_logprobs": [*top],
        "text_offset": [*offsets],
    }
