"""Rows of preference data in the shapes that people have, read as labeled comparisons.

{"prompt": "...", "chosen": "...", "rejected": "..."}          texts, or lists of messages
{"chosen": [messages], "rejected": [messages]}                 whole conversations, same prompt
{"comparison": {"prompt_conversation": [...], "completion_A": [...], "completion_B": [...]},
 "label": "A"}                                                 A, B or Tie
"""

from __future__ import annotations

from collections.abc import Mapping

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.row_parts import (
    parse_completion,
    parse_conversation,
    read_object,
)
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.conversations import SourceRow

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
    fields = read_object(row, ACCEPTED)
    if "comparison" in fields:
        return _parse_labeled(fields, row.where)
    if fields.get("chosen") is None or fields.get("rejected") is None:
        keys = ", ".join(map(repr, list(fields)[:8])) or "no keys"
        raise DataFormatError(f"{row.where}: the row has {keys}; {ACCEPTED}.")
    if fields.get("prompt") is not None:
        chosen = parse_completion(fields["prompt"], fields, "chosen", row.where)
        rejected = parse_completion(fields["prompt"], fields, "rejected", row.where)
    else:
        chosen = parse_conversation(fields, "chosen", row.where)
        rejected = parse_conversation(fields, "rejected", row.where)
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
    first = parse_completion(prompt, record, "completion_A", where)
    second = parse_completion(prompt, record, "completion_B", where)
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
