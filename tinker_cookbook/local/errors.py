"""Errors that cross from the engine and the service's state to the client.

`service.protocol.failures` is the one place that turns them into HTTP answers.
"""

__all__ = [
    "OTHER_STATE_DIR",
    "BodyTimeoutError",
    "ForbiddenError",
    "GoneError",
    "NotFoundError",
    "ShuttingDownError",
    "StorageError",
    "TooLargeError",
    "UnauthorizedError",
    "UserError",
    "shorten_message",
]

MAX_MESSAGE = 4000
OTHER_STATE_DIR = "choose another --state-dir, or set TINKER_COOKBOOK_HOME"
"""What to do about a state folder. Services that recipes start have it below that home."""


def shorten_message(message: str) -> str:
    """Return a message without its middle if it is long: it may quote a request of any size."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"


class UserError(ValueError):
    """The request is at fault. The message goes to the client with category `user`.

    It names the field and the value, says what is accepted and how to fix the request.
    """


class NotFoundError(UserError):
    """The request names something that does not exist, or does not exist any more."""


class GoneError(UserError):
    """The request was answered before, and its result is no longer kept."""


class UnauthorizedError(UserError):
    """The request has no key, or a wrong one."""


class ForbiddenError(UserError):
    """The request has a link or a ticket that is wrong or has expired."""


class TooLargeError(UserError):
    """The request's body is larger than the service accepts."""


class BodyTimeoutError(UserError):
    """The request's body did not arrive in time."""


class ShuttingDownError(RuntimeError):
    """The service is about to stop and does not accept new work."""


class StorageError(RuntimeError):
    """The service's disk is full, read-only or damaged. The message names the file.

    It goes to the client with category `server`. What is in memory is not affected.
    """
