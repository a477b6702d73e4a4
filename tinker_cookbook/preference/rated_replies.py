"""Single replies with a thumb up or down: rows of files, and batches for `train_kto`.

{"prompt": "...", "completion": "...", "label": true}       texts, or lists of messages
{"messages": [messages], "label": false}                    a whole conversation
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.rendering import RenderedReply, render_reply
from tinker_cookbook.preference.row_parts import (
    parse_completion,
    parse_conversation,
    read_object,
)
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.several import open_data
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

__all__ = [
    "RatedReply",
    "RatedReplyBuilderFromJsonl",
    "RatedReplyDataset",
    "from_comparisons",
    "parse_rated_reply",
]

ACCEPTED = (
    'use {"prompt": ..., "completion": ..., "label": true or false}, or {"messages": [...], '
    '"label": true or false}'
)
LABELS = {"true": True, "false": False, "1": True, "0": False}
MAX_PROBLEMS = 5
"""Problems that one error lists."""


@dataclass(frozen=True)
class RatedReply:
    """A prompt, a reply, and whether the reply is good."""

    prompt_conversation: list[Message]
    completion: list[Message]
    is_good: bool
    source: str | None = field(default=None, compare=False)
    """Where it was read from, such as `replies.jsonl:12`; errors name it."""


def parse_rated_reply(row: SourceRow) -> RatedReply:
    """Read one row of any shape.

    Raises:
        DataValidationError: naming the row, the field and its value.
    """
    fields = read_object(row, ACCEPTED)
    label = LABELS.get(str(fields.get("label")).lower())
    if fields.get("messages") is not None:
        prompt, completion = parse_conversation(fields, "messages", row.where)
    elif fields.get("prompt") is not None and fields.get("completion") is not None:
        prompt, completion = parse_completion(fields["prompt"], fields, "completion", row.where)
    else:
        keys = ", ".join(map(repr, list(fields)[:8])) or "no keys"
        raise DataFormatError(f"{row.where}: the row has {keys}; {ACCEPTED}.")
    if label is None:
        raise DataFormatError(
            f"{row.where}: label={fields.get('label')!r} must be true (thumb up) or false (down)."
        )
    return RatedReply(prompt, completion, label, row.where)


def from_comparisons(comparisons: Sequence[LabeledComparison]) -> list[RatedReply]:
    """Return both completions of every comparison as single replies; ties are left out."""
    replies = []
    for one in comparisons:
        if one.label == "Tie":
            continue
        pair = one.comparison if one.label == "A" else one.comparison.swap()
        for completion, is_good in ((pair.completion_A, True), (pair.completion_B, False)):
            replies.append(RatedReply(pair.prompt_conversation, completion, is_good, one.source))
    return replies


@chz.chz
class RatedReplyBuilderFromJsonl(ChatDatasetBuilder):
    """Build data sets of rated replies from files; `common_config.batch_size` counts replies.

    The paths are read like `data=` of the supervised recipes.
    """

    train_path: str
    test_path: str | None = None
    test_size: int = 0
    """Replies held out from `train_path` where no `test_path` is given."""
    seed: int = 0
    """Decides which replies are held out."""

    def __call__(self) -> tuple[RatedReplyDataset, RatedReplyDataset | None]:
        """Return the training and the held-out replies.

        Raises:
            DataFormatError: naming file, line and field of a row that cannot be used.
        """
        trained = _read_replies(self.train_path)
        held_out = None if self.test_path is None else _read_replies(self.test_path)
        if held_out is None and self.test_size:
            if self.test_size >= len(trained):
                raise DataFormatError(
                    f"{self.train_path} has {len(trained)} replies and test_size={self.test_size} "
                    "of them would be held out; use a smaller test_size."
                )
            random.Random(self.seed).shuffle(trained)
            held_out, trained = trained[: self.test_size], trained[self.test_size :]
        train = self._build(trained)
        if len(train) == 0:
            raise DataFormatError(
                f"batch_size={self.common_config.batch_size} is more than the {len(trained)} "
                "replies; use a smaller batch_size, or more data."
            )
        return train, self._build(held_out) if held_out else None

    def _build(self, replies: Sequence[RatedReply]) -> RatedReplyDataset:
        config = self.common_config
        return RatedReplyDataset(
            replies, self.renderer, batch_size=config.batch_size, max_length=config.max_length
        )


class RatedReplyDataset(SupervisedDataset):
    """Batches of rated replies and of mismatched ones.

    Datum 2i of a batch is reply i. Datum 2i + 1 is the prompt of reply i with the completion of
    another reply: KTO estimates the distance between model and reference on these. The partner of a
    reply is the nearest reply before it that answers another prompt. It is the same in all epochs,
    so the reference scores each datum once.
    """

    def __init__(
        self,
        replies: Sequence[RatedReply],
        renderer: Renderer,
        *,
        batch_size: int,
        max_length: int | None = None,
    ) -> None:
        """Render all replies, so that a bad one does not stop the run later.

        Args:
            replies: The replies.
            renderer: Chat format.
            batch_size: Replies per batch; those that do not fill the last batch are left out.
            max_length: Tokens at which a prompt with its completion is cut; None: never.

        Raises:
            DataValidationError: naming the replies that cannot be trained on, or if all replies
                answer the same prompt.
        """
        self.replies = list(replies)
        self.batch_size = batch_size
        self._max_length = max_length
        self._renderer = renderer
        self._rendered = self._render_all()
        self._mismatched = [
            self._render_mismatched(number, partner)
            for number, partner in enumerate(find_partners(self.replies))
        ]
        self._order = list(range(len(self.replies)))

    def __len__(self) -> int:
        return len(self.replies) // self.batch_size

    @property
    def summary(self) -> list[str]:
        """Return what a run says about its data before it starts."""
        num_good = sum(reply.is_good for reply in self.replies)
        line = f"{len(self.replies)} replies, {num_good} good, {len(self.replies) - num_good} bad"
        num_cut = sum(reply.is_cut for reply in self._rendered)
        return [line + (f", {num_cut} cut at max_length={self._max_length}" if num_cut else "")]

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle the replies; the same seed gives the same order."""
        self._order = list(range(len(self.replies)))
        random.Random(seed).shuffle(self._order)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the datums of a batch, replies and mismatched replies in turns."""
        return self.load(self._numbers(index))[0]

    def load_batch(self, index: int) -> tuple[list[tinker.Datum], np.ndarray]:
        """Return the datums of a batch, and which of its replies are good, booleans [S]."""
        return self.load(self._numbers(index))

    def load(self, numbers: Sequence[int]) -> tuple[list[tinker.Datum], np.ndarray]:
        """Return the datums and labels of the replies with these numbers."""
        data = [
            datum
            for number in numbers
            for datum in (self._rendered[number].datum, self._mismatched[number])
        ]
        return data, np.array([self.replies[number].is_good for number in numbers])

    def _numbers(self, index: int) -> list[int]:
        return self._order[index * self.batch_size : (index + 1) * self.batch_size]

    def _render_all(self) -> list[RenderedReply]:
        rendered, problems = [], []
        for reply in self.replies:
            try:
                rendered.append(self._render(reply.prompt_conversation, reply))
            except DataValidationError as error:
                problems.append(str(error))
        if problems:
            more = len(problems) - MAX_PROBLEMS
            listed = "\n".join(problems[:MAX_PROBLEMS])
            raise DataValidationError(listed + (f"\nand {more} more" if more > 0 else ""))
        return rendered

    def _render(self, prompt: list[Message], reply: RatedReply) -> RenderedReply:
        return render_reply(
            prompt,
            reply.completion,
            self._renderer,
            self._max_length,
            where=reply.source or "a reply",
        )

    def _render_mismatched(self, number: int, partner: int) -> tinker.Datum:
        """Return the prompt of one reply with the completion of another.

        If a long prompt fills `max_length`, the reply itself is used instead.
        """
        try:
            prompt = self.replies[number].prompt_conversation
            return self._render(prompt, self.replies[partner]).datum
        except DataValidationError:
            return self._rendered[number].datum


def find_partners(replies: Sequence[RatedReply]) -> list[int]:
    """Return, for every reply, the number of the nearest one before it with another prompt.

    The reply before the first is the last.

    Raises:
        DataValidationError: if all replies answer the same prompt.
    """
    keys = [repr(reply.prompt_conversation) for reply in replies]
    if len(set(keys)) < 2:
        raise DataValidationError(
            "all replies answer the same prompt; KTO needs at least two prompts to estimate the "
            "distance between the model and its reference."
        )
    # Reading the list twice gives the first replies the last ones as their partners.
    partners = [0] * len(keys)
    last, before = len(keys) - 1, -1
    for number in [*range(len(keys)), *range(len(keys))]:
        if keys[last] != keys[number]:
            before = last
        partners[number] = before
        last = number
    return partners


def _read_replies(data: str) -> list[RatedReply]:
    """Read all rows of the files that `data` names."""
    source = open_data(data)
    try:
        return [parse_rated_reply(row) for row in source.rows(range(len(source)))]
    finally:
        source.close()
