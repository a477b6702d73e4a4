"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import re

from starlette.responses import Response

from tinker_cookbook.local.errors import shorten_message
from tinker_cookbook.local.service.protocol.failures import Failure

__all__ = ["describe_error", "render_openai_failure"]

_FIELD = re.compile(
    r"([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+(?:\[\d+\])?)*)(?:=| has | is | needs | holds )"
)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
}
_NOT_FIELDS = ("the", "messages do", "it")
"""Beginnings of messages that look like a field."""


def describe_error(failure: Failure) -> dict[str, str | None]:
    """Return the `error` object. Its `param` is the field that the message begins with."""
    status, message = failure.status, shorten_message(failure.detail)
    found = _FIELD.match(message)
    param = found[1] if found is not None and found[1] not in _NOT_FIELDS else None
    code: str | None = None
    if status == 401:
        code = "invalid_api_key"
    elif status == 404 and param == "model":
        code = "model_not_found"
    elif "context length" in message:
        code = "context_length_exceeded"
    kind = _TYPES.get(status, "server_error")
    return {"message": message, "type": kind, "param": param, "code": code}


def render_openai_failure(failure: Failure) -> Response:
    """Return an answer that OpenAI clients turn into their exception for this status."""
    body = json.dumps({"error": describe_error(failure)})
    return Response(
        body, status_code=failure.status, headers=failure.headers, media_type="application/json"
    )
