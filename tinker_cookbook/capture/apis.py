"""The APIs that the recording endpoint serves, each with its paths, bodies and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.dialects.anthropic import MessageWriter, error_body, read_messages_request
from tinker_cookbook.dialects.chat import ChatWriter
from tinker_cookbook.dialects.pieces import ReplyWriter, data_event, named_event
from tinker_cookbook.dialects.responses import ResponseWriter, read_responses_request

__all__ = ["APIS", "CHAT", "MESSAGES", "RESPONSES", "Api"]


@dataclass(frozen=True)
class Api:
    """One API."""

    path: str
    """Path of its calls, after the rollout's address."""
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Returns the body of a request as that of a chat request."""
    new_writer: Callable[[Mapping[str, Any], str], ReplyWriter]
    """Returns the writer of a reply, given the body of the request and an id for the reply."""
    frame: Callable[[dict[str, Any]], bytes]
    """Returns an event of a stream as it is sent."""
    error: Callable[[int, str, str], dict[str, Any]]
    """Returns the body of an error, given its HTTP status, a code and a message."""
    last_frame: bytes = b""
    """What ends every stream."""


def openai_error(status: int, code: str, message: str) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _chat_writer(body: Mapping[str, Any], reply_id: str) -> ReplyWriter:
    options = body.get("stream_options") or {}
    return ChatWriter(
        str(body.get("model") or ""),
        include_usage=bool(options.get("include_usage")),
        reply_id=reply_id,
    )


CHAT = Api(
    path="/chat/completions",
    read=lambda body: body,
    new_writer=_chat_writer,
    frame=data_event,
    error=openai_error,
    last_frame=b"data: [DONE]\n\n",
)
RESPONSES = Api(
    path="/responses",
    read=read_responses_request,
    new_writer=lambda body, reply_id: ResponseWriter(str(body.get("model")), body, reply_id),
    frame=named_event,
    error=openai_error,
)
MESSAGES = Api(
    path="/messages",
    read=read_messages_request,
    new_writer=lambda body, reply_id: MessageWriter(str(body.get("model")), reply_id),
    frame=named_event,
    error=lambda status, code, message: error_body(status, message),
)
APIS = (CHAT, RESPONSES, MESSAGES)
