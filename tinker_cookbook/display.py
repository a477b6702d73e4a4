"""Datums as text for the eye."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from tinker_cookbook.utils.format_colorized import format_colorized

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["colorize_example", "describe_example", "to_ints"]

MAX_SHOWN_TOKENS = 400


def to_ints(chunk: tinker.ModelInputChunk, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a chunk; an image shows as one `@` per position."""
    import tinker

    if isinstance(chunk, tinker.EncodedTextChunk):
        return list(chunk.tokens)
    (at_sign,) = tokenizer.encode("@", add_special_tokens=False)
    return [at_sign] * chunk.length


def colorize_example(datum: tinker.Datum, tokenizer: Tokenizer, key: str = "weights") -> str:
    """The text of a datum, each token coloured by the sign of `loss_fn_inputs[key]`.

    A colour belongs to a token as target: green is trained, yellow is context.
    """
    tokens, weights = _tokens_and_values(datum, tokenizer, key)
    return format_colorized(tokens, weights, tokenizer, draw_newline_arrow=True)


def describe_example(
    datum: tinker.Datum,
    tokenizer: Tokenizer,
    *,
    title: str = "first example",
    stream: TextIO | None = None,
) -> str:
    """An example, coloured on a terminal, with trained text in «» elsewhere.

    Args:
        title: stands before it, with what the marks mean.
        stream: where it will be written; stderr by default.
    """
    tokens, weights = _tokens_and_values(datum, tokenizer, "weights")
    cut = len(tokens) > MAX_SHOWN_TOKENS
    shown = tokens[:MAX_SHOWN_TOKENS], weights[:MAX_SHOWN_TOKENS]
    rest = f" ... ({len(tokens) - MAX_SHOWN_TOKENS} more tokens)" if cut else ""
    if (stream or sys.stderr).isatty() and not os.environ.get("NO_COLOR"):
        text = format_colorized(*shown, tokenizer)
        legend = "green is trained, yellow is context"
    else:
        text = _mark_trained(*shown, tokenizer)
        legend = "«» is trained, the rest is context"
    return f"{title} ({legend}):\n{text}{rest}"


def _mark_trained(tokens: list[int], weights: list[float], tokenizer: Tokenizer) -> str:
    from tinker_cookbook.renderers.picture import printable

    pieces: list[str] = []
    start = 0
    while start < len(tokens):
        trained = weights[start] > 0
        end = start
        while end < len(tokens) and (weights[end] > 0) == trained:
            end += 1
        text = printable(str(tokenizer.decode(tokens[start:end])))
        pieces.append(f"«{text}»" if trained else text)
        start = end
    return "".join(pieces)


def _tokens_and_values(
    datum: tinker.Datum, tokenizer: Tokenizer, key: str
) -> tuple[list[int], list[float]]:
    """The whole sequence with one value per token; the first token is nobody's target."""
    inputs: list[int] = []
    for chunk in datum.model_input.chunks:
        inputs += to_ints(chunk, tokenizer)
    last: Any = datum.loss_fn_inputs["target_tokens"].to_numpy()[-1]
    values = datum.loss_fn_inputs[key].to_numpy()
    return [*inputs, int(last)], [0.0, *(float(value) for value in values)]
