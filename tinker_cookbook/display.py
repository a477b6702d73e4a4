"""Show datums and trajectories as text."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from tinker_cookbook.utils.format_colorized import format_colorized

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.rl.types import Trajectory
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["colorize_example", "describe_example", "format_trajectory", "to_ints"]

MAX_SHOWN_TOKENS = 400


def to_ints(chunk: tinker.ModelInputChunk, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a chunk; an image becomes one `@` per position."""
    import tinker

    if isinstance(chunk, tinker.EncodedTextChunk):
        return list(chunk.tokens)
    (at_sign,) = tokenizer.encode("@", add_special_tokens=False)
    return [at_sign] * chunk.length


def colorize_example(datum: tinker.Datum, tokenizer: Tokenizer, key: str = "weights") -> str:
    """Return the text of a datum, each token coloured by the sign of `loss_fn_inputs[key]`.

    The colour says what a token is as a target: green is trained, yellow is context.
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
    """Return the text of a datum: coloured for a terminal, otherwise with trained text in «».

    Args:
        title: Text of the first line, which also explains the marks.
        stream: Where the text will be written; stderr by default.
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


def format_trajectory(
    trajectory: Trajectory, tokenizer: Tokenizer, only_last_transition: bool = False
) -> str:
    """Return the turns of a trajectory as text: prompt, reply, reward, metrics and logs.

    Args:
        trajectory: The trajectory of a rollout.
        tokenizer: The tokenizer of its model.
        only_last_transition: Show only the last turn; its prompt contains most of the earlier ones.
    """
    count = len(trajectory.transitions)
    shown = range(count - 1, count) if only_last_transition and count else range(count)
    lines: list[str] = []
    for index in shown:
        turn = trajectory.transitions[index]
        prompt = [token for chunk in turn.ob.chunks for token in to_ints(chunk, tokenizer)]
        lines += [
            f"==== turn {index + 1} of {count}: {len(prompt)} tokens of prompt",
            str(tokenizer.decode(prompt)),
            f"---- reply: {len(turn.ac.tokens)} tokens, stop reason {turn.ac.stop_reason}",
            str(tokenizer.decode(turn.ac.tokens)),
            f"---- reward {turn.reward:g}" + (", episode done" if turn.episode_done else ""),
        ]
        found = {**turn.metrics, **turn.logs}
        lines += [f"{name}: {value}" for name, value in found.items()]
    return "\n".join([*lines, f"==== {trajectory.stop_reason or 'no stop reason'}"])


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
    """Return the whole sequence with one value per token; the first token is never a target."""
    inputs: list[int] = []
    for chunk in datum.model_input.chunks:
        inputs += to_ints(chunk, tokenizer)
    last = datum.loss_fn_inputs["target_tokens"].to_numpy()[-1]
    values = datum.loss_fn_inputs[key].to_numpy()
    return [*inputs, int(last)], [0.0, *(float(value) for value in values)]
