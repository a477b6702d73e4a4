"""From a prompt and its completion to a datum whose completion is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.preference.types import LabeledComparison

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer
    from tinker_cookbook.renderers.types import Message

__all__ = ["RenderedPair", "RenderedReply", "render_pair", "render_reply"]


@dataclass(frozen=True)
class RenderedReply:
    """A prompt with a completion, as tokens."""

    datum: tinker.Datum
    num_tokens: int
    """Number of tokens before they were cut at `max_length`."""
    num_kept: int
    """Number of tokens that are left."""

    @property
    def is_cut(self) -> bool:
        """Whether tokens were cut off."""
        return self.num_kept < self.num_tokens


@dataclass(frozen=True)
class RenderedPair:
    """A pair, as tokens."""

    chosen: tinker.Datum
    rejected: tinker.Datum
    is_cut: bool
    """Whether tokens of a completion were cut off at `max_length`."""


def render_pair(
    pair: LabeledComparison, renderer: Renderer, max_length: int | None
) -> RenderedPair:
    """Render both completions of a comparison that is not a tie.

    Raises:
        DataValidationError: if nothing of a completion is left to train, or both completions are
            the same tokens (after they were cut at `max_length`).
    """
    where = pair.source or "a comparison"
    comparison = pair.comparison if pair.label == "A" else pair.comparison.swap()
    prompt = comparison.prompt_conversation
    chosen, rejected = (
        render_reply(prompt, reply, renderer, max_length, where=where, name=name)
        for name, reply in (
            ("chosen", comparison.completion_A),
            ("rejected", comparison.completion_B),
        )
    )
    if chosen.datum.model_input.to_ints() == rejected.datum.model_input.to_ints():
        raise DataValidationError(
            f"{where}: both completions are the same tokens{_describe_limit(max_length)}, so there "
            "is nothing to prefer; raise max_length or remove the row."
        )
    return RenderedPair(chosen.datum, rejected.datum, chosen.is_cut or rejected.is_cut)


def render_reply(
    prompt: list[Message],
    completion: list[Message],
    renderer: Renderer,
    max_length: int | None,
    *,
    where: str,
    name: str = "",
) -> RenderedReply:
    """Render a prompt with a completion; only the assistant messages of the completion are trained.

    Args:
        prompt: Messages before the completion.
        completion: One reply, or several messages.
        renderer: Chat format.
        max_length: Tokens at which prompt and completion are cut; None: never.
        where: Place of the row, for the error.
        name: Field of the completion, for the error.

    Raises:
        DataValidationError: if no token of the completion is left to train.
    """
    from tinker_cookbook.renderers import TrainOnWhat
    from tinker_cookbook.supervised.common import datum_from_model_input_weights

    is_one = len(completion) == 1
    model_input, weights = renderer.build_supervised_example(
        [*prompt, *completion],
        train_on_what=(
            TrainOnWhat.LAST_ASSISTANT_MESSAGE if is_one else TrainOnWhat.LAST_ASSISTANT_TURN
        ),
    )
    num_tokens = model_input.length
    kept = num_tokens if max_length is None else min(num_tokens, max_length)
    if not np.any(np.asarray(weights)[1:kept]):
        completion_name = f"the {name} completion" if name else "the completion"
        raise DataValidationError(
            f"{where}: no token of {completion_name} is trained{_describe_limit(max_length)}; "
            "raise max_length or remove the row."
        )
    datum = datum_from_model_input_weights(model_input, weights, max_length)
    return RenderedReply(datum, num_tokens, kept)


def _describe_limit(max_length: int | None) -> str:
    return "" if max_length is None else f" within max_length={max_length}"
