"""A call of an agent: its request, read from a chat body, and what it sees of the reply."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from tinker_cookbook.capture.rollout import Reply
from tinker_cookbook.capture.samplers import SamplingWishes
from tinker_cookbook.dialects.pieces import Ending, Piece, new_id
from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.tool_calls import openai_call
from tinker_cookbook.renderers.types import Message, ToolSpec
from tinker_cookbook.third_party.openai_compat import (
    openai_messages_to_tinker,
    openai_tools_to_tinker,
)

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["ChatRequest", "read_body", "read_chat_request", "reply_pieces"]

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
}
"""Fields that would change the reply and are not implemented -> the values that are accepted."""


class _StreamOptions(pydantic.BaseModel):
    include_usage: bool = False


class _Body(pydantic.BaseModel):
    """The fields that are used. Others are ignored, except those of `_NEUTRAL`."""

    messages: Annotated[list[dict[str, Any]], pydantic.Field(min_length=1)]
    model: str = ""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, pydantic.Field(ge=1)] | None = None
    temperature: Annotated[float, pydantic.Field(ge=0)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A chat completions request."""

    messages: list[Message]
    tools: list[ToolSpec]
    stops: list[str]
    wishes: SamplingWishes
    model: str
    stream: bool
    include_usage: bool


def read_body(body: bytes) -> dict[str, Any]:
    """Return the object that a body is.

    Raises:
        DataFormatError: it is not a JSON object.
    """
    try:
        given = json.loads(body)
    except ValueError as error:
        raise DataFormatError(f"the body is not JSON: {error}.") from error
    if not isinstance(given, dict):
        raise DataFormatError("the body is not a JSON object; send an object.")
    return given


def read_chat_request(given: Mapping[str, Any], *, free_tool_choice: bool = False) -> ChatRequest:
    """Read the body of a request.

    Args:
        given: The body.
        free_tool_choice: Accept a request that forces a tool call, although nothing forces it.

    Raises:
        DataFormatError: the message names the field.
    """
    try:
        read = _Body.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise DataFormatError(f"{where}: {first['msg']}.") from error
    for name, accepted in _NEUTRAL.items():
        if free_tool_choice and name == "tool_choice":
            continue
        if given.get(name) is not None and given[name] not in accepted:
            raise DataFormatError(
                f"{name}={json.dumps(given[name])[:80]} is not supported here; leave it out, or "
                f"use {json.dumps(accepted[0])}."
            )
    stops = [read.stop] if isinstance(read.stop, str) else list(read.stop or ())
    tools = [] if read.tool_choice == "none" else openai_tools_to_tinker(read.tools or ())
    limit = read.max_completion_tokens or read.max_tokens
    return ChatRequest(
        messages=openai_messages_to_tinker(read.messages),
        tools=tools,
        stops=[stop for stop in stops if stop],
        wishes=SamplingWishes(limit, read.temperature, read.top_p, read.top_k, read.seed),
        model=read.model,
        stream=bool(read.stream),
        include_usage=bool(read.stream_options and read.stream_options.include_usage),
    )


def reply_pieces(
    reply: Reply, request: ChatRequest, renderer: Renderer
) -> tuple[list[Piece], Ending]:
    """Return what an agent sees of a reply, and how it ended.

    Calls that cannot be read are text, and so are all calls if the request has no tools. The text
    ends before a stop text of the request.
    """
    message = reply.message
    reasoning, content = split_reasoning(message)
    text = content if isinstance(content, str) else _join_texts(content)
    calls = [dict(openai_call(call, as_text=True)) for call in message.get("tool_calls") or ()]
    if calls and not request.tools:
        text, calls = _without_end(reply.call.tokens, renderer), []
    text += "".join(call.raw_text for call in message.get("unparsed_tool_calls") or ())
    ends = [(at, stop) for stop in request.stops if (at := text.find(stop)) >= 0]
    stop_text = None
    if ends:
        at, stop_text = min(ends)
        text = text[:at]
    pieces = [Piece("reasoning", reasoning)] if reasoning else []
    if text:
        pieces.append(Piece("content", text))
    for call in calls:
        call.setdefault("id", new_id("call"))
        pieces.append(Piece("tool_call", call=call))
    is_cut = reply.call.stop_reason == "length"
    ending = Ending(
        "length" if is_cut else "tool_calls" if calls else "stop",
        prompt_tokens=reply.prompt_tokens,
        sampled_tokens=len(reply.call.tokens),
        stop_text=stop_text,
    )
    return pieces, ending


def _join_texts(content: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _without_end(tokens: Sequence[int], renderer: Renderer) -> str:
    """Return the text of a reply without its stop token."""
    stops = renderer.get_stop_sequences()
    kept = tokens[:-1] if tokens and tokens[-1] in stops else tokens
    return str(renderer.tokenizer.decode(list(kept)))
