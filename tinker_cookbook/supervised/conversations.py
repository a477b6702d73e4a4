"""One row of training data: from JSON or a table to the messages that a renderer takes.

`shapes` splits a row into messages, tools or plain text; this module reads the messages of all
shapes. A message has `role` and `content`, and may have `tool_calls`, `tool_call_id`, `name`,
`weight`, `trainable` and `reasoning_content`; content is a string or a list of parts. Keys of the
row that its shape does not use are ignored and reported. Unknown keys of a message are refused,
because they may contain something that was meant to be trained. A key whose value is null counts as
absent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from tinker_cookbook.renderers import Message, ToolSpec
from tinker_cookbook.renderers.markup import remaining_markup, structure_reply_markup
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import ConversationError, json_type, shown
from tinker_cookbook.supervised.shapes import RowParts, fail_unknown_shape, shape_of
from tinker_cookbook.supervised.tool_fields import ToolReader

__all__ = [
    "NOTE_CONVERTED",
    "NOTE_MOVED",
    "ROLES",
    "Conversation",
    "ConversationError",
    "MarkupMode",
    "SourceRow",
    "parse_row",
]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"developer": "system", "function": "tool"}
"""Roles of other formats and the roles they are read as; reports count them."""
_MEANT_ROLES = {
    **dict.fromkeys(("human", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "model", "ai", "AI", "chatbot", "Assistant", "chatgpt"), "assistant"),
    **dict.fromkeys(("observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("System", "instructions"), "system"),
}

MarkupMode = Literal["convert", "refuse", "keep"]
"""What to do with `<think>` and `<tool_call>` in the text of a reply."""

NOTE_CONVERTED = "<think> or <tool_call> in a reply's text became reasoning or a call"

NOTE_MOVED = "reasoning follows text in a reply: formats with one block write it all in front"

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_MESSAGE_KEYS = (
    "role",
    "content",
    "tool_calls",
    "unparsed_tool_calls",
    "weight",
    "trainable",
    "tool_call_id",
    "name",
    *_REASONING_KEYS,
)
_SILENT_MESSAGE_KEYS = ("function_call", "refusal", "annotations", "audio", "id", "object", "type")
_PART_KEYS = {
    "text": ("text",),
    "thinking": ("thinking",),
    "image": ("image",),
    "image_url": ("image_url",),
    "audio": ("audio", "format", "num_frames", "sample_rate"),
}
_OTHER_PARTS = {
    "input_text": ("text", "text"),
    "output_text": ("text", "text"),
    "refusal": ("text", "refusal"),
    "input_image": ("image_url", "image_url"),
}
"""Part types of other interfaces, with the type they are read as and the key of their value."""
_PART_EXTRAS = ("cache_control", "annotations", "logprobs", "signature", "detail", "index", "id")
"""Keys of a part that contain nothing to train."""
_MARKUP_SIGNS = ("<think", "</think", "<tool_call", "</tool_call", "[tool_calls]")


@dataclass(frozen=True)
class SourceRow:
    """A row as its source contains it, not parsed yet."""

    where: str
    """Name of the row in errors, e.g. `chat.jsonl:12`."""
    value: bytes | JsonObject
    """The JSON text of a row, or the row of a table."""
    folder: str | None = None
    """Base folder of relative image and audio paths; None leaves them unchanged."""
    problem: str | None = None
    """Why a row of a table is invalid (too few fields ...); None if it is valid."""


@dataclass(frozen=True)
class Conversation:
    """A valid row."""

    messages: list[Message]
    tools: list[ToolSpec] = field(default_factory=list)
    text: str | None = None
    """Plain text, trained whole; `messages` is then empty."""
    weightless: frozenset[int] = frozenset()
    """Indices of messages with `weight: 0`, which are never trained."""
    num_context: int = 0
    """Number of first messages that are a prompt, whose replies are not trained."""
    shape: str = "messages"
    notes: Counter[str] = field(default_factory=Counter)
    """Conversions made while reading the row, with their number."""
    unused: tuple[str, ...] = ()
    """Keys of the row that its shape does not read."""


def parse_row(row: SourceRow, markup: MarkupMode = "convert") -> Conversation:
    """Read one row of any shape.

    Args:
        markup: convert turns markup in the text of replies into reasoning and calls; refuse refuses
            the row; keep trains it as text.

    Raises:
        ConversationError: naming the row, the field and its value.
    """
    return _RowParser(row, markup).conversation()


def _without_nulls(value: Any) -> Any:
    """Return a row of a table without the null members that its columns add to every object."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


class _RowParser(ToolReader):
    """Reads one row."""

    def __init__(self, row: SourceRow, markup: MarkupMode) -> None:
        super().__init__(row.where)
        self.row = row
        self.markup = markup

    def conversation(self) -> Conversation:
        value = self.value()
        shape = shape_of(value)
        if shape is None:
            fail_unknown_shape(value, self)
        parts = shape.read(value, self)
        messages = [self.message(message, at) for at, message in parts.messages]
        tools = self.tools(parts.tools, parts.tools_at)
        places = [at for at, _ in parts.messages]
        return Conversation(
            [self.structured(m, at, tools) for m, at in zip(messages, places, strict=True)],
            tools,
            text=parts.text,
            weightless=self.weightless(parts),
            num_context=parts.num_context,
            shape=shape.name,
            notes=self.notes,
            unused=tuple(key for key in value if key not in shape.keys and value[key] is not None),
        )

    def value(self) -> JsonObject:
        if self.row.problem is not None:
            raise ConversationError(f"{self.where}: {self.row.problem}", "not a row")
        value: object = self.row.value
        value = self.decoded(value) if isinstance(value, bytes) else _without_nulls(value)
        if not isinstance(value, dict):
            self.fail(
                f"the row is {json_type(value)}",
                'use an object with "messages" on every line',
                kind="not an object",
            )
        return value

    def weightless(self, parts: RowParts) -> frozenset[int]:
        """Return the indices of the messages with `weight: 0`."""
        found = []
        for i, (at, message) in enumerate(parts.messages):
            weight = message.get("weight")
            if weight is None:
                continue
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or weight not in (0, 1)
            ):
                self.fail(f"weight is {shown(weight)}", "use 0 or 1", kind="weight", at=at)
            if weight == 0:
                found.append(i)
            elif message.get("role") != "assistant":
                self.fail(
                    f"weight is 1 in a {message.get('role')} message",
                    "only replies have weight 1; for other roles use train_on_what",
                    kind="weight",
                    at=at,
                )
        if found:
            self.notes["weight 0: the message is not trained"] += len(found)
        return frozenset(found)

    def structured(self, message: Message, at: str, tools: list[ToolSpec]) -> Message:
        """Return the message with the markup in its text converted to reasoning and calls, if
        requested."""
        if message["role"] != "assistant" or not _has_markup(message):
            return message
        if self.markup == "refuse":
            self.refuse_markup(message, at)
        if self.markup == "convert":
            message, count = structure_reply_markup(message, tools)
            if count:
                self.notes[NOTE_CONVERTED] += count
                self.check_not_empty(message, at)  # pyright: ignore[reportArgumentType]
                if _thinks_after_text(message):
                    self.notes[NOTE_MOVED] += 1
        if _has_markup(message) and remaining_markup(message):
            self.notes["<think> or <tool_call> stays text in a reply, trained as letters"] += 1
        return message

    def refuse_markup(self, message: Message, at: str) -> None:
        if tags := remaining_markup(message):
            self.fail(
                f"{tags[0]} is in the text of a reply",
                "write reasoning_content or tool_calls, or use markup=convert",
                kind="markup",
                at=at,
            )

    def decoded(self, line: bytes) -> object:
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.fail(
                f"byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8",
                "save the file as UTF-8",
                kind="not UTF-8",
            )
        except json.JSONDecodeError as error:
            near = shown(error.doc[max(0, error.pos - 20) : error.pos + 20])
            problem = error.msg.removesuffix(" starting at")
            self.fail(
                f"not JSON: {problem} at character {error.pos + 1}, near {near}",
                "fix the object" if b"\n" in line else "write one JSON object per line",
                kind="not JSON",
            )
        except (RecursionError, ValueError) as error:
            self.fail(f"not readable JSON: {error}", "simplify the row", kind="not JSON")
        if b"\\ud" in line or b"\\uD" in line:
            self.check_surrogates(value)
        return value

    def check_surrogates(self, value: object) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(
                f"\\u{ord(error.object[error.start]):04x} is half of a surrogate pair",
                "write both halves, or the character itself in UTF-8",
                kind="not UTF-8",
            )

    def message(self, value: object, at: str) -> Message:
        if not isinstance(value, dict):
            self.fail_type(value, "an object with role and content", at)
        if _is_plain(value):
            return value  # pyright: ignore[reportReturnType]
        value = self.without_other_fields(value, at)
        self.check_keys(value, _MESSAGE_KEYS, at)
        role = value.get("role")
        if role not in ROLES:
            self.fail_role(role, at)
        message: JsonObject = {"role": role, "content": self.content(value, at)}
        for key, read in self.optional_fields().items():
            if value.get(key) is not None:
                message[key] = read(value[key], f"{at}.{key}")
        if role in ("user", "assistant"):
            self.check_not_empty(message, at)
        return message  # pyright: ignore[reportReturnType]

    def without_other_fields(self, value: JsonObject, at: str) -> JsonObject:
        """Return a message with the fields of other interfaces converted to ours."""
        role = value.get("role")
        if isinstance(role, str) and role in OTHER_ROLES:
            self.notes[f"role {role} is read as {OTHER_ROLES[role]}"] += 1
            value = value | {"role": OTHER_ROLES[role]}
        others = {key: value[key] for key in _SILENT_MESSAGE_KEYS if value.get(key)}
        value = {key: item for key, item in value.items() if key not in _SILENT_MESSAGE_KEYS}
        call = self.from_json_text(others.pop("function_call", None), f"{at}.function_call")
        if call is not None:
            self.notes["function_call is read as one of tool_calls"] += 1
            value["tool_calls"] = [{"function": call}]
        refusal = others.pop("refusal", None)
        if refusal is not None and not value.get("content"):
            self.notes["refusal is read as the reply's content"] += 1
            value["content"] = refusal
        for key in ("annotations", "object", "type", "id"):
            others.pop(key, None)
        return value | others

    def optional_fields(self) -> dict[str, Callable[[object, str], object]]:
        return {
            "tool_calls": self.tool_calls,
            "unparsed_tool_calls": self.unparsed_tool_calls,
            "trainable": self.boolean,
            "tool_call_id": self.string,
            "name": self.string,
        }

    def fail_role(self, role: object, at: str) -> NoReturn:
        if role is None:
            problem = "role is missing"
        elif not isinstance(role, str):
            self.fail_type(role, f"one of {', '.join(ROLES)}", f"{at}.role")
        else:
            problem = f"role {shown(role)} is unknown"
        meant = _MEANT_ROLES.get(str(role))
        hint = f"; did you mean {meant!r}?" if meant else ""
        accepted = f"use one of {', '.join(ROLES)}{hint}"
        self.fail(problem, accepted, kind="unknown role", at=at)

    def check_not_empty(self, message: JsonObject, at: str) -> None:
        content = message["content"]
        if isinstance(content, str):
            empty = not content.strip()
        else:
            empty = not any(part["type"] in ("image", "audio") or _text(part) for part in content)
        if empty and not message.get("tool_calls") and not message.get("unparsed_tool_calls"):
            self.fail(
                f"content of the {message['role']} message is empty",
                "write its text or remove the row",
                kind="empty message",
                at=at,
            )

    def content(self, message: JsonObject, at: str) -> str | list[JsonObject]:
        content = message.get("content")
        reasoning_key = next((k for k in _REASONING_KEYS if message.get(k) is not None), None)
        if content is None:
            if "content" not in message and not message.get("tool_calls") and not reasoning_key:
                self.fail(
                    "content is missing",
                    "use a string or a list of parts",
                    kind="empty message",
                    at=at,
                )
            content = ""
        if isinstance(content, list):
            content = [self.part(part, f"{at}.content[{i}]") for i, part in enumerate(content)]
        elif not isinstance(content, str):
            self.fail_type(content, "a string or a list of parts", f"{at}.content")
        if reasoning_key is None:
            return content
        return self.with_reasoning(message, reasoning_key, content, at)

    def with_reasoning(
        self, message: JsonObject, key: str, content: str | list[JsonObject], at: str
    ) -> str | list[JsonObject]:
        reasoning = self.string(message[key], f"{at}.{key}")
        if not reasoning:
            return content
        if message["role"] != "assistant":
            self.fail(
                f"{key} is in a {message['role']} message",
                "only assistant messages have reasoning",
                kind="unknown key",
                at=at,
            )
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        thinking = {"type": "thinking", "thinking": reasoning}
        return [thinking, *(part for part in text if part.get("text") != "")]

    def part(self, value: object, at: str) -> JsonObject:
        if not isinstance(value, dict):
            self.fail_type(value, "an object with type", at)
        kind, present = self.known_part(value, at)
        self.check_keys(present, ("type", *_PART_KEYS[kind]), at, _part_hints(kind))
        if kind in ("text", "thinking"):
            return {"type": kind, kind: self.string(present.get(kind), f"{at}.{kind}")}
        item = present.get(kind)
        if kind == "image_url" and isinstance(item, dict):
            item = item.get("url")
        name = "image" if kind == "image_url" else kind
        extra = {key: present[key] for key in _PART_KEYS[kind][1:] if key in present}
        return {"type": name, name: self.media(item, f"{at}.{kind}"), **extra}

    def known_part(self, value: JsonObject, at: str) -> tuple[str, JsonObject]:
        """Return the type of a part and its keys, with those of other interfaces converted to
        ours."""
        kind = value.get("type")
        present = {key: item for key, item in value.items() if item is not None}
        for key in _PART_EXTRAS:
            if present.pop(key, None):
                self.notes[f"{key} of a content part is not used"] += 1
        if isinstance(kind, str) and kind in _OTHER_PARTS:
            self.notes[f"content of type {kind} is read as {_OTHER_PARTS[kind][0]}"] += 1
            kind, key = _OTHER_PARTS[kind]
            present[kind] = present.pop(key, None)
        if not isinstance(kind, str) or kind not in _PART_KEYS:
            hint = "; write calls as tool_calls" if kind == "tool_use" else ""
            self.fail(
                f"type {shown(kind)} of a content part is unknown",
                f"use {', '.join(_PART_KEYS)}{hint}",
                kind="unknown content part",
                at=at,
            )
        return kind, present

    def media(self, value: object, at: str) -> object:
        """Return a path, URL or data URI; rows of a dataset may contain decoded images instead."""
        if value is None or isinstance(value, bool | int | float | list | dict):
            self.fail_type(value, "a path, a URL or a data URI", at)
        if not isinstance(value, str) or self.row.folder is None:
            return value
        if value.startswith("data:") or "://" in value:
            return value
        return str(Path(self.row.folder) / value)


def _is_plain(message: JsonObject) -> bool:
    """Whether a message has only a known role and text, as nearly all messages do."""
    content = message.get("content")
    return (
        len(message) == 2
        and message.get("role") in ROLES
        and isinstance(content, str)
        and bool(content.strip())
    )


def _has_markup(message: Message) -> bool:
    """Whether a text of the message may contain markup; a cheap check, because every reply needs
    it."""
    content: Any = message["content"]
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    return any(sign in text for text in map(str.lower, texts) for sign in _MARKUP_SIGNS)


def _thinks_after_text(message: Message) -> bool:
    content: Any = message["content"]
    kinds = [] if isinstance(content, str) else [part["type"] for part in content]
    return "text" in kinds and "thinking" in kinds[kinds.index("text") :]


def _part_hints(kind: str) -> dict[str, str]:
    """Advice about keys that other formats give to a part."""
    return dict.fromkeys(("value", "content", "data", "url"), f"rename it to {kind!r}")


def _text(part: JsonObject) -> str:
    return str(part.get("text") or part.get("thinking") or "").strip()
