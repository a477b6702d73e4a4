"""OpenAI's chat completions API: a reply as a message, and as the deltas of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from tinker_cookbook.dialects.pieces import Ending, Piece, join_texts, new_id

__all__ = ["ChatWriter", "chat_delta", "chat_message", "chat_usage"]


def chat_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the message of a reply."""
    calls = [piece.call for piece in pieces if piece.kind == "tool_call"]
    content = join_texts(pieces, "content")
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    reasoning = join_texts(pieces, "reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message |= {"tool_calls": calls, "content": content or None}
    return message


def chat_delta(piece: Piece, call_index: int) -> dict[str, Any]:
    """Return the delta of a piece; `call_index` is the number of calls before it."""
    if piece.kind == "reasoning":
        return {"reasoning_content": piece.text}
    if piece.kind == "tool_call":
        return {"tool_calls": [{"index": call_index} | piece.call]}
    return {"content": piece.text}


def chat_usage(ending: Ending) -> dict[str, Any]:
    """Return the usage of a request."""
    return {
        "prompt_tokens": ending.prompt_tokens,
        "completion_tokens": ending.sampled_tokens,
        "total_tokens": ending.prompt_tokens + ending.sampled_tokens,
        "prompt_tokens_details": {"cached_tokens": ending.cached_tokens},
    }


class ChatWriter:
    """Writes one completion, whole or as a stream."""

    def __init__(self, model: str, *, include_usage: bool, reply_id: str | None = None) -> None:
        """Begin a reply.

        Args:
            model: name of the model for the client.
            include_usage: whether a stream ends with the usage.
            reply_id: identifier of the reply, without the API's prefix; None: a new one.
        """
        self._include_usage = include_usage
        self._num_calls = 0
        self._head = {
            "id": new_id("chatcmpl", reply_id),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Sequence[Piece], ending: Ending) -> dict[str, Any]:
        """Return the completion."""
        choice = {
            "index": 0,
            "message": chat_message(pieces),
            "logprobs": None,
            "finish_reason": ending.reason,
        }
        shown = {"object": "chat.completion", "choices": [choice], "usage": chat_usage(ending)}
        return self._head | shown

    def opening(self, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the chunk before the first piece."""
        yield self._chunk({"role": "assistant", "content": ""})

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the chunk of a piece."""
        yield self._chunk(chat_delta(piece, self._num_calls))
        self._num_calls += piece.kind == "tool_call"

    def closing(self, ending: Ending) -> Iterator[dict[str, Any]]:
        """Yield the chunks after the last piece."""
        yield self._chunk({}, ending.reason)
        if self._include_usage:
            usage = {"choices": [], "usage": chat_usage(ending)}
            yield self._head | {"object": "chat.completion.chunk"} | usage

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}
