"""Text of tokens for a terminal, coloured by their weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["format_colorized"]

_GREEN, _YELLOW, _RED, _RESET = "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def format_colorized(
    tokens: Sequence[int],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerFast,
    draw_newline_arrow: bool = False,
) -> str:
    """Return the text with ANSI colours: green is trained, yellow context, red negative weight.

    Args:
        tokens: token ids.
        weights: loss weight of each token.
        tokenizer: tokenizer of the tokens.
        draw_newline_arrow: draw an arrow before every newline.

    Raises:
        ValueError: if the numbers of tokens and weights differ.
    """
    pieces = []
    colors = (_color(float(weight)) for weight in weights)
    pairs = zip(tokens, colors, strict=True)
    for color, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        assert isinstance(text, str)
        text = text.replace("\x1b", "␛")  # escape codes in the text must not act on the terminal
        if draw_newline_arrow:
            text = text.replace("\n", "↵\n")
        # Each line is coloured separately, because pagers and logs reset colours at line ends.
        lines = text.split("\n")
        pieces.append("\n".join(f"{color}{line}{_RESET}" if line else "" for line in lines))
    return "".join(pieces)


def _color(weight: float) -> str:
    if weight > 0:
        return _GREEN
    return _RED if weight < 0 else _YELLOW
