"""Recorded calls of an agent: what was sampled, and which call continues which.

A call continues an earlier one if its prompt begins, token for token, with that call's prompt and
reply. It then stores only the tokens after them, so that every token is stored once:

    call 0   new_prompt  1 2      tokens  5 9
    call 1   new_prompt  3        tokens  6        parent 0: its prompt is 1 2 5 9 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["RecordedCall", "call_from_json", "call_to_json", "count_sequences", "ordered", "prompt"]


@dataclass(frozen=True)
class RecordedCall:
    """One sampled reply and its prompt."""

    rollout: str
    """Name of the rollout."""
    index: int
    """Number of the call in its rollout, in the order in which the calls ended."""
    parent: int | None
    """Index of the call that this one continues; None for the start of a sequence."""
    new_prompt: list[int]
    """Prompt tokens after the parent's prompt and reply; without a parent, the whole prompt."""
    tokens: list[int]
    """The sampled tokens, including the stop token if one ended the reply."""
    logprobs: list[float]
    """The sampler's natural log probability of each sampled token."""
    stop_reason: str
    """`stop`, or `length` if the token limit cut the reply."""
    temperature: float | None = None
    """The temperature that the request asked for; None if the request had none."""
    sequence_id: str | None = None
    """The name that the service gave the sample."""
    time: float = 0.0
    """When the reply was recorded, in seconds since 1970."""


def call_to_json(call: RecordedCall) -> dict[str, Any]:
    """Return a call as an object for JSON."""
    return asdict(call)


def call_from_json(fields: dict[str, Any]) -> RecordedCall:
    """Return the call that `call_to_json` wrote."""
    return RecordedCall(**fields)


def prompt(calls: Sequence[RecordedCall], index: int) -> list[int]:
    """Return the whole prompt of call `index` of a rollout."""
    parts: list[list[int]] = []
    at: int | None = index
    while at is not None:
        call = calls[at]
        parts.append(call.new_prompt)
        at = call.parent
        if at is not None:
            parts.append(calls[at].tokens)
    return [token for part in reversed(parts) for token in part]


def ordered(calls: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Return the calls of a rollout so that each comes right after its parent where possible.

    Concurrent conversations of one agent are interleaved in time. In this order, each one is in one
    piece. Where two calls continue the same call, the second starts after the first one's end.
    """
    children: dict[int | None, list[RecordedCall]] = {}
    for call in calls:
        children.setdefault(call.parent, []).append(call)
    result: list[RecordedCall] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        call = waiting.pop()
        result.append(call)
        waiting += children.get(call.index, [])[::-1]
    return result


def count_sequences(calls: Sequence[RecordedCall]) -> int:
    """Return the number of token sequences that the calls of a rollout merge into."""
    in_order = ordered(calls)
    before = [None, *(call.index for call in in_order)]
    return sum(
        call.parent is None or call.parent != last
        for call, last in zip(in_order, before, strict=False)
    )
