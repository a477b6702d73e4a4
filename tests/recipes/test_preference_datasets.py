"""Public sets of comparisons: rows of the shapes that the hub publishes, read from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.preference import datasets as sets
from recipes.preference.dpo import train
from tests.assets import tokenizer_folder
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import get_text_content

ROWS: dict[str, list[dict[str, Any]]] = {
    "hhh": [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name?\n\nAssistant: Ann.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name?\n\nAssistant: No.",
        },
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
    ],
    "helpsteer3": [
        {
            "domain": "general",
            "language": "english",
            "context": [{"role": "user", "content": "Name?"}],
            "response1": "No.",
            "response2": "Ann.",
            "overall_preference": 2,
        },
        {
            "context": [{"role": "user", "content": "Name?"}],
            "response1": "Ann.",
            "response2": "Bob.",
            "overall_preference": 0,
        },
    ],
    "helpsteer2": [
        {"prompt": "Name?", "response": "No.", "helpfulness": 1, "correctness": 4},
        {"prompt": "Name?", "response": "Ann.", "helpfulness": 4, "correctness": 4},
        {"prompt": "Age?", "response": "Nine.", "helpfulness": 2, "correctness": 1},
        {"prompt": "Age?", "response": "Ten.", "helpfulness": 2, "correctness": 1},
    ],
    "ultrafeedback": [
        {
            "source": "evol_instruct",
            "instruction": "Name?",
            "chosen_response": "Ann.",
            "rejected_response": "No.",
            "chosen_avg_rating": 5.0,
        },
        {"instruction": "Age?", "chosen_response": "Ten.", "rejected_response": "Ten."},
    ],
    "arena": [
        {
            "winner": "model_b",
            "conversation_a": [
                {"role": "user", "content": [{"type": "text", "text": "Name?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
            ],
            "conversation_b": [
                {"role": "user", "content": [{"type": "text", "text": "Name?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Ann."}]},
            ],
        },
        {
            "winner": "model_a",
            "conversation_a": [
                {"role": "user", "content": [{"type": "image", "image": "x"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
            ],
            "conversation_b": [],
        },
    ],
    "tulu38b": [
        {
            "id": "1",
            "prompt": "Name?",
            "chosen": [
                {"role": "user", "content": "Name?"},
                {"role": "assistant", "content": "Ann."},
            ],
            "rejected": [
                {"role": "user", "content": "Name?"},
                {"role": "assistant", "content": "No."},
            ],
        }
    ],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", sets.COMPARISON_BUILDERS)
def test_published_rows_become_comparisons(name: str, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[name])
    trained, _ = sets.COMPARISON_BUILDERS[name](file_path=path).get_labeled_comparisons()
    kept = [one for one in trained if one.label != "Tie"]
    assert len(kept) == 1, "the second row of each set is not a comparison, or is a tie"
    pair = kept[0].comparison if kept[0].label == "A" else kept[0].comparison.swap()
    assert get_text_content(pair.prompt_conversation[-1]) == "Name?"
    assert [get_text_content(message) for message in pair.completion_A] == ["Ann."]
    assert [get_text_content(message) for message in pair.completion_B] == ["No."]
    assert len(trained) - len(kept) == (name == "helpsteer3"), "a tie is kept, to be counted"


def test_a_folder_has_the_splits_of_the_hub(tmp_path: Path):
    rows = ROWS["hhh"][:1]
    write_rows(tmp_path / "train.jsonl", rows * 3)
    write_rows(tmp_path / "test.jsonl", rows * 2)
    builder = sets.HHHComparisonBuilder(file_path=str(tmp_path), test_size=1)
    trained, held_out = builder.get_labeled_comparisons()
    assert held_out is not None
    assert (len(trained), len(held_out)) == (3, 1)


@pytest.mark.parametrize("name", sets.COMPARISON_BUILDERS)
def test_without_a_hub_the_data_sets_are_missed_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    builder = sets.COMPARISON_BUILDERS[name]
    with pytest.raises(
        ConfigurationError, match=rf"{builder.hub_name} cannot be fetched.*file_path"
    ):
        builder().get_labeled_comparisons()


def test_a_data_set_is_chosen_by_name(tmp_path: Path):
    model = str(tokenizer_folder("qwen3_instruct_2507"))
    path = write_rows(tmp_path / "rows.jsonl", ROWS["tulu38b"] * 4)
    builder = train.get_dataset_builder("tulu38b", model, "qwen3_instruct", 64, 2, path)
    dataset, _ = builder()
    assert len(dataset) == 2
    assert len(dataset.get_batch(0)) == 4
    with pytest.raises(ConfigurationError, match=r"dataset=hh is unknown\. Did you mean 'hhh'"):
        train.get_dataset_builder("hh", model, "qwen3_instruct", 64, 2)
    with pytest.raises(ConfigurationError, match="dataset=webgpt is unknown"):
        train.get_dataset_builder("webgpt", model, "qwen3_instruct", 64, 2)
    assert train.CLIConfig().learning_rate == 1e-5
    assert (train.CLIConfig().batch_size, train.CLIConfig().max_length) == (256, 8192)
