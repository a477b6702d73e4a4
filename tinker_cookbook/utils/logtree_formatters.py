"""Conversations in a logtree report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["CONVERSATION_CSS", "ConversationFormatter"]

CONVERSATION_CSS = """
.lt-conversation { margin: .5rem 0 }
.lt-message { border-left: 4px solid #888; margin: .4rem 0; padding: .2rem .8rem;
              background: #8881; border-radius: 0 6px 6px 0 }
.lt-message-role { font-size: .8rem; font-weight: 600; opacity: .75 }
.lt-message-content { white-space: pre-wrap; overflow-wrap: anywhere }
.lt-message-thinking { font-style: italic; opacity: .8 }
.lt-message-user { border-color: #3a7bd5 } .lt-message-assistant { border-color: #2e8b57 }
.lt-message-system { border-color: #a0522d } .lt-message-tool { border-color: #8a63d2 }
""".strip()
_MEDIA = ("image", "audio")


@runtime_checkable
class _Model(Protocol):
    """A pydantic model, such as a tool call."""

    def model_dump(self) -> dict[str, object]:
        """Return the fields."""
        ...


@dataclass
class ConversationFormatter:
    """A conversation: text, reasoning and tool calls; images and sounds as a placeholder."""

    messages: Sequence[Mapping[str, object]]

    def to_html(self) -> str:
        """Return the conversation as an element."""
        return f'<div class="lt-conversation">{"".join(map(_message, self.messages))}</div>'

    def to_data(self) -> dict[str, object]:
        """Return the messages as JSON; what JSON cannot hold becomes a placeholder."""
        messages = [{str(key): _plain(value) for key, value in m.items()} for m in self.messages]
        return {"type": "conversation", "messages": messages}

    def get_css(self) -> str:
        """Return the style sheet of conversations."""
        return CONVERSATION_CSS


def _message(message: Mapping[str, object]) -> str:
    role = str(message.get("role", ""))
    name = message.get("name")
    title = f"{role} ({name})" if name else role
    kind = "".join(letter for letter in role if letter.isalnum())
    pieces = [*_content(message.get("content"))]
    calls = [*_listed(message, "tool_calls"), *_listed(message, "unparsed_tool_calls")]
    pieces += [f"<pre>{html.escape(_call_text(call))}</pre>" for call in calls]
    return (
        f'<div class="lt-message lt-message-{kind}">'
        f'<div class="lt-message-role">{html.escape(title)}</div>'
        f'<div class="lt-message-content">{"".join(pieces)}</div></div>'
    )


def _listed(message: Mapping[str, object], key: str) -> Sequence[object]:
    value = message.get(key)
    return value if isinstance(value, list | tuple) else ()


def _content(content: object) -> list[str]:
    if not isinstance(content, list):
        return [html.escape(str(content or ""))]
    return [_part(part) for part in content]


def _part(part: Mapping[str, object]) -> str:
    kind = str(part.get("type", ""))
    if kind == "thinking":
        text = html.escape(str(part.get("thinking", "")))
        return f'<div class="lt-message-thinking">{text}</div>'
    if kind in _MEDIA:
        return f"[{kind}]"
    return html.escape(str(part.get("text", part)))


def _call_text(call: object) -> str:
    function = getattr(call, "function", None)
    if function is not None:
        return f"{function.name}({function.arguments})"
    return str(getattr(call, "raw_text", call))


def _plain(value: object) -> object:
    """Return the value as JSON, with a placeholder for images and bytes."""
    if isinstance(value, _Model):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return f"[{type(value).__name__}]"
