"""Rows of preference data in the shapes that people have, read as labeled comparisons.

{"prompt": "...", "chosen": "...", "rejected": "..."}          texts, or lists of messages
{"chosen": [messages], "rejected": [messages]}                 whole conversations, same prompt
{"comparison": {"prompt_conversation": [...], "completion_A": [...], "completion_B": [...]},
 "label": "A"}                                                 A, B or Tie
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.conversations import ConversationError, SourceRow, parse_row

__all__ = ["parse_comparison"]

ACCEPTED = (
    'use {"prompt": ..., "chosen": ..., "rejected": ...}, or chosen and rejected as whole '
    'conversations, or {"comparison": {"prompt_conversation", "completion_A", "completion_B"}, '
    '"label"}'
)
LABELS = {"a": "A", "b": "B", "tie": "Tie", "chosen": "A", "rejected": "B"}


def parse_comparison(row: SourceRow) -> LabeledComparison:
    """Read one row of any shape.

    Returns:
        The comparison, with the place of its row in `source`. For a row with chosen and rejected
        completions, A is the chosen one.

    Raises:
        DataValidationError: naming the row, the field and its value.
    """
    fields = _read_object(row)
    if "comparison" in fields:
        return _parse_labeled(fields, row.where)
    if fields.get("chosen") is None or fields.get("rejected") is None:
        keys = ", ".join(map(repr, list(fields)[:8])) or "no keys"
        raise DataFormatError(f"{row.where}: the row has {keys}; {ACCEPTED}.")
    if fields.get("prompt") is not None:
        chosen = _parse_completion(fields["prompt"], fields, "chosen", row.where)
        rejected = _parse_completion(fields["prompt"], fields, "rejected", row.where)
    else:
        chosen = _parse_conversation(fields, "chosen", row.where)
        rejected = _parse_conversation(fields, "rejected", row.where)
    return _compare(chosen, rejected, "A", row.where, ("chosen", "rejected"))


def _parse_labeled(fields: Mapping[str, object], where: str) -> LabeledComparison:
    record = fields["comparison"]
    if not isinstance(record, dict):
        raise DataFormatError(f"{where}: comparison={record!r} is not an object; {ACCEPTED}.")
    for key in ("prompt_conversation", "completion_A", "completion_B"):
        if record.get(key) is None:
            raise DataFormatError(f"{where}: comparison.{key} is missing; {ACCEPTED}.")
    label = LABELS.get(str(fields.get("label")).lower())
    if label is None:
        raise DataFormatError(f"{where}: label={fields.get('label')!r} must be A, B or Tie.")
    prompt = record["prompt_conversation"]
    first = _parse_completion(prompt, record, "completion_A", where)
    second = _parse_completion(prompt, record, "completion_B", where)
    return _compare(first, second, label, where, ("completion_A", "completion_B"))


def _compare(
    first: tuple[list[Message], list[Message]],
    second: tuple[list[Message], list[Message]],
    label: str,
    where: str,
    names: tuple[str, str],
) -> LabeledComparison:
    """Build the comparison of two (prompt, completion) pairs."""
    if first[0] != second[0]:
        raise DataValidationError(
            f"{where}: the prompts of {names[0]} and {names[1]} differ; both completions must "
            "answer the same messages."
        )
    if first[1] == second[1] != []:
        raise DataValidationError(
            f"{where}: {names[0]} and {names[1]} are equal, so there is nothing to prefer; remove "
            "the row."
        )
    comparison = Comparison(first[0], first[1], second[1])
    return LabeledComparison(comparison, label, source=where)  # pyright: ignore[reportArgumentType]


def _parse_completion(
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


def _parse_conversation(
    fields: Mapping[str, object], key: str, where: str
) -> tuple[list[Message], list[Message]]:
    """Read a whole conversation; what follows the last user message is the completion."""
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


def _read_object(row: SourceRow) -> Mapping[str, object]:
    if row.problem is not None:
        raise DataFormatError(f"{row.where}: {row.problem}")
    value = row.value
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataFormatError(f"{row.where}: the row is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataFormatError(f"{row.where}: the row is not an object; {ACCEPTED}.")
    return value
