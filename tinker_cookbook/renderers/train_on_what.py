"""Which messages a `TrainOnWhat` mode trains."""

from __future__ import annotations

from collections.abc import Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.types import Message, TrainOnWhat

__all__ = ["last_user_index", "trained_messages"]


def last_user_index(messages: Sequence[Message]) -> int:
    """Return the index of the last user message, -1 if none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            return index
    return -1


def trained_messages(messages: Sequence[Message], train_on_what: TrainOnWhat) -> list[int]:
    """Return the indices of the messages whose bodies are trained, in order.

    Raises:
        RendererError: if `trainable` is missing with CUSTOMIZED, or given with another mode.
    """
    mode = _checked_mode(messages, train_on_what)
    roles = [message["role"] for message in messages]
    if mode is TrainOnWhat.LAST_ASSISTANT_MESSAGE:
        return [len(roles) - 1] if roles and roles[-1] == "assistant" else []
    if mode is TrainOnWhat.LAST_ASSISTANT_TURN:
        start = last_user_index(messages) + 1
        return [index for index in range(start, len(roles)) if roles[index] == "assistant"]
    if mode is TrainOnWhat.ALL_ASSISTANT_MESSAGES:
        return [index for index, role in enumerate(roles) if role == "assistant"]
    if mode is TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES:
        return [index for index, role in enumerate(roles) if role in ("user", "system")]
    if mode is TrainOnWhat.CUSTOMIZED:
        return [index for index, message in enumerate(messages) if message.get("trainable")]
    return list(range(len(roles)))


def _checked_mode(messages: Sequence[Message], train_on_what: TrainOnWhat) -> TrainOnWhat:
    try:
        mode = TrainOnWhat(train_on_what)
    except ValueError as error:
        names = ", ".join(known.value for known in TrainOnWhat)
        raise RendererError(
            f"train_on_what={train_on_what!r} is unknown; use one of {names}."
        ) from error
    customized = mode is TrainOnWhat.CUSTOMIZED
    for index, message in enumerate(messages):
        if isinstance(message.get("trainable"), bool) is not customized:
            raise _trainable_error(mode, index, message)
    return mode


def _trainable_error(mode: TrainOnWhat, index: int, message: Message) -> RendererError:
    value = message.get("trainable")
    if mode is TrainOnWhat.CUSTOMIZED:
        return RendererError(
            f"messages[{index}]: trainable={value!r}; train_on_what=customized needs True or False "
            "on every message."
        )
    return RendererError(
        f"messages[{index}]: trainable={value!r} has no effect with train_on_what={mode.value}; "
        "use train_on_what=customized, or leave the key out."
    )
