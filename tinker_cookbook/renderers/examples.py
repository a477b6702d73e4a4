"""From a conversation to training examples: which messages go into which example.

Most formats train a whole conversation in one example. A format that rewrites earlier turns (it
drops their reasoning, say) gets one example per trained reply, cut after it: every trained token
then follows the same tokens that sampling sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.format import Format
from tinker_cookbook.renderers.train_on_what import trained_messages
from tinker_cookbook.renderers.types import Message, TrainOnWhat

__all__ = ["ExamplePlan", "find_trained", "plan_examples", "refuse_rewritten_turn"]


class ExamplePlan(NamedTuple):
    """One example to make."""

    messages: Sequence[Message]
    forms: Sequence[Hashable]
    trained: list[int]


def find_trained(
    chat_format: Format, messages: Sequence[Message], train_on_what: TrainOnWhat
) -> list[int]:
    """Return the indices of the messages to train.

    Raises:
        RendererError: if `messages` is empty, or sampling could not produce one of these replies.
    """
    if not messages:
        raise RendererError("messages=[] has nothing to train on; give at least one message.")
    trained = trained_messages(messages, train_on_what)
    for index in trained:
        if messages[index]["role"] == "assistant":
            chat_format.check_trained_turn(messages, index)
    return trained


def plan_examples(
    chat_format: Format, messages: Sequence[Message], train_on_what: TrainOnWhat
) -> list[ExamplePlan]:
    """Split a conversation into as few examples as train every reply as it is sampled.

    Trained messages of other roles are in the example of the next trained reply.
    """
    trained = find_trained(chat_format, messages, train_on_what)
    fits_in_one = train_on_what == TrainOnWhat.ALL_TOKENS
    if fits_in_one or chat_format.trains_in_one(messages, trained):
        return [ExamplePlan(messages, chat_format.turn_forms(messages), trained)]
    plans: list[ExamplePlan] = []
    pending: list[int] = []
    for index in trained:
        pending.append(index)
        if messages[index]["role"] == "assistant":
            part = messages[: index + 1]
            # The history as the prompt has it, then the reply as it is sampled.
            forms = [*chat_format.prompt_forms(part[:-1]), chat_format.turn_forms(part)[-1]]
            plans.append(ExamplePlan(part, forms, pending))
            pending = []
    if pending or not plans:
        plans.append(ExamplePlan(messages, chat_format.turn_forms(messages), pending))
    return plans


def refuse_rewritten_turn(index: int | None) -> None:
    """Raise RendererError if a trained reply, at this index, is not written as it is sampled."""
    if index is not None:
        raise RendererError(
            f"messages[{index}]: this format rewrites earlier turns (it drops their "
            "thinking), so in one example this reply would be trained on tokens that "
            "sampling never sees there. Use build_supervised_examples, which makes one "
            "example per trained reply, or train_on_what=last_assistant_message."
        )
