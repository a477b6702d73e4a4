"""The shapes a row of training data may have, one module each.

A shape says by which keys it is known and takes a row apart into messages, tools or plain text.
What messages hold is read in one place, `conversations`, whatever shape they came in.
"""

from __future__ import annotations

from typing import Any, NoReturn

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
"""In the order of precedence: a row with the keys of several is read as the first of them."""

_ACCEPTED = (
    'use {"messages": [{"role": "user", "content": "..."}, ...]}, or the keys of another shape: '
    "conversations; instruction and output; prompt and completion; text"
)
_OTHER_DATA = {
    "chosen": "pairs of a better and a worse reply are for preference.train_dpo",
    "preferred_output": "pairs of a better and a worse reply are for preference.train_dpo",
    "prompt": "write the reply beside 'prompt', as 'completion'",
    "completion": "write what it answers beside it, as 'prompt'",
    "output": "write what it answers beside it, as 'instruction'",
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


def shape_of(row: dict[str, Any]) -> Shape | None:
    """The shape of a row, by its keys; None if it has none of them."""
    return next((shape for shape in SHAPES if shape.matches(row)), None)


def fail_unknown_shape(row: dict[str, Any], reader: FieldReader) -> NoReturn:
    """Refuse a row of no known shape, with its keys and what may have been meant."""
    keys = ", ".join(map(repr, list(row)[:8])) or "no keys"
    hints = [advice for key, advice in _OTHER_DATA.items() if row.get(key) is not None]
    hints += [
        f"rename {key!r} to {near!r}"
        for key in map(str, row)
        if key not in _NEAR and (near := nearest_name(key, _NEAR))
    ]
    hints += [
        f"the rows seem to stand in {key!r}: write that list alone"
        for key, value in row.items()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    reader.fail(
        f"messages is missing (the row has {keys})",
        f"{_ACCEPTED}; {hints[0]}" if hints else _ACCEPTED,
        kind="no messages",
    )
