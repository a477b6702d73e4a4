"""Conversations in a logtree report."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass
class ConversationFormatter:
    """Messages, one below the other: text, reasoning, calls; images and sounds as a word."""

    messages: Sequence[Mapping[str, Any]]

    def to_html(self) -> str:
        """The conversation as an element."""
        return f'<div class="lt-conversation">{"".join(map(_message, self.messages))}</div>'

    def to_data(self) -> dict[str, Any]:
        """`type` conversation, and the messages with what JSON can hold."""
        messages = [{str(key): _plain(value) for key, value in m.items()} for m in self.messages]
        return {"type": "conversation", "messages": messages}

    def get_css(self) -> str:
        """The style of all conversations."""
        return CONVERSATION_CSS


def _message(message: Mapping[str, Any]) -> str:
    role = str(message.get("role", ""))
    name = message.get("name")
    title = f"{role} ({name})" if name else role
    kind = "".join(letter for letter in role if letter.isalnum())
    pieces = [*_content(message.get("content"))]
    calls = [*(message.get("tool_calls") or ()), *(message.get("unparsed_tool_calls") or ())]
    pieces += [f"<pre>{html.escape(_call_text(call))}</pre>" for call in calls]
    return (
        f'<div class="lt-message lt-message-{kind}">'
        f'<div class="lt-message-role">{html.escape(title)}</div>'
        f'<div class="lt-message-content">{"".join(pieces)}</div></div>'
    )


def _content(content: Any) -> list[str]:
    if not isinstance(content, list):
        return [html.escape(str(content or ""))]
    return [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> str:
    kind = str(part.get("type", ""))
    if kind == "thinking":
        text = html.escape(str(part.get("thinking", "")))
        return f'<div class="lt-message-thinking">{text}</div>'
    if kind in _MEDIA:
        return f"[{kind}]"
    return html.escape(str(part.get("text", part)))


def _call_text(call: Any) -> str:
    function = getattr(call, "function", None)
    if function is not None:
        return f"{function.name}({function.arguments})"
    return str(getattr(call, "raw_text", call))


def _plain(value: Any) -> Any:
    """The value as JSON holds it; pictures and bytes are left out."""
    if hasattr(value, "model_dump"):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return f"[{type(value).__name__}]"
