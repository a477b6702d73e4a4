"""Anthropic's Messages API: a request as the body of a chat request, a reply as content blocks."""

from __future__ import annotations

import json
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

__all__ = ["MessageWriter", "error_body", "model_body", "read_messages_request"]

_SAME = {
    "model": "model",
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop_sequences": "stop",
    "stream": "stream",
}
"""Fields with another name or the same one in a chat request."""
_READ = ("messages", "system", "tools", "tool_choice", "thinking", "output_config", "output_format")
_INERT = ("metadata", "service_tier", "cache_control", "inference_geo", "betas", "speed")
"""Fields that clients send and that do not change what is sampled here; `metadata.user_id` names
the client."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": ({},),
}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def read_messages_request(
    values: Mapping[str, Any], *, counts_only: bool = False
) -> dict[str, Any]:
    """Return the body of a chat request that asks for the same.

    Args:
        values: the body of a Messages request.
        counts_only: whether it is a request to count tokens, which has no `max_tokens`.

    Raises:
        DataFormatError: the message names the field.
    """
    refuse_unknown(values, (*_SAME, *_READ, *_INERT, *_NEUTRAL))
    refuse_all_but(values, _NEUTRAL)
    if values.get("max_tokens") is None and not counts_only:
        raise DataFormatError("max_tokens is missing; expected the maximum tokens of the reply")
    body = keep(values, _SAME)
    body["messages"] = _read_messages(values)
    tools = [
        _read_tool(tool, f"tools[{at}]")
        for at, tool in enumerate(read_list(values.get("tools"), "tools"))
    ]
    if tools:
        body["tools"] = tools
    choice = values.get("tool_choice")
    if choice is not None:
        body["tool_choice"] = _read_choice(read_object(choice, "tool_choice"))
    thinking = values.get("thinking")
    if thinking is not None:
        is_on = read_object(thinking, "thinking").get("type") != "disabled"
        body["chat_template_kwargs"] = {"enable_thinking": is_on}
    _read_output(values, body)
    user = (values.get("metadata") or {}).get("user_id")
    if isinstance(user, str):
        body["user"] = user
    return body


def _read_output(values: Mapping[str, Any], body: dict[str, Any]) -> None:
    """Read the required format of the reply, under both of its names, and the effort."""
    config = read_object(values.get("output_config") or {}, "output_config")
    given = values.get("output_format") or config.get("format")
    if given is not None:
        form = read_object(given, "output_config.format")
        if form.get("type") != "json_schema":
            raise DataFormatError(
                f"output_config.format.type={shown(form.get('type'))} is not supported here; use "
                "json_schema"
            )
        schema = {"name": "output", "schema": form.get("schema")}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config.get("effort") is not None:
        body["reasoning_effort"] = config["effort"]


def _read_messages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    system = values.get("system")
    if system:
        messages.append({"role": "system", "content": _read_system(system)})
    given = read_list(values.get("messages"), "messages")
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        fields = read_object(message, where)
        role, content = fields.get("role"), fields.get("content")
        if role == "user":
            messages += _read_user(content, f"{where}.content")
        elif role == "assistant":
            messages.append(_read_assistant(content, f"{where}.content"))
        elif role == "system":
            messages.append({"role": "system", "content": _read_system(content)})
        else:
            raise DataFormatError(f"{where}.role={shown(role)} is unknown; use user or assistant")
    if not given:
        raise DataFormatError("messages=[] is empty; give at least one message")
    if messages[-1]["role"] == "assistant":
        raise DataFormatError(
            "messages end with the assistant; the beginning of a reply cannot be given here. End "
            "with a user message"
        )
    return messages


def _read_system(value: object) -> str:
    if isinstance(value, str):
        return value
    blocks = read_list(value, "system")
    return "\n\n".join(
        read_text(read_object(block, f"system[{at}]").get("text"), f"system[{at}].text")
        for at, block in enumerate(blocks)
    )


def _read_user(content: object, where: str) -> list[dict[str, Any]]:
    """Return the results of tools, each as a message, and the rest as a message of the user."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results, parts = [], []
    for at, block in enumerate(read_list(content, where)):
        place = f"{where}[{at}]"
        fields = read_object(block, place)
        if fields.get("type") == "tool_result":
            results.append(_read_result(fields, place))
        else:
            parts.append(_read_part(fields, place))
    return results + ([{"role": "user", "content": parts}] if parts else [])


def _read_result(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = fields.get("content")
    if content is not None and not isinstance(content, str):
        content = [
            _read_part(read_object(block, f"{where}.content[{at}]"), f"{where}.content[{at}]")
            for at, block in enumerate(read_list(content, f"{where}.content"))
        ]
    call_id = read_text(fields.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": content or ""}


def _read_part(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = fields.get("type")
    if kind == "text":
        return {"type": "text", "text": read_text(fields.get("text"), f"{where}.text")}
    if kind != "image":
        raise DataFormatError(
            f"{where}.type={shown(kind)} is not supported here; use text, image or tool_result"
        )
    source = read_object(fields.get("source"), f"{where}.source")
    if source.get("type") == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    else:
        url = read_text(source.get("url"), f"{where}.source.url")
    return {"type": "image_url", "image_url": {"url": url}}


def _read_assistant(content: object, where: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for at, block in enumerate(read_list(content, where)):
        place = f"{where}[{at}]"
        fields = read_object(block, place)
        kind = fields.get("type")
        if kind == "text":
            texts.append(read_text(fields.get("text"), f"{place}.text"))
        elif kind == "thinking":
            thoughts.append(read_text(fields.get("thinking"), f"{place}.thinking"))
        elif kind == "tool_use":
            calls.append(_read_call(fields, place))
        else:
            raise DataFormatError(
                f"{place}.type={shown(kind)} is not supported here; use text, thinking or tool_use"
            )
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _read_call(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = read_object(fields.get("input") or {}, f"{where}.input")
    function = {
        "name": read_text(fields.get("name"), f"{where}.name"),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": fields.get("id"), "type": "function", "function": function}


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    fields = read_object(tool, where)
    if fields.get("type", "custom") != "custom":
        raise DataFormatError(
            f"{where}.type={shown(fields['type'])} is not supported here; declare the tool with "
            "name, description and input_schema"
        )
    function = {"name": read_text(fields.get("name"), f"{where}.name")}
    function |= keep(fields, {"description": "description", "input_schema": "parameters"})
    return {"type": "function", "function": function}


def _read_choice(choice: Mapping[str, Any]) -> object:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    known = {"auto": "auto", "any": "required", "none": "none"}
    if kind not in known:
        raise DataFormatError(
            f"tool_choice.type={shown(kind)} is unknown; use auto, any, tool or none"
        )
    return known[kind]


# ---- replies ----


class MessageWriter:
    """Writes a message, whole or as a stream."""

    def __init__(self, model: str, reply_id: str | None = None) -> None:
        """Begin a reply.

        Args:
            model: name of the model for the client.
            reply_id: identifier of the reply, without the API's prefix; None: a new one.
        """
        self._id = new_id("msg", reply_id)
        self._model = model
        self._num_blocks = 0
        self._open: str | None = None
        """The kind of the block that is being written."""

    def whole(self, pieces: Sequence[Piece], ending: Ending) -> dict[str, Any]:
        """Return the message."""
        return self._message(_blocks(pieces), _usage(ending)) | _stop(ending)

    def opening(self, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the event before the first block."""
        usage = _usage(Ending("stop", prompt_tokens, 0))
        yield {"type": "message_start", "message": self._message([], usage)}

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece."""
        if piece.kind == "tool_call" or self._open != piece.kind:
            yield from self._close_block()
            yield from self._open_block(piece)
        delta = _delta(piece)
        yield {"type": "content_block_delta", "index": self._num_blocks, "delta": delta}

    def closing(self, ending: Ending) -> Iterator[dict[str, Any]]:
        """Yield the events after the last block."""
        yield from self._close_block()
        yield {"type": "message_delta", "delta": _stop(ending), "usage": _usage(ending)}
        yield {"type": "message_stop"}

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _open_block(self, piece: Piece) -> Iterator[dict[str, Any]]:
        self._open = piece.kind
        block = _block(piece) | _EMPTY[piece.kind]
        yield {"type": "content_block_start", "index": self._num_blocks, "content_block": block}

    def _close_block(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        yield {"type": "content_block_stop", "index": self._num_blocks}
        self._num_blocks += 1
        self._open = None


_EMPTY: dict[str, dict[str, Any]] = {
    "content": {"text": ""},
    "reasoning": {"thinking": ""},
    "tool_call": {"input": {}},
}


def _blocks(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return the content blocks; consecutive texts of one kind are one block."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].kind == piece.kind != "tool_call":
            joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return [_block(piece) for piece in joined]


def _block(piece: Piece) -> dict[str, Any]:
    if piece.kind == "content":
        return {"type": "text", "text": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    function = piece.call["function"]
    return {
        "type": "tool_use",
        "id": piece.call["id"],
        "name": function["name"],
        "input": _arguments(function["arguments"]),
    }


def _arguments(text: str) -> object:
    """Return arguments as an object; what a model wrote as something else is kept under a key."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = text
    return value if isinstance(value, dict) else {"arguments": value}


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "content":
        return {"type": "text_delta", "text": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    arguments = json.dumps(_arguments(piece.call["function"]["arguments"]), ensure_ascii=False)
    return {"type": "input_json_delta", "partial_json": arguments}


def _stop(ending: Ending) -> dict[str, Any]:
    if ending.reason == "stop" and ending.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": ending.stop_text}
    return {"stop_reason": _STOP_REASONS[ending.reason], "stop_sequence": None}


def _usage(ending: Ending) -> dict[str, Any]:
    return {
        "input_tokens": ending.prompt_tokens - ending.cached_tokens,
        "cache_read_input_tokens": ending.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": ending.sampled_tokens,
    }


def error_body(status: int, message: str, request_id: str | None = None) -> dict[str, Any]:
    """Return an error as Anthropic's clients expect it."""
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": request_id}


def model_body(model: str) -> dict[str, Any]:
    """Return the description of a model in a list of models."""
    return {
        "type": "model",
        "id": model,
        "display_name": model,
        "created_at": "1970-01-01T00:00:00Z",
    }
