"""Comparisons of two completions, their rendering as a chat, and the models that judge them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import chz

from tinker_cookbook.completers import MessageCompleter, TinkerMessageCompleter
from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.train_on_what import TrainOnWhat
from tinker_cookbook.renderers.types import Message

if TYPE_CHECKING:
    import numpy as np
    import tinker

    from tinker_cookbook.renderers.base import Renderer
    from tinker_cookbook.service import Connection
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "Comparison",
    "ComparisonRenderer",
    "ComparisonRendererFromChatRenderer",
    "Label",
    "LabeledComparison",
    "PreferenceModel",
    "PreferenceModelBuilder",
    "PreferenceModelBuilderFromChatRenderer",
    "PreferenceModelFromChatRenderer",
    "PreferenceModelFromCompleter",
    "connect_to_weights",
]

Label = Literal["A", "B", "Tie"]
SWAPPED: dict[Label, Label] = {"A": "B", "B": "A", "Tie": "Tie"}
SCORES: dict[str, float] = {"a": -1.0, "b": 1.0, "tie": 0.0}
JUDGE_TOKENS = 4


@dataclass
class Comparison:
    """A conversation and two completions of it."""

    prompt_conversation: list[Message]
    completion_A: list[Message]
    completion_B: list[Message]

    def swap(self) -> Comparison:
        """Return the comparison with A and B exchanged."""
        return Comparison(self.prompt_conversation, self.completion_B, self.completion_A)


@dataclass
class LabeledComparison:
    """A comparison and the label of the better completion."""

    comparison: Comparison
    label: Label
    source: str | None = field(default=None, compare=False)
    """Where it was read from, such as `pairs.jsonl:12`; errors name it."""

    def __post_init__(self) -> None:
        if self.label not in SWAPPED:
            raise DataFormatError(f"label={self.label!r} is unknown; use A, B or Tie.")

    def swap(self) -> LabeledComparison:
        """Return the comparison with A and B exchanged, and the label adapted."""
        return LabeledComparison(self.comparison.swap(), SWAPPED[self.label], self.source)


class ComparisonRenderer:
    """Renders comparisons as tokens."""

    def build_generation_prompt(self, comparison: Comparison) -> tinker.ModelInput:
        """Return the prompt that a judge completes with its label."""
        raise NotImplementedError

    def to_model_input_weights(
        self, labeled_comparison: LabeledComparison
    ) -> tuple[tinker.ModelInput, np.ndarray]:
        """Return the tokens, and float32 loss weights that train the label."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        raise NotImplementedError


class ComparisonRendererFromChatRenderer(ComparisonRenderer):
    """Renders the conversation, both completions under headings, and the label as a reply."""

    def __init__(self, convo_renderer: Renderer) -> None:
        self.convo_renderer = convo_renderer

    def messages(self, comparison: Comparison) -> list[Message]:
        """Return the chat that a judge answers with A, B or Tie."""
        return [
            *comparison.prompt_conversation,
            _heading("Completion A"),
            *comparison.completion_A,
            _heading("Completion B"),
            *comparison.completion_B,
            _heading("Preference"),
        ]

    def build_generation_prompt(self, comparison: Comparison) -> tinker.ModelInput:
        """Return the chat and the start of the judge's reply."""
        return self.convo_renderer.build_generation_prompt(self.messages(comparison))

    def to_model_input_weights(
        self, labeled_comparison: LabeledComparison
    ) -> tuple[tinker.ModelInput, np.ndarray]:
        """Return the chat with the label as its last reply; only the label is trained."""
        label: Message = {"role": "assistant", "content": labeled_comparison.label}
        return self.convo_renderer.build_supervised_example(
            [*self.messages(labeled_comparison.comparison), label],
            train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the chat renderer."""
        return self.convo_renderer.tokenizer


class PreferenceModel:
    """Judges a comparison."""

    async def __call__(self, comparison: Comparison) -> float:
        """Return -1 if A is better, 1 if B is better, 0 for a tie, or a value in between."""
        raise NotImplementedError


class PreferenceModelBuilder:
    """Builds a judge in the process that uses it; builders can be pickled, judges cannot always."""

    def __call__(self) -> PreferenceModel:
        """Return a judge."""
        raise NotImplementedError


class PreferenceModelFromChatRenderer(PreferenceModel):
    """A judge trained on `ComparisonRendererFromChatRenderer`, sampled greedily."""

    def __init__(self, convo_renderer: Renderer, sampling_client: tinker.SamplingClient) -> None:
        self.comparison_renderer = ComparisonRendererFromChatRenderer(convo_renderer)
        self.sampling_client = sampling_client
        self._completer = TinkerMessageCompleter(
            sampling_client, convo_renderer, JUDGE_TOKENS, temperature=0.0
        )

    async def __call__(self, comparison: Comparison) -> float:
        """Return -1, 0 or 1; a reply without a label counts as a tie."""
        return await _ask(self._completer, self.comparison_renderer.messages(comparison))


class PreferenceModelFromCompleter(PreferenceModel):
    """A judge that was not trained to judge: any chat model, with an instruction."""

    def __init__(self, completer: MessageCompleter, question: str) -> None:
        """Keep the judge.

        Args:
            completer: A model of the service, or of any OpenAI-compatible endpoint.
            question: The criterion, e.g. `Which completion is more polite?`.
        """
        self._completer = completer
        self._question = question

    async def __call__(self, comparison: Comparison) -> float:
        """Return -1, 0 or 1; a reply without a label counts as a tie."""
        parts = [
            ("Conversation", comparison.prompt_conversation),
            ("Completion A", comparison.completion_A),
            ("Completion B", comparison.completion_B),
        ]
        shown = "\n\n".join(f"==== {title} ====\n{_as_text(part)}" for title, part in parts)
        request = f"{shown}\n\n{self._question} Reply with A, B or Tie only."
        return await _ask(self._completer, [{"role": "user", "content": request}])


@chz.chz
class PreferenceModelBuilderFromChatRenderer(PreferenceModelBuilder):
    """Builds a judge from saved weights."""

    renderer_name: str
    model_name: str
    rm_weights_path: str
    base_url: str | None = None

    def __call__(self) -> PreferenceModel:
        """Return the judge, on `base_url` or on the service that the run uses."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        client = connect_to_weights(self.rm_weights_path, self.base_url)
        return PreferenceModelFromChatRenderer(renderer, client)


def connect_to_weights(
    path: str | None, base_url: str | None, model_name: str | None = None
) -> tinker.SamplingClient:
    """Return a sampling client of saved weights; without a path, of the base model.

    The service is `base_url`, or the one that the run uses.
    """
    from tinker_cookbook import service

    connection = _connect(base_url) if base_url else service.current_connection()
    return _open_weights(path, None if path else model_name, connection)


@functools.lru_cache(maxsize=8)
def _connect(base_url: str) -> Connection:
    from tinker_cookbook import service

    return service.connect(base_url)


@functools.lru_cache(maxsize=8)
def _open_weights(
    path: str | None, model_name: str | None, connection: Connection
) -> tinker.SamplingClient:
    from tinker_cookbook.utils.sdk_compat import wait_for_client

    create = connection.service_client().create_sampling_client
    return wait_for_client(create(model_path=path, base_model=model_name))


async def _ask(completer: MessageCompleter, messages: list[Message]) -> float:
    reply = get_text_content(await completer(messages)).strip()
    word = reply.split()[0].strip(".,:;*\"'").lower() if reply else ""
    return SCORES.get(word, 0.0)


def _heading(text: str) -> Message:
    return {"role": "system", "content": f"==== {text} ===="}


def _as_text(messages: list[Message]) -> str:
    return "\n".join(f"{message['role']}: {get_text_content(message)}" for message in messages)
