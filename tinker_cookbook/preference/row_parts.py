"""Prompts and completions of preference data: texts, lists of messages, whole conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.conversations import ConversationError, SourceRow, parse_row

__all__ = ["parse_completion", "parse_conversation", "read_object"]


def parse_completion(
    prompt: object, fields: Mapping[str, object], key: str, where: str
) -> tuple[list[Message], list[Message]]:
    """Read a prompt and the completion in `fields[key]`, which may repeat the prompt.

    An empty list is a prompt without a completion, for training that samples its own.
    """
    if fields[key] == [] and isinstance(prompt, list):
        return _parse_prompt(prompt, where), []
    value = _unrepeated(prompt, fields[key])
    row = {"prompt": prompt, "completion": value}
    for optional in ("system", "tools"):
        if fields.get(optional) is not None:
            row[optional] = fields[optional]
    try:
        conversation = parse_row(SourceRow(where, row))
    except ConversationError as error:
        # The row was put together here; name the user's own field.
        raise DataValidationError(str(error).replace("completion", key)) from error
    if conversation.tools:
        raise DataFormatError(f"{where}: tools of preference data are not supported; remove them.")
    messages = conversation.messages
    return messages[: conversation.num_context], messages[conversation.num_context :]


def _parse_prompt(prompt: list[object], where: str) -> list[Message]:
    try:
        return parse_row(SourceRow(where, {"messages": prompt})).messages
    except ConversationError as error:
        raise DataValidationError(str(error).replace("messages", "prompt_conversation")) from error


def _unrepeated(prompt: object, completion: object) -> object:
    """Return a completion without the prompt that some data sets write before it."""
    if not isinstance(completion, list) or len(completion) < 2:
        return completion
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return completion[len(before) :] if completion[: len(before)] == before else completion


def parse_conversation(
    fields: Mapping[str, object], key: str, where: str
) -> tuple[list[Message], list[Message]]:
    """Read the conversation in `fields[key]`; the completion follows its last user message."""
    if not isinstance(fields[key], list):
        raise DataFormatError(
            f"{where}: {key} is text and the row has no prompt; add 'prompt', or write {key} as "
            "the list of the conversation's messages."
        )
    try:
        messages = parse_row(SourceRow(where, {"messages": fields[key]})).messages
    except ConversationError as error:
        raise DataValidationError(str(error).replace("messages", key)) from error
    asked = [number for number, message in enumerate(messages) if message["role"] != "assistant"]
    start = asked[-1] + 1 if asked else 0
    if start == len(messages):
        raise DataValidationError(
            f"{where}: {key} ends with a message of {messages[-1]['role']!r}; its last message "
            "must be the assistant's."
        )
    return messages[:start], messages[start:]


def read_object(row: SourceRow, accepted: str) -> Mapping[str, object]:
    """Return the fields of a row.

    Args:
        row: The row.
        accepted: The shapes to name in an error.
    """
    if row.problem is not None:
        raise DataFormatError(f"{row.where}: {row.problem}")
    value = row.value
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataFormatError(f"{row.where}: the row is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataFormatError(f"{row.where}: the row is not an object; {accepted}.")
    return value
