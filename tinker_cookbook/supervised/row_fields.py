"""Reading fields of one row of JSON; errors name the row, the path inside it, and the value."""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn

from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["KEY_HINTS", "ConversationError", "FieldReader", "json_type", "shown"]

KEY_HINTS = {
    "value": "rename it to 'content', or call the list of messages 'conversations'",
    "from": "rename it to 'role', or call the list of messages 'conversations'",
    "loss": "use 'weight': 0 or 1, or 'trainable' with train_on_what=customized",
    "train": "use 'weight': 0 or 1, or 'trainable' with train_on_what=customized",
}
"""Advice about keys of other formats, if no known key is similar."""


class ConversationError(DataValidationError):
    """A row that cannot be used. `kind` groups errors of the same cause in a report."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return self.args[0]


def shown(value: object, limit: int = 60) -> str:
    """Return the `repr` of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def json_type(value: object) -> str:
    """Return JSON's name of the type of a value, with an article."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {dict: "an object", list: "a list"}
    return names.get(type(value), type(value).__name__)


class FieldReader:
    """Checks types of fields and raises located errors.

    Args:
        where: name of the row in errors, e.g. `chat.jsonl:12`.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.notes: Counter[str] = Counter()
        """Conversions made in this row, with their number."""

    def fail(self, problem: str, accepted: str, *, kind: str, at: str = "") -> NoReturn:
        suffix = f" ({at})" if at else ""
        raise ConversationError(f"{self.where}: {problem}; {accepted}{suffix}", kind)

    def fail_type(self, value: object, accepted: str, at: str) -> NoReturn:
        name = at.rpartition(".")[2]
        detail = "" if value is None else f" ({shown(value)})"
        problem = f"{name} is {json_type(value)}{detail}"
        self.fail(problem, f"use {accepted}", kind="wrong type", at=at)

    def check_keys(
        self,
        value: JsonObject,
        known: tuple[str, ...],
        at: str,
        hints: dict[str, str] = KEY_HINTS,
    ) -> None:
        for key, item in value.items():
            if key in known or item is None:
                continue
            near = nearest_name(str(key), known)
            hint = hints.get(key) or (f"did you mean {near!r}?" if near else "")
            accepted = f"use {', '.join(known)}"
            self.fail(
                f"key {shown(key)} is unknown",
                f"{accepted}; {hint}" if hint else accepted,
                kind="unknown key",
                at=at,
            )

    def string(self, value: object, at: str) -> str:
        if not isinstance(value, str):
            self.fail_type(value, "a string", at)
        return value

    def boolean(self, value: object, at: str) -> bool:
        if not isinstance(value, bool):
            self.fail_type(value, "true or false", at)
        return value

    def from_json_text(self, value: object, at: str) -> object:
        """Return the value of a cell. Tables store lists and objects as JSON text; blank is None.

        Raises:
            ConversationError: text that is not JSON.
        """
        if not isinstance(value, str):
            return value
        if not value.strip():
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            name = at.rpartition(".")[2]
            is_python = "'" in value.lstrip()[:3]
            remedy = "write it with json.dumps" if is_python else "use a list, or JSON text of one"
            problem = f"{name} is a string ({shown(value)}) that is not JSON"
            self.fail(problem, remedy, kind="not JSON", at=at)
