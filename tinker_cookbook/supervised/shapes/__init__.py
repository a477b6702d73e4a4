"""The shapes a row of training data may have, one module each.

A shape is recognized by its keys and splits a row into messages, tools or plain text. One module,
`conversations`, reads the messages of all shapes.
"""

from __future__ import annotations

from typing import NoReturn

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader
from tinker_cookbook.supervised.shapes import (
    alpaca,
    openai_messages,
    plain_text,
    prompt_completion,
    sharegpt,
)
from tinker_cookbook.supervised.shapes.parts import RowParts, Shape
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["SHAPES", "RowParts", "Shape", "fail_unknown_shape", "shape_of"]

SHAPES: tuple[Shape, ...] = (
    openai_messages.SHAPE,
    sharegpt.SHAPE,
    alpaca.SHAPE,
    prompt_completion.SHAPE,
    plain_text.SHAPE,
)
"""Shapes in order of precedence: a row with the keys of several shapes has the first one."""

_ACCEPTED = (
    'use {"messages": [{"role": "user", "content": "..."}, ...]}, or the keys of another shape: '
    "conversations; instruction and output; prompt and completion; text"
)
_OTHER_DATA = {
    "chosen": "pairs of a better and a worse reply are for preference.train_dpo",
    "preferred_output": "pairs of a better and a worse reply are for preference.train_dpo",
    "prompt": "write the reply next to 'prompt', as 'completion'",
    "completion": "write the question next to it, as 'prompt'",
    "output": "write the question next to it, as 'instruction'",
    "role": "the row is one message: a row is a conversation, the list of its messages",
    "from": "the row is one message: a row is a conversation, the list of its messages",
}
_NEAR = {
    "messages": "messages",
    "conversations": "conversations",
    "instruction": "instruction",
    "completion": "completion",
    "text": "text",
}


def shape_of(row: JsonObject) -> Shape | None:
    """Return the shape of a row by its keys; None if it is unknown."""
    return next((shape for shape in SHAPES if shape.matches(row)), None)


def fail_unknown_shape(row: JsonObject, reader: FieldReader) -> NoReturn:
    """Refuse a row of unknown shape; the error has its keys and a suggestion."""
    keys = ", ".join(map(repr, list(row)[:8])) or "no keys"
    hints = [advice for key, advice in _OTHER_DATA.items() if row.get(key) is not None]
    hints += [
        f"rename {key!r} to {near!r}"
        for key in map(str, row)
        if key not in _NEAR and (near := nearest_name(key, _NEAR))
    ]
    hints += [
        f"the rows seem to be in {key!r}: write that list alone"
        for key, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    reader.fail(
        f"messages is missing (the row has {keys})",
        f"{_ACCEPTED}; {hints[0]}" if hints else _ACCEPTED,
        kind="no messages",
    )
