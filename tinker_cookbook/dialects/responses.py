"""OpenAI's Responses API: a request as the body of a chat request, a reply as output items.

The whole conversation is sent with every request, as input items; nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tinker_cookbook.dialects.pieces import Ending, Piece, new_id
from tinker_cookbook.dialects.reading import (
    keep,
    read_list,
    read_object,
    read_text,
    refuse_all_but,
    refuse_unknown,
    shown,
)
from tinker_cookbook.exceptions import DataFormatError

__all__ = ["ResponseWriter", "read_responses_request"]

_SAME = {
    "model": "model",
    "max_output_tokens": "max_completion_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stream": "stream",
    "user": "user",
    "seed": "seed",
}
"""Fields with another name or the same one in a chat request."""
_READ = ("input", "instructions", "tools", "tool_choice", "text", "reasoning")
_INERT = (
    *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "include"),
    *("prompt_cache_retention", "parallel_tool_calls", "stream_options", "max_tool_calls"),
)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of parts that are text -> the key of the text."""


def read_responses_request(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a chat request that asks for the same.

    Raises:
        DataFormatError: the message names the field.
    """
    refuse_unknown(values, (*_SAME, *_READ, *_INERT, *_NEUTRAL))
    if values.get("previous_response_id") is not None:
        raise DataFormatError(
            "previous_response_id is not available here, because responses are not stored; send "
            "the previous turns as input items"
        )
    refuse_all_but(values, _NEUTRAL)
    body = keep(values, _SAME)
    messages = _read_input(values.get("input"))
    instructions = values.get("instructions")
    if instructions:
        text = read_text(instructions, "instructions")
        messages.insert(0, {"role": "system", "content": text})
    body["messages"] = messages
    tools = [
        _read_tool(tool, f"tools[{at}]")
        for at, tool in enumerate(read_list(values.get("tools"), "tools"))
    ]
    if tools:
        body["tools"] = tools
    if values.get("tool_choice") is not None:
        body["tool_choice"] = values["tool_choice"]
    form = read_object(values.get("text") or {}, "text").get("format")
    if form is not None:
        body["response_format"] = _read_format(read_object(form, "text.format"))
    effort = read_object(values.get("reasoning") or {}, "reasoning").get("effort")
    if effort is not None:
        body["reasoning_effort"] = effort
    return body


def _read_format(form: Mapping[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return dict(form)
    return {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}


def _read_input(value: object) -> list[dict[str, Any]]:
    """Return the items as messages; a reply's reasoning, text and calls become one message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None
    items = read_list(value, "input")
    if not items:
        raise DataFormatError("input is empty; give a text or at least one item")
    for at, item in enumerate(items):
        where = f"input[{at}]"
        fields = read_object(item, where)
        part = _read_own(fields, where)
        if part is None:
            turn = None
            messages.append(_read_other(fields, where))
            continue
        if turn is None or (part.get("content") and turn.get("content")):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        for name, read in part.items():
            turn[name] = turn[name] + read if name in turn else read
    return messages


def _read_own(fields: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Return the part of a reply that an item is; None for an item of somebody else."""
    kind = fields.get("type", "message")
    if kind == "message" and fields.get("role") == "assistant":
        parts = _read_parts(fields.get("content"), f"{where}.content")
        return {"content": parts if isinstance(parts, str) else _join(parts, where)}
    if kind == "reasoning":
        blocks = read_list(fields.get("content") or fields.get("summary"), f"{where}.content")
        texts = [read_text(read_object(b, where).get("text"), f"{where}.text") for b in blocks]
        return {"reasoning_content": "".join(texts)}
    if kind != "function_call":
        return None
    function = {
        "name": read_text(fields.get("name"), f"{where}.name"),
        "arguments": read_text(fields.get("arguments"), f"{where}.arguments"),
    }
    return {"tool_calls": [{"id": fields.get("call_id"), "type": "function", "function": function}]}


def _read_other(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = fields.get("type", "message")
    if kind == "function_call_output":
        output = fields.get("output")
        content = output if isinstance(output, str) else _read_parts(output, f"{where}.output")
        call_id = read_text(fields.get("call_id"), f"{where}.call_id")
        return {"role": "tool", "tool_call_id": call_id, "content": content}
    if kind != "message":
        raise DataFormatError(
            f"{where}.type={shown(kind)} is not supported here; use message, reasoning, "
            "function_call or function_call_output"
        )
    role = fields.get("role")
    if role not in ("user", "system", "developer"):
        raise DataFormatError(
            f"{where}.role={shown(role)} is unknown; use user, assistant, system or developer"
        )
    return {"role": role, "content": _read_parts(fields.get("content"), f"{where}.content")}


def _read_parts(value: object, where: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    return [
        _read_part(read_object(part, f"{where}[{at}]"), f"{where}[{at}]")
        for at, part in enumerate(read_list(value, where))
    ]


def _read_part(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = str(fields.get("type"))
    key = _PARTS.get(kind)
    if key is not None:
        return {"type": "text", "text": read_text(fields.get(key), f"{where}.{key}")}
    if kind != "input_image":
        raise DataFormatError(
            f"{where}.type={shown(kind)} is not supported here; use input_text or input_image"
        )
    url = read_text(fields.get("image_url"), f"{where}.image_url")
    return {"type": "image_url", "image_url": {"url": url}}


def _join(parts: Sequence[Mapping[str, Any]], where: str) -> str:
    return "".join(read_text(part.get("text"), f"{where}.content") for part in parts)


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    fields = read_object(tool, where)
    if fields.get("type") != "function":
        raise DataFormatError(
            f"{where}.type={shown(fields.get('type'))} is not supported here; use function"
        )
    names = ("name", "description", "parameters", "strict")
    read_text(fields.get("name"), f"{where}.name")
    return {"type": "function", "function": keep(fields, dict(zip(names, names, strict=True)))}


# ---- replies ----


class ResponseWriter:
    """Writes a response, whole or as a stream."""

    def __init__(self, model: str, request: Mapping[str, Any], reply_id: str | None = None) -> None:
        """Begin a reply.

        Args:
            model: name of the model for the client.
            request: the body of the request, whose settings the response repeats.
            reply_id: identifier of the reply, without the API's prefix; None: a new one.
        """
        self._head = _head(model, request) | {"id": new_id("resp", reply_id)}
        self._items: list[dict[str, Any]] = []
        """The finished items."""
        self._item: dict[str, Any] | None = None
        """The item that is being written."""
        self._text = ""
        """Its text."""
        self._number = 0

    def whole(self, pieces: Sequence[Piece], ending: Ending) -> dict[str, Any]:
        """Return the response."""
        for piece in pieces:
            for _ in self.take(piece):
                pass
        for _ in self._close_item():
            pass
        return self._response(ending)

    def opening(self, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the events before the first item."""
        running = self._head | {"status": "in_progress", "output": [], "usage": None}
        yield self._event("response.created", response=running)
        yield self._event("response.in_progress", response=running)

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece."""
        kind = _ITEM_TYPES[piece.kind]
        if kind == "function_call" or self._item is None or self._item["type"] != kind:
            yield from self._close_item()
            yield from self._open_item(piece)
        delta = piece.text if piece.kind != "tool_call" else piece.call["function"]["arguments"]
        self._text += delta
        yield self._event(f"{_EVENTS[kind]}.delta", **self._place(), delta=delta)

    def closing(self, ending: Ending) -> Iterator[dict[str, Any]]:
        """Yield the events after the last item."""
        yield from self._close_item()
        response = self._response(ending)
        yield self._event(f"response.{response['status']}", response=response)

    def _open_item(self, piece: Piece) -> Iterator[dict[str, Any]]:
        kind = _ITEM_TYPES[piece.kind]
        item: dict[str, Any] = {"type": kind, "id": new_id(_ID_PREFIXES[kind])}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            name = piece.call["function"]["name"]
            item |= {"call_id": piece.call["id"], "name": name, "arguments": ""}
        self._item, self._text = item | {"status": "in_progress"}, ""
        at = len(self._items)
        yield self._event("response.output_item.added", output_index=at, item=dict(self._item))
        if kind != "function_call":
            part = _part(kind, "")
            yield self._event("response.content_part.added", **self._place(), part=part)

    def _close_item(self) -> Iterator[dict[str, Any]]:
        item = self._item
        if item is None:
            return
        kind = item["type"]
        if kind == "function_call":
            done = {"name": item["name"], "arguments": self._text}
            item["arguments"] = self._text
            yield self._event(f"{_EVENTS[kind]}.done", **self._place(), **done)
        else:
            part = _part(kind, self._text)
            item["content"] = [part]
            yield self._event(f"{_EVENTS[kind]}.done", **self._place(), text=self._text)
            yield self._event("response.content_part.done", **self._place(), part=part)
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item = None

    def _place(self) -> dict[str, Any]:
        """Return which item and part an event is about."""
        assert self._item is not None, "events of a part come while its item is written"
        place: dict[str, Any] = {"item_id": self._item["id"], "output_index": len(self._items)}
        if self._item["type"] == "message":
            place["logprobs"] = []
        return place if self._item["type"] == "function_call" else place | {"content_index": 0}

    def _event(self, kind: str, **fields: object) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _response(self, ending: Ending) -> dict[str, Any]:
        is_cut = ending.reason == "length"
        usage = {
            "input_tokens": ending.prompt_tokens,
            "input_tokens_details": {"cached_tokens": ending.cached_tokens},
            "output_tokens": ending.sampled_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": ending.prompt_tokens + ending.sampled_tokens,
        }
        return self._head | {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._items,
            "usage": usage,
        }


_ITEM_TYPES = {"content": "message", "reasoning": "reasoning", "tool_call": "function_call"}
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _head(model: str, request: Mapping[str, Any]) -> dict[str, Any]:
    def given(name: str, default: object) -> object:
        value = request.get(name)
        return default if value is None else value

    return {
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": request.get("instructions"),
        "max_output_tokens": request.get("max_output_tokens"),
        "metadata": given("metadata", {}),
        "parallel_tool_calls": given("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": given("reasoning", {"effort": None, "summary": None}),
        "store": False,
        "temperature": given("temperature", 1.0),
        "text": given("text", {"format": {"type": "text"}}),
        "tool_choice": given("tool_choice", "auto"),
        "tools": given("tools", []),
        "top_p": given("top_p", 1.0),
        "truncation": "disabled",
    }
