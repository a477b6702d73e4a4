"""Public sets of comparisons by name, as programs of the Tinker cookbook import them.

Rows come from the Hugging Face hub, or from a local copy (`file_path`): a file or a folder in the
shape that the hub publishes. Ties are labelled, so that they are counted; rows that are not a
comparison are skipped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.hub_datasets import load_hub_table
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, Label, LabeledComparison
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.sources.several import open_data

if TYPE_CHECKING:
    import datasets

__all__ = [
    "COMPARISON_BUILDERS",
    "ArenaComparisonBuilder",
    "HHHComparisonBuilder",
    "HelpSteer2ComparisonBuilder",
    "HelpSteer3ComparisonBuilder",
    "Tulu38BComparisonBuilder",
    "UltraFeedbackComparisonBuilder",
]

ADVICE = (
    "Give a local copy with file_path=ROWS.jsonl, or your own pairs with data=FILE of "
    "recipes.preference.dpo."
)
_HHH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

Row = Mapping[str, Any]


@chz.chz
class _PublicComparisons(ComparisonDatasetBuilder):
    """Rows of the hub or of a local copy; of a single split, some are held out."""

    file_path: str | None = None
    """File or folder to read instead of the hub."""
    test_size: int = 1024
    """Maximum number of held-out rows; at most a tenth where they are taken from the training."""

    hub_name: ClassVar[str]
    hub_config: ClassVar[str | None] = None
    test_split: ClassVar[str | None] = None

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Return the training rows and the held-out ones, both shuffled.

        Raises:
            ConfigurationError: if neither the hub nor the local copy can be read.
        """
        import datasets

        train = self._load("train")
        test = None if self.test_split is None else self._load(self.test_split)
        random.Random(0).shuffle(train)
        if test is None:
            size = min(self.test_size, len(train) // 10)
            train, test = train[size:], train[:size]
        else:
            random.Random(0).shuffle(test)
            test = test[: self.test_size]
        if not train:
            raise ConfigurationError(f"file_path={self.file_path} has no row of {self.hub_name}.")
        table = datasets.Dataset.from_list
        return table(train), table(test) if test else None

    def _load(self, split: str) -> list[Any]:
        if self.file_path is None:
            table = load_hub_table(self.hub_name, self.hub_config, split, advice=ADVICE)
            return self.prepare_rows([dict(row) for row in table])
        named = Path(self.file_path) / f"{split}.jsonl"
        if not Path(self.file_path).is_dir():
            # A single file: its rows are split like those of a data set with one split.
            return self.prepare_rows(_read_rows(self.file_path)) if split == "train" else []
        return self.prepare_rows(_read_rows(str(named)) if named.exists() else [])

    def prepare_rows(self, rows: list[Any]) -> list[Any]:
        """Return the rows that `example_to_labeled_comparison` takes."""
        return rows


@chz.chz
class HHHComparisonBuilder(_PublicComparisons):
    """Anthropic/hh-rlhf: texts of whole conversations, chosen and rejected."""

    hub_name: ClassVar[str] = "Anthropic/hh-rlhf"
    test_split: ClassVar[str | None] = "test"

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one row; None if the conversations differ before the last reply."""
        chosen, rejected = (read_hhh(example[key]) for key in ("chosen", "rejected"))
        return _compare_conversations(chosen, rejected)


@chz.chz
class HelpSteer2ComparisonBuilder(_PublicComparisons):
    """nvidia/HelpSteer2: replies with grades; the most and the least helpful one are a pair."""

    hub_name: ClassVar[str] = "nvidia/HelpSteer2"

    def prepare_rows(self, rows: list[Any]) -> list[Any]:
        """Return one row per prompt that has replies of different helpfulness."""
        by_prompt: dict[str, list[Row]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt"], []).append(row)
        found = []
        for prompt, replies in by_prompt.items():
            ranked = sorted(replies, key=lambda row: row["helpfulness"])
            worst, best = ranked[0], ranked[-1]
            if best["helpfulness"] > worst["helpfulness"]:
                found.append(
                    {"prompt": prompt, "chosen": best["response"], "rejected": worst["response"]}
                )
        return found

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one prepared row."""
        return _compare_texts(_user(example["prompt"]), example["chosen"], example["rejected"])


@chz.chz
class HelpSteer3ComparisonBuilder(_PublicComparisons):
    """nvidia/HelpSteer3, preferences: negative numbers prefer the first reply, 0 is a tie."""

    hub_name: ClassVar[str] = "nvidia/HelpSteer3"
    hub_config: ClassVar[str | None] = "preference"
    test_split: ClassVar[str | None] = "validation"

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one row."""
        strength = example["overall_preference"]
        if strength is None:
            return None
        label: Label = "Tie" if strength == 0 else ("A" if strength < 0 else "B")
        context = [_message(message["role"], message["content"]) for message in example["context"]]
        return _compare_texts(context, example["response1"], example["response2"], label)


@chz.chz
class UltraFeedbackComparisonBuilder(_PublicComparisons):
    """argilla/ultrafeedback-binarized-preferences: an instruction and two replies."""

    hub_name: ClassVar[str] = "argilla/ultrafeedback-binarized-preferences"

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one row."""
        prompt = _user(example["instruction"])
        return _compare_texts(prompt, example["chosen_response"], example["rejected_response"])


@chz.chz
class ArenaComparisonBuilder(_PublicComparisons):
    """lmarena-ai/arena-human-preference-140k: conversations with two models, and the winner."""

    hub_name: ClassVar[str] = "lmarena-ai/arena-human-preference-140k"

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one row; None if it is not text, or does not end with a reply.

        Only the first message is the same for both models, so it alone is the prompt.
        """
        labels: dict[str, Label] = {"model_a": "A", "model_b": "B", "tie": "Tie"}
        label = labels.get(example["winner"].removesuffix(" (bothbad)"))
        first, second = (_read_arena(example[f"conversation_{name}"]) for name in "ab")
        if label is None or first is None or second is None or first[0] != second[0]:
            return None
        return LabeledComparison(Comparison(first[:1], first[1:], second[1:]), label)


@chz.chz
class Tulu38BComparisonBuilder(_PublicComparisons):
    """allenai/llama-3.1-tulu-3-8b-preference-mixture: conversations, chosen and rejected."""

    hub_name: ClassVar[str] = "allenai/llama-3.1-tulu-3-8b-preference-mixture"

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one row; None if the conversations differ before the last reply."""
        chosen, rejected = (
            [_message(message["role"], message["content"]) for message in example[key]]
            for key in ("chosen", "rejected")
        )
        return _compare_conversations(chosen, rejected)


COMPARISON_BUILDERS: dict[str, type[_PublicComparisons]] = {
    "hhh": HHHComparisonBuilder,
    "helpsteer3": HelpSteer3ComparisonBuilder,
    "ultrafeedback": UltraFeedbackComparisonBuilder,
    "helpsteer2": HelpSteer2ComparisonBuilder,
    "arena": ArenaComparisonBuilder,
    "tulu38b": Tulu38BComparisonBuilder,
}
"""Builders by the names that `dataset=` takes."""


def read_hhh(text: str) -> list[Message]:
    """Return the messages of a text with turns of `Human:` and `Assistant:`."""
    parts = _HHH_TURN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        _message(roles[name], content.strip())
        for name, content in zip(parts[0::2], parts[1::2], strict=True)
    ]


def _read_arena(turns: Iterable[Row]) -> list[Message] | None:
    """Return the messages of a conversation; None unless all are text and the last is a reply."""
    messages = []
    for turn in turns:
        parts = turn["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if any(part["type"] != "text" for part in parts):
            return None
        messages.append(_message(turn["role"], " ".join(part.get("text") or "" for part in parts)))
    ends_with_reply = len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages if ends_with_reply else None


def _compare_conversations(
    chosen: list[Message], rejected: list[Message]
) -> LabeledComparison | None:
    """Compare the last replies of two conversations; None if they differ before those."""
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1] or chosen[-1] == rejected[-1]:
        return None
    if not chosen[-1]["role"] == rejected[-1]["role"] == "assistant":
        return None
    return LabeledComparison(Comparison(chosen[:-1], chosen[-1:], rejected[-1:]), "A")


def _compare_texts(
    prompt: list[Message], first: str, second: str, label: Label = "A"
) -> LabeledComparison | None:
    """Compare two replies; None if they are equal."""
    if first == second:
        return None
    replies = ([_message("assistant", text)] for text in (first, second))
    return LabeledComparison(Comparison(prompt, *replies), label)


def _user(text: str) -> list[Message]:
    return [_message("user", text)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _read_rows(path: str) -> list[Any]:
    """Return the rows of a file as objects."""
    import json

    source = open_data(path)
    try:
        values = [row.value for row in source.rows(range(len(source)))]
    finally:
        source.close()
    return [json.loads(value) if isinstance(value, bytes) else value for value in values]
