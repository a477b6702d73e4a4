"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from tinker_cookbook.local.errors import shorten_message

__all__ = ["describe_error", "openai_error_response"]

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


def describe_error(status: int, message: str) -> dict[str, Any]:
    """The `error` object; `param` is the field that the message begins with."""
    message = shorten_message(message)
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


def openai_error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer that OpenAI clients turn into their exception for this status."""
    body = json.dumps({"error": describe_error(status, message)})
    return Response(body, status_code=status, headers=headers, media_type="application/json")
