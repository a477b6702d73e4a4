"""Rows of a data file that are conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import DataValidationError

if TYPE_CHECKING:
    from tinker_cookbook.supervised.conversations import Conversation, SourceRow

__all__ = ["read_conversation"]


def read_conversation(row: SourceRow) -> Conversation:
    """Read a row that must be a conversation.

    Raises:
        DataValidationError: if the row cannot be used, or is plain text.
    """
    from tinker_cookbook.supervised.conversations import parse_row

    conversation = parse_row(row)
    if conversation.text is not None:
        raise DataValidationError(
            f"{row.where}: plain text has no chat format; `tinker-cookbook check` shows how it is "
            "trained."
        )
    return conversation
