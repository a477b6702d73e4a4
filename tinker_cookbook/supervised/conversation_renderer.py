"""Conversations to datums: one conversation gives one datum, or several.

If a renderer rewrites history (removes thinking from earlier turns), the prompt of a later turn
does not extend the earlier turns as they were sampled. One sequence would then train prefixes that
sampling never produces, so such a conversation becomes one datum per trained turn.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinker_cookbook.exceptions import (
    DataError,
    DataValidationError,
    RendererError,
)
from tinker_cookbook.renderers import (
    Message,
    Renderer,
    TrainOnWhat,
    is_renderer_registered,
)
from tinker_cookbook.renderers.train_on_what import trained_messages
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.common import Reduction, datum_from_model_input_weights
from tinker_cookbook.supervised.conversations import (
    NOTE_CONVERTED,
    Conversation,
    ConversationError,
    MarkupMode,
    SourceRow,
    parse_row,
)
from tinker_cookbook.tokenizer_utils import Tokenizer, is_tokenizer_registered

if TYPE_CHECKING:
    import tinker

Example = tuple["tinker.ModelInput", np.ndarray]

_MARKUP_HINT = " (It stood as markup in the text of a reply; markup=keep trains it as text.)"
_REPLY_MODES = (
    TrainOnWhat.LAST_ASSISTANT_MESSAGE,
    TrainOnWhat.LAST_ASSISTANT_TURN,
    TrainOnWhat.ALL_ASSISTANT_MESSAGES,
)
_NO_REPLY = "messages has no assistant turn"
_RENDER_ERRORS = (RendererError, DataError, NotImplementedError, OSError)

__all__ = [
    "ConversationRenderer",
    "RenderedRow",
    "conversation_to_datum",
    "conversation_to_datums",
    "refuse_without_reply",
]


@dataclass(frozen=True)
class RenderedRow:
    """The datums of one row, with their numbers of tokens."""

    datums: list[tinker.Datum]
    num_tokens: int = 0
    """Number of tokens before truncation, over all datums."""
    num_trained_tokens: int = 0
    """Number of tokens with a weight other than 0, before truncation."""
    num_kept_tokens: int = 0
    """Number of tokens after truncation."""
    num_kept_trained_tokens: int = 0
    """Number of trained tokens after truncation; 0 means that the row trains nothing."""

    @property
    def is_truncated(self) -> bool:
        return self.num_kept_tokens < self.num_tokens


def conversation_to_datum(
    conversation: list[Message],
    renderer: Renderer,
    max_length: int | None,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    reduction: Reduction = "mean",
) -> tinker.Datum:
    """Render a conversation into one datum.

    Raises:
        DataValidationError: the conversation needs several datums with this renderer; see
            `conversation_to_datums`.
    """
    datums = conversation_to_datums(
        conversation, renderer, max_length, train_on_what=train_on_what, reduction=reduction
    )
    if len(datums) == 1:
        return datums[0]
    raise DataValidationError(
        f"the conversation needs {len(datums)} datums with {type(renderer).__name__} and "
        f"train_on_what={TrainOnWhat(train_on_what).value}, because this renderer writes earlier "
        "turns differently once they are history; one datum would train prefixes that sampling "
        "never produces. Use conversation_to_datums (as a flatmap_fn), "
        "train_on_what=last_assistant_message, or a renderer that keeps the history."
    )


def conversation_to_datums(
    conversation: list[Message],
    renderer: Renderer,
    max_length: int | None,
    *,
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    reduction: Reduction = "mean",
) -> list[tinker.Datum]:
    """Render a conversation into datums: one if the format allows it.

    Args:
        reduction: "mean" divides by the number of trained tokens of the whole conversation, so it
            has the same weight in a batch whether it takes one datum or several.
    """
    examples = renderer.build_supervised_examples(conversation, train_on_what=train_on_what)
    return _rendered_row(examples, max_length, reduction).datums


def _rendered_row(
    examples: Sequence[Example], max_length: int | None, reduction: Reduction
) -> RenderedRow:
    datums = [
        datum_from_model_input_weights(model_input, weights, max_length)
        for model_input, weights in examples
    ]
    trained = [np.count_nonzero(_weights(datum)) for datum in datums]
    kept = [datum for datum, count in zip(datums, trained, strict=True) if count] or datums[:1]
    if reduction == "mean":
        total = sum(float(_weights(datum).sum(dtype=np.float64)) for datum in kept)
        for datum in kept if total > 0 else []:
            _weights(datum)[:] /= total
    lengths = [model_input.length for model_input, _ in examples]
    limit = float("inf") if max_length is None else max_length
    return RenderedRow(
        datums=kept,
        num_tokens=sum(lengths),
        num_trained_tokens=sum(int(np.count_nonzero(weights)) for _, weights in examples),
        num_kept_tokens=sum(int(min(length, limit)) for length in lengths),
        num_kept_trained_tokens=int(sum(trained)),
    )


def refuse_without_reply(where: str, conversation: Conversation, mode: TrainOnWhat) -> None:
    """Refuse a row in which `mode` trains replies and there is none, without rendering it.

    Raises:
        ConversationError: naming the row.
    """
    if conversation.text is not None or TrainOnWhat(mode) not in _REPLY_MODES:
        return
    if all(message["role"] != "assistant" for message in conversation.messages):
        reason = _nothing_trained(_NO_REPLY, mode)
        raise ConversationError(f"{where}: {reason}", "nothing to train")


def _nothing_trained(problem: str, mode: TrainOnWhat) -> str:
    return (
        f"{problem}, so train_on_what={TrainOnWhat(mode).value} trains nothing; end it with an "
        "assistant message, or use another train_on_what."
    )


def _start_of_texts(tokenizer: Tokenizer) -> list[int]:
    """Return the token that the tokenizer puts before every text, if it does so."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


def _weights(datum: tinker.Datum) -> np.ndarray:
    return datum.loss_fn_inputs["weights"].to_numpy()


@dataclass(frozen=True)
class ConversationRenderer:
    """Turns rows into datums; picklable, so that other processes can use it.

    A row that trains nothing although nothing was cut off is refused. A row whose trained tokens
    are all beyond `max_length` is kept with weights 0 and counted by the dataset, so a batch always
    has the conversations of its index.
    """

    renderer: Renderer
    max_length: int | None
    train_on_what: TrainOnWhat = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    reduction: Reduction = "mean"
    markup: MarkupMode = "convert"

    def __getstate__(self) -> JsonObject:
        renderer_name = self.renderer._renderer_name or ""
        model_name = self.renderer._model_name or ""
        if is_renderer_registered(renderer_name) or is_tokenizer_registered(model_name):
            raise pickle.PicklingError(
                f"renderer {renderer_name!r} or the tokenizer of {model_name!r} is registered in "
                "this process and unknown to others"
            )
        return self.__dict__

    def __call__(self, rows: Sequence[SourceRow]) -> list[RenderedRow]:
        parsed = [(row.where, parse_row(row, self.markup)) for row in rows]
        results = self.render(parsed)
        for result in results:
            if isinstance(result, ConversationError):
                raise result
        return results  # pyright: ignore[reportReturnType]

    def render(
        self, parsed: Sequence[tuple[str, Conversation]]
    ) -> list[RenderedRow | ConversationError]:
        """Render parsed rows, each with its name in errors; an error takes the row's place."""
        plain = [i for i, (_, conversation) in enumerate(parsed) if self._is_plain(conversation)]
        results: dict[int, RenderedRow | ConversationError] = {}
        try:
            conversations = [self._messages(parsed[i][1]) for i in plain]
            batch = self.renderer.build_supervised_batch(conversations, self.train_on_what)
        except _RENDER_ERRORS:  # one of them is invalid, so each is rendered separately
            pass
        else:
            for i, examples in zip(plain, batch, strict=True):
                results[i] = self._result(*parsed[i], examples)
        return [results.get(i) or self._render_one(*row) for i, row in enumerate(parsed)]

    def _render_one(
        self, where: str, conversation: Conversation
    ) -> RenderedRow | ConversationError:
        try:
            if conversation.text is not None:
                examples = [self._text_example(conversation.text)]
            else:
                examples = self.renderer.build_supervised_examples(*self.marked(conversation))
        except _RENDER_ERRORS as error:
            hint = _MARKUP_HINT if NOTE_CONVERTED in conversation.notes else ""
            return ConversationError(f"{where}: {error}{hint}", "cannot be rendered")
        return self._result(where, conversation, examples)

    def marked(self, conversation: Conversation) -> tuple[list[Message], TrainOnWhat]:
        """Return the messages to render, with declared tools, and what is trained of them.

        Raises:
            RendererError: a format without tools, or weights that the mode does not use.
        """
        messages = self._messages(conversation)
        if self._is_plain(conversation):
            return messages, self.train_on_what
        return self._with_weights(messages, conversation)

    def _is_plain(self, conversation: Conversation) -> bool:
        """Whether `train_on_what` alone decides what is trained of a row."""
        if conversation.text is not None or conversation.weightless:
            return False
        if self.train_on_what not in _REPLY_MODES:
            return True
        return not any(
            message["role"] == "assistant"
            for message in conversation.messages[: conversation.num_context]
        )

    def _with_weights(
        self, messages: list[Message], conversation: Conversation
    ) -> tuple[list[Message], TrainOnWhat]:
        """Mark what `train_on_what` trains, except messages of weight 0 and replies of a prompt.

        Raises:
            RendererError: a mode that does not choose messages.
        """
        mode = TrainOnWhat(self.train_on_what)
        if mode in (TrainOnWhat.ALL_TOKENS, TrainOnWhat.CUSTOMIZED):
            raise RendererError(
                f"weight=0 of a message cannot be used with train_on_what={mode.value}; leave the "
                "weights out, or use another train_on_what."
            )
        num_declared = len(messages) - len(conversation.messages)
        context = conversation.num_context if mode in _REPLY_MODES else 0
        trained = [
            index
            for index in trained_messages(messages, mode)
            if index - num_declared not in conversation.weightless
            and index - num_declared >= context
        ]
        marked: list[Any] = [
            {**message, "trainable": index in trained} for index, message in enumerate(messages)
        ]
        return marked, TrainOnWhat.CUSTOMIZED

    def _text_example(self, text: str) -> Example:
        """Return the tokens of a document: begin-of-sequence if the format has it, the text, and
        end-of-document."""
        import tinker

        tokenizer: Any = self.renderer.tokenizer
        start = list(self.renderer.bos_ids) or _start_of_texts(tokenizer)
        ids = self.renderer.encoder.encode_markup(text)
        if ids[: len(start)] != start:
            ids = [*start, *ids]
        eos = getattr(tokenizer, "eos_token_id", None)
        if eos is not None and not text.rstrip().endswith(str(tokenizer.decode([eos]))):
            ids = [*ids, eos]
        weights = np.ones(len(ids), np.float32)
        weights[: len(start)] = 0
        return tinker.ModelInput.from_ints(ids), weights

    def _result(
        self, where: str, conversation: Conversation, examples: Sequence[Example]
    ) -> RenderedRow | ConversationError:
        try:
            rendered = _rendered_row(examples, self.max_length, self.reduction)
        except DataError as error:
            return ConversationError(f"{where}: {error}", "cannot be rendered")
        if rendered.num_trained_tokens == 0:
            reason = self._why_nothing_is_trained(conversation)
            return ConversationError(f"{where}: {reason}", "nothing to train")
        return rendered

    def _messages(self, conversation: Conversation) -> list[Message]:
        """The messages, with the row's tools declared the way the chat format does it."""
        return self.renderer.declare_tools(conversation.messages, conversation.tools)

    def _why_nothing_is_trained(self, conversation: Conversation) -> str:
        roles = [message["role"] for message in conversation.messages]
        if conversation.weightless or conversation.num_context:
            return (
                "every reply that train_on_what would train has weight 0 or belongs to the prompt, "
                "so nothing is trained; leave the row out, or give one of them weight 1."
            )
        if self.train_on_what == TrainOnWhat.CUSTOMIZED:
            return "no message has trainable=true; mark at least one, or use another train_on_what."
        if "assistant" not in roles:
            problem = _NO_REPLY
        elif roles[-1] != "assistant":
            problem = f"the last message is from {roles[-1]!r}"
        else:
            problem = "the conversation has no trained token"
        return _nothing_trained(problem, self.train_on_what)
