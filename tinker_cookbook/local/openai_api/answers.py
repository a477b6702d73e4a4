"""Response objects of both endpoints: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tinker_cookbook.local.engine.types import SampleResult, SampleSpec
from tinker_cookbook.local.openai_api.codec import TextCodec, TextStream
from tinker_cookbook.local.openai_api.reply import Piece, ReplyReader
from tinker_cookbook.local.openai_api.reply_choice import Choice, LogprobEntry, draws_of
from tinker_cookbook.local.openai_api.requests import SamplingChoice
from tinker_cookbook.local.openai_api.sampling import Drawn
from tinker_cookbook.local.service.protocol.json_body import JsonObject

__all__ = ["ChatAnswer", "CompletionAnswer"]


def _usage(
    specs: Sequence[SampleSpec], results: Sequence[SampleResult], *, wants_none: bool
) -> JsonObject:
    prompt = sum(len(spec.prompt) for spec in specs)
    sampled = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
    sampled = 0 if wants_none else sampled
    cached = sum(result.prompt_cache_hit_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class _Answer:
    """What both endpoints share: one `Choice` per completion, filled at once or by a stream."""

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
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def _reader(self) -> ReplyReader | None:
        return None

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
        return _usage(specs, results, wants_none=self._asked.max_tokens == 0)

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

    def opening(self, num_choices: int) -> Iterator[JsonObject]:
        """Yield the chunks before the first token."""
        self._choices = [self._new_choice(index // self._asked.n) for index in range(num_choices)]
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


class ChatAnswer(_Answer):
    """`chat.completion` and its chunks."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        model: str,
        codec: TextCodec,
        *,
        choice: SamplingChoice,
        end_ids: frozenset[int],
        tools: Sequence[Mapping[str, object]],
        starts_in_thinking: bool,
    ) -> None:
        super().__init__(model, codec, choice=choice, end_ids=end_ids)
        self._tools = tools
        self._starts_in_thinking = starts_in_thinking

    def _reader(self) -> ReplyReader:
        return ReplyReader(
            starts_in_thinking=self._starts_in_thinking,
            tools=self._tools,
            token_marks=self._codec.mark_texts.values(),
        )

    def _show_choice(
        self, choice: Choice, pieces: list[Piece], result: SampleResult, number: int
    ) -> JsonObject:
        calls = [piece.call for piece in pieces if piece.kind == "tool_call"]
        content = _join(pieces, "content")
        message: JsonObject = {"role": "assistant", "content": content, "refusal": None}
        reasoning = _join(pieces, "reasoning")
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"tool_calls": calls, "content": content or None}
        wants = self._asked.top_logprobs is not None
        return {
            "message": message,
            "logprobs": self._logprobs(choice, choice.entries) if wants else None,
        }

    def opening(self, num_choices: int) -> Iterator[JsonObject]:
        yield from super().opening(num_choices)
        for index in range(num_choices):
            yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def _delta(self, choice: Choice, piece: Piece) -> JsonObject:
        if piece.kind == "reasoning":
            return {"delta": {"reasoning_content": piece.text}}
        if piece.kind == "tool_call":
            call = {"index": choice.next_call_index()} | piece.call
            return {"delta": {"tool_calls": [call]}}
        return {"delta": {"content": piece.text}}

    def _last_delta(self) -> JsonObject:
        return {"delta": {}}

    def _logprobs(self, choice: Choice, entries: Sequence[LogprobEntry]) -> Mapping[str, object]:
        return choice.chat_logprobs(entries)


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
        text = _join(pieces, "content")
        wants = self._asked.top_logprobs is not None
        logprobs = self._logprobs(choice, choice.entries) if wants else None
        if self._echo:
            prompt = self._prompts[number]
            shown = self._codec.decode(prompt)
            text = shown + text
            if wants:
                own = choice.completion_logprobs(choice.entries, offset=len(shown))
                scored = _prompt_logprobs(self._codec, prompt, result)
                logprobs = {key: scored[key] + own[key] for key in own}
        return {"text": text, "logprobs": logprobs}

    def _delta(self, choice: Choice, piece: Piece) -> JsonObject:
        return {"text": piece.text}

    def _last_delta(self) -> JsonObject:
        return {"text": ""}

    def _logprobs(self, choice: Choice, entries: Sequence[LogprobEntry]) -> Mapping[str, object]:
        return choice.completion_logprobs(entries)


def _join(pieces: Iterable[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


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
