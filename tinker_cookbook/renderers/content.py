"""Reading and converting message content: text, thinking parts, copies for JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.tool_calls import parse_call_json
from tinker_cookbook.renderers.types import (
    Content,
    ContentPart,
    Message,
    ParseFailureKind,
    ParseTermination,
    TextPart,
    ThinkingPart,
    ToolCall,
    UnparsedToolCall,
)
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.replies.pieces import UNTERMINATED_CALL_ERROR

__all__ = [
    "PARSE_FAILURE_DETAIL_MAX_CHARS",
    "UNTERMINATED_TOOL_BLOCK_ERROR",
    "classify_parse_failure",
    "content_to_jsonable",
    "detect_unterminated_tool_block",
    "ensure_list",
    "ensure_text",
    "format_content_as_string",
    "get_text_content",
    "has_thinking",
    "message_to_jsonable",
    "parse_content_blocks",
    "parse_think_blocks",
    "refuse_trained_thinking",
    "remove_thinking",
    "split_reasoning",
]

PARSE_FAILURE_DETAIL_MAX_CHARS = 16384
UNTERMINATED_TOOL_BLOCK_ERROR = UNTERMINATED_CALL_ERROR

_BLOCK = re.compile(r"<think>(.*?)</think>|<tool_call>(.*?)</tool_call>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def ensure_text(content: Content) -> str:
    """Return the text of content that is text only.

    Raises:
        RendererError: if there is anything other than one text part.
    """
    if isinstance(content, str):
        return content
    if len(content) == 1 and content[0]["type"] == "text":
        return content[0]["text"]
    kinds = [part.get("type") for part in content]
    raise RendererError(f"content={kinds} is not text; give a string or exactly one text part.")


def ensure_list(content: Content) -> list[ContentPart]:
    """Return content as parts; a string becomes one text part."""
    if isinstance(content, str):
        return [TextPart(type="text", text=content)]
    return content


def has_thinking(content: Content) -> bool:
    """Whether there is a thinking part, or a `<think>` in a plain string."""
    if isinstance(content, str):
        return "<think>" in content
    return any(part["type"] == "thinking" for part in content)


def remove_thinking(parts: list[ContentPart]) -> list[ContentPart]:
    """Return the parts that are not thinking."""
    return [part for part in parts if part["type"] != "thinking"]


def get_text_content(message: Message) -> str:
    """Return the message's text parts joined, without thinking, images and audio."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def format_content_as_string(content: Content, separator: str = "\n") -> str:
    """Return all parts as one string for people: thinking in tags, images as `<image>`."""
    if isinstance(content, str):
        return content
    return separator.join(_part_as_string(part) for part in content)


def _part_as_string(part: ContentPart) -> str:
    if part["type"] == "text":
        return part["text"]
    if part["type"] == "thinking":
        return f"<think>{part['thinking']}</think>"
    return f"<{part['type']}>"


def split_reasoning(message: Message) -> tuple[str, str]:
    """Return (reasoning, text) of a message whose content is text and thinking.

    A string is not searched for `<think>`: typed text stays text. Convert such strings with
    `parse_think_blocks`.

    Raises:
        RendererError: if there are images or audio clips, which a text format cannot write.
    """
    content = message.get("content")
    reasoning = message.get("reasoning_content") or ""
    if isinstance(content, str):
        return reasoning, content
    if content is None:
        return reasoning, _absent_content(message)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text":
            texts.append(part["text"])  # pyright: ignore[reportGeneralTypeIssues, reportTypedDictNotRequiredAccess]
        elif kind == "thinking":
            reasoning += part["thinking"]  # pyright: ignore[reportGeneralTypeIssues, reportTypedDictNotRequiredAccess]
        else:
            hint = "Use a renderer for a model that accepts it."
            if kind == "image":
                hint = (
                    "For a vision model name a renderer of its images (renderer_name=..., "
                    "--renderer); 'tinker-cookbook render --verify MODEL' finds it. In a program, "
                    "load_renderer(NAME, MODEL) gives it the image processor."
                )
            raise RendererError(
                f"content part type={kind!r} cannot be written here; this format, this role or "
                f"this renderer takes text and thinking only. {hint}"
            )
    return reasoning, "".join(texts)


def refuse_trained_thinking(reasoning: str, index: int) -> None:
    """Raise RendererError if there is reasoning, for formats whose prompt excludes it.

    Args:
        reasoning: the reasoning of a reply that will be trained.
        index: the index of its message.
    """
    if reasoning:
        raise RendererError(
            f"messages[{index}]: a reply with thinking cannot be trained with thinking disabled, "
            "because its prompt excludes it; remove the thinking, or use a renderer of "
            "this model that thinks."
        )


def _absent_content(message: Message) -> str:
    if message.get("tool_calls") or message.get("unparsed_tool_calls"):
        return ""
    raise RendererError(
        f"content is missing in a message of role {message.get('role')!r}; give a string or a "
        "list of parts (only a message with tool_calls may leave it out)."
    )


def content_to_jsonable(content: Content) -> str | list[JsonObject]:
    """Return a copy that `json.dumps` accepts; images and audio in memory become None."""
    if isinstance(content, str):
        return content
    return [
        {key: value if _is_jsonable(value) else None for key, value in part.items()}
        for part in content
    ]


def _is_jsonable(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)


def message_to_jsonable(message: Message) -> JsonObject:
    """Return a copy of the whole message that `json.dumps` accepts."""
    result: JsonObject = dict(message)
    if message.get("content") is not None:
        result["content"] = content_to_jsonable(message["content"])
    for key in ("tool_calls", "unparsed_tool_calls"):
        if key in message:
            result[key] = [
                call.model_dump() if isinstance(call, ToolCall | UnparsedToolCall) else call
                for call in result[key]
            ]
    return result


def parse_think_blocks(content: str) -> list[ContentPart] | None:
    """Split text with `<think>...</think>` into parts; None without a complete block.

    Text is not changed; empty blocks and empty text are omitted.
    """
    if not _THINK.search(content):
        return None
    parts: list[ContentPart] = []
    for index, piece in enumerate(_THINK.split(content)):
        if piece and index % 2:
            parts.append(ThinkingPart(type="thinking", thinking=piece))
        elif piece:
            parts.append(TextPart(type="text", text=piece))
    return parts


def parse_content_blocks(
    content: str,
) -> tuple[list[ContentPart], list[ToolCall | UnparsedToolCall]] | None:
    """Split text with `<think>` and `<tool_call>` blocks into parts and calls.

    For text from datasets. `Renderer.parse_response` works on tokens instead, so it distinguishes
    markers from typed text.

    Returns:
        None without a complete block.
    """
    if not _BLOCK.search(content):
        return None
    parts: list[ContentPart] = []
    calls: list[ToolCall | UnparsedToolCall] = []
    end = 0
    for match in _BLOCK.finditer(content):
        _append_text(parts, content[end : match.start()])
        end = match.end()
        thinking, call = match.groups()
        if call is not None:
            calls.append(parse_call_json(call, match.group()))
        elif thinking:
            parts.append(ThinkingPart(type="thinking", thinking=thinking))
    _append_text(parts, content[end:])
    return parts, calls


def _append_text(parts: list[ContentPart], text: str) -> None:
    if text:
        parts.append(TextPart(type="text", text=text))


def detect_unterminated_tool_block(
    content: str, open_marker: str, close_marker: str
) -> UnparsedToolCall | None:
    """Return the unclosed block at the end of `content`, if there is one."""
    start = content.rfind(open_marker)
    if start < 0 or close_marker in content[start:]:
        return None
    return UnparsedToolCall(raw_text=content[start:], error=UNTERMINATED_TOOL_BLOCK_ERROR)


def classify_parse_failure(
    message: Message, termination: ParseTermination
) -> tuple[ParseFailureKind, str] | None:
    """Return the kind of failure of a parsed response and its text; None if it is valid.

    Returns:
        The kind, and a detail of at most `PARSE_FAILURE_DETAIL_MAX_CHARS` characters.
    """
    unparsed: Sequence[UnparsedToolCall] = message.get("unparsed_tool_calls", [])
    open_blocks = [call for call in unparsed if call.error == UNTERMINATED_TOOL_BLOCK_ERROR]
    if not termination.is_clean:
        text = format_content_as_string(message["content"], separator="")
        detail = f"response did not end properly: {text}" + "".join(c.raw_text for c in open_blocks)
        return ParseFailureKind.STRUCTURAL, detail[:PARSE_FAILURE_DETAIL_MAX_CHARS]
    if not unparsed:
        return None
    kind = ParseFailureKind.STRUCTURAL if open_blocks else ParseFailureKind.CONTENT
    detail = json.dumps([call.model_dump() for call in unparsed], ensure_ascii=False)
    return kind, detail[:PARSE_FAILURE_DETAIL_MAX_CHARS]
