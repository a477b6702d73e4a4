"""Errors that cross from the engine to the client."""

__all__ = [
    "GoneError",
    "NotFoundError",
    "ShuttingDownError",
    "StorageError",
    "UserError",
    "shorten_message",
]

MAX_MESSAGE = 4000


def shorten_message(message: str) -> str:
    """A message as it goes to clients and logs: what it quotes of a request may be of any size."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"


class UserError(ValueError):
    """The request is at fault. The message goes to the client with category `user`.

    It names the field and the value, says what is accepted and what to do.
    """


class NotFoundError(UserError):
    """What the request names does not exist, or does not exist any more."""


class GoneError(UserError):
    """The request was answered before, and its result is no longer kept."""


class ShuttingDownError(RuntimeError):
    """The service takes no new work, since it is about to stop."""


class StorageError(RuntimeError):
    """The service's disk is at fault: full, read-only or damaged. The message names the file.

    It goes to the client with category `server`; what is in memory is not affected.
    """
