"""Messages of the OpenAI chat API -> messages as chat templates expect them, and their images."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.reply import split_reasoning
from tinker_cookbook.local.service.protocol.json_body import JsonObject, check_depth, show_value
from tinker_cookbook.local.service.protocol.typed_body import AtMost
from tinker_cookbook.replies.json_source import load_json

__all__ = ["MAX_CALLS", "ChatMessage", "Picture", "show_message"]

MAX_TEXT = 16 * 2**20
MAX_CALLS = 1024
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
_OTHER_ROLES = {"developer": "system", "function": "tool"}
"""Roles that are read as another role, as in files of training data."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_REASONING_LISTS = ("reasoning_details", "thinking_blocks")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text -> the key of the text."""
_IMAGE_PARTS = ("image_url", "input_image")
_IMAGE_FORMATS = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg"}


@dataclass(kw_only=True)  # not frozen: long chats are built faster
class ChatMessage:
    """A message as clients send it."""

    role: Role
    content: object = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[object], AtMost(MAX_CALLS)] = field(default_factory=list)
    function_call: object = None
    reasoning_content: object = None
    reasoning: object = None
    thinking: object = None
    reasoning_details: object = None
    thinking_blocks: object = None


@dataclass(frozen=True)
class Picture:
    """An image of a message."""

    data: bytes
    """Content of the image file."""
    format: str
    """`png` or `jpeg`."""


def show_message(message: ChatMessage, where: str, pictures: list[Picture]) -> JsonObject:
    """Return a message as templates expect it, and add its images to `pictures`.

    Its content is a text, or a list of parts if it has an image.

    Raises:
        UserError: the message names the field and the value.
    """
    role = message.role
    text = _content(
        message.content,
        f"{where}.content",
        optional=role == "assistant",
        pictures=None if role == "assistant" else pictures,
    )
    shown: JsonObject = {"role": _OTHER_ROLES.get(role, role), "content": text}
    if message.name is not None:
        shown["name"] = message.name
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if role != "assistant":
        return shown
    reasoning, shown["content"] = _reasoning(message, str(text), where)
    if reasoning is not None:
        shown["reasoning_content"] = reasoning
    if message.tool_calls:
        shown["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    elif message.function_call is not None:
        call = {"function": message.function_call}
        shown["tool_calls"] = [_tool_call(call, f"{where}.function_call")]
    return shown


def _reasoning(message: ChatMessage, text: str, where: str) -> tuple[str | None, str]:
    """Return a reply's reasoning, under any of its names, and the reply's text without it."""
    for name in _REASONING:
        value = getattr(message, name)
        if value is not None:
            return str(_content(value, f"{where}.{name}")), text
    for name in _REASONING_LISTS:
        value = getattr(message, name)
        if value:
            raise UserError(
                f"{where}.{name}={json.dumps(value)[:80]} is not supported here; send the "
                "reasoning as reasoning_content, a text"
            )
    return split_reasoning(text)


def _content(
    value: object, where: str, *, optional: bool = False, pictures: list[Picture] | None = None
) -> str | list[JsonObject]:
    """Return the text of a content, or its parts if `pictures` is given and it has an image."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        parts = [_part(item, f"{where}[{at}]", pictures) for at, item in enumerate(value)]
        if any(part["type"] == "image" for part in parts):
            return parts
        return "".join(str(part["text"]) for part in parts)
    return _text(value, where)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        shown = json.dumps(value)[:80]
        raise UserError(f"{where}={shown} is not accepted; expected a text or parts")
    return value


def _part(value: object, where: str, pictures: list[Picture] | None) -> JsonObject:
    if not isinstance(value, dict):
        raise UserError(f"{where}={show_value(value)} is not a content part; expected an object")
    kind = value.get("type")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is not None:
        return {"type": "text", "text": _text(value.get(key), f"{where}.{key}")}
    if kind in _IMAGE_PARTS and pictures is not None:
        pictures.append(_picture(value.get("image_url"), f"{where}.image_url"))
        return {"type": "image"}
    accepted = "text" if pictures is None else "text or image_url"
    raise UserError(f"{where}.type={str(kind)[:40]!r} is not supported here; use {accepted}")


def _picture(value: object, where: str) -> Picture:
    """Read an image from a data URL. The service downloads nothing."""
    url = value.get("url") if isinstance(value, dict) else value
    head, separator, content = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    kind = _IMAGE_FORMATS.get(head.removeprefix("data:image/"))
    if not separator or kind is None:
        raise UserError(
            f"{where}={str(url)[:60]!r} is not an image in the request; send PNG or JPEG as "
            "data:image/png;base64,..., because the service downloads nothing"
        )
    try:
        return Picture(base64.b64decode(content, validate=True), kind)
    except binascii.Error as error:
        raise UserError(f"{where} is not base64: {error}") from error


def _tool_call(value: object, where: str) -> JsonObject:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}.function is missing or has no name; expected a function call")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    call: JsonObject = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    identity = value.get("id") if isinstance(value, dict) else None
    return call | ({"id": identity} if isinstance(identity, str) else {})


def _arguments(value: object, where: str) -> JsonObject:
    """Return the arguments of a call; a missing, null or empty value gives an empty object."""
    if isinstance(value, str):
        try:
            value = load_json(value) if value.strip() else None
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}={show_value(value)} is not accepted; expected a JSON object")
    check_depth(value, where)
    return value
