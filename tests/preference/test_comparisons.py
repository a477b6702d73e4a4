"""Comparisons: swapping, rendering, reading from files, and judges."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

import chz
import numpy as np
import pytest

from tinker_cookbook import renderers, service, tokenizer_utils
from tinker_cookbook.completers import MessageCompleter
from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference import Comparison, LabeledComparison
from tinker_cookbook.preference.comparison_policy_evaluator import ComparisonEvaluator
from tinker_cookbook.preference.preference_datasets import (
    ChatDatasetBuilderFromComparisons,
    ComparisonBuilderFromJsonl,
)
from tinker_cookbook.preference.types import (
    ComparisonRendererFromChatRenderer,
    PreferenceModel,
    PreferenceModelBuilderFromChatRenderer,
    PreferenceModelFromChatRenderer,
    PreferenceModelFromCompleter,
)
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils.sdk_compat import wait_for_client


def compare(first: str = "short", second: str = "rather long") -> Comparison:
    return Comparison(
        [{"role": "user", "content": "Speak."}],
        [{"role": "assistant", "content": first}],
        [{"role": "assistant", "content": second}],
    )


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


@pytest.fixture
def comparisons_file(tmp_path: Path) -> Path:
    rows = [{"comparison": vars(compare(f"a{i}", f"b{i}")), "label": "AB"[i % 2]} for i in range(5)]
    path = tmp_path / "comparisons.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_swapping_twice_changes_nothing():
    labeled = LabeledComparison(compare(), "A")
    assert labeled.swap().label == "B"
    assert labeled.swap().comparison.completion_A == labeled.comparison.completion_B
    assert labeled.swap().swap() == labeled
    assert LabeledComparison(compare(), "Tie").swap().label == "Tie"
    with pytest.raises(DataFormatError, match="label='C' is unknown; use A, B or Tie"):
        LabeledComparison(compare(), "C")  # pyright: ignore[reportArgumentType]


def test_only_the_label_is_trained_and_the_prompt_is_that_of_judging(renderer):
    written = ComparisonRendererFromChatRenderer(renderer)
    model_input, weights = written.to_model_input_weights(LabeledComparison(compare(), "Tie"))
    tokens = model_input.to_ints()
    trained = [token for token, weight in zip(tokens, weights, strict=True) if weight]
    assert renderer.tokenizer.decode(trained).startswith("Tie")
    prompt = written.build_generation_prompt(compare()).to_ints()
    assert tokens[: len(prompt)] == prompt
    assert not np.any(weights[: len(prompt)])
    text = renderer.tokenizer.decode(prompt)
    assert text.index("short") < text.index("Completion B") < text.index("rather long")


def test_files_become_supervised_data(comparisons_file: Path, tiny_model_folder: Path):
    builder = ComparisonBuilderFromJsonl(train_path=str(comparisons_file))
    trained, held_out = builder.get_labeled_comparisons()
    assert ([one.label for one in trained], held_out) == (["A", "B", "A", "B", "A"], None)
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(tiny_model_folder),
        renderer_name="chatml",
        max_length=None,
        batch_size=2,
    )
    both = ChatDatasetBuilderFromComparisons(
        common_config=common, comparison_builder=builder, swap=True
    )
    dataset, test = both()
    assert (len(dataset), test) == (5, None)
    first = dataset.get_batch(0)
    assert len(first) == 2
    dataset.set_epoch(1)
    assert [d.model_input.to_ints() for d in dataset.get_batch(0)] != [
        d.model_input.to_ints() for d in first
    ]


def test_a_comparison_whose_label_would_be_cut_is_refused(
    comparisons_file: Path, tiny_model_folder: Path
):
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(tiny_model_folder),
        renderer_name="chatml",
        max_length=None,
        batch_size=1,
    )
    comparisons = ComparisonBuilderFromJsonl(train_path=str(comparisons_file))
    [one, *_], _ = comparisons.get_labeled_comparisons()
    builder = ChatDatasetBuilderFromComparisons(
        common_config=common, comparison_builder=comparisons
    )
    whole = builder.datum(one)
    length = whole.model_input.length + 1
    fitting = chz.replace(builder, common_config=chz.replace(common, max_length=length))
    same = fitting.datum(one)
    assert same.model_input.to_ints() == whole.model_input.to_ints()
    assert same.loss_fn_inputs["weights"].to_numpy().sum() > 0
    short = chz.replace(builder, common_config=chz.replace(common, max_length=length - 1))
    message = rf"\.jsonl:1: .* has {length} tokens, more than max_length={length - 1}"
    with pytest.raises(DataValidationError, match=message):
        short.datum(one)


def test_a_wrong_row_is_named(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"comparison": {"completion_A": []}, "label": "A"}\n')
    with pytest.raises(
        DataFormatError, match=r"bad\.jsonl:1: comparison\.prompt_conversation is missing"
    ):
        ComparisonBuilderFromJsonl(train_path=str(path)).get_labeled_comparisons()


class Saying(MessageCompleter):
    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[Message] = []

    async def __call__(self, messages: list[Message]) -> Message:
        self.asked = messages
        return {"role": "assistant", "content": self.text}


@pytest.mark.parametrize(
    ("text", "score"), [("A", -1), (" b. ", 1), ("Tie", 0), ("Both are fine", 0), ("", 0)]
)
def test_the_first_word_of_a_judge_counts(text: str, score: float):
    completer = Saying(text)
    judge = PreferenceModelFromCompleter(completer, "Which is shorter?")
    assert asyncio.run(judge(compare())) == score
    assert "Which is shorter?" in str(completer.asked[0]["content"])


class Shorter(PreferenceModel):
    """Prefers the shorter completion."""

    async def __call__(self, comparison: Comparison) -> float:
        lengths = [
            len(str(part[-1]["content"]))
            for part in (comparison.completion_A, comparison.completion_B)
        ]
        return float(np.sign(lengths[0] - lengths[1]))


@pytest.mark.parametrize("both_ways", [True, False])
def test_the_win_rate_is_that_of_the_policy(local_service, both_ways: bool):
    created = local_service.connect().create_sampling_client(base_model=local_service.model)
    client = wait_for_client(created)
    long = [compare("x" * 500) for _ in range(3)]
    evaluator = ComparisonEvaluator(
        Shorter, long, "chatml", local_service.model, both_ways=both_ways, max_tokens=4
    )
    assert asyncio.run(evaluator(client)) == {"win_rate": 1.0, "win_rate/stderr": 0.0}


def test_saved_weights_judge(local_service, renderer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    created = local_service.connect().create_lora_training_client(local_service.model, rank=2)
    training = wait_for_client(created)
    path = training.save_weights_for_sampler("judge").result().path
    builder = PreferenceModelBuilderFromChatRenderer(
        renderer_name="chatml", model_name=local_service.model, rm_weights_path=path
    )
    assert pickle.loads(pickle.dumps(builder)) == builder
    with service.connect(local_service.base_url, local_service.model):
        judge = builder()
        assert isinstance(judge, PreferenceModelFromChatRenderer)
        assert asyncio.run(judge(compare())) in (-1.0, 0.0, 1.0)
