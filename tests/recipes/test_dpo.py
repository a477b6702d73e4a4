"""The preference recipe: pairs of the model's own replies, pairs from a file, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.preference.dpo import __main__ as dpo
from recipes.preference.dpo import own_replies, word_count
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.jsonl_log import read_rows


def test_held_out_topics_are_not_in_the_pairs():
    asked = own_replies.draw_requests(own_replies.HELD_OUT_TOPICS, 50, seed=1)
    trained = own_replies.TRAINED_TOPICS
    assert not any(f"about {topic}." in question for question, _ in asked for topic in trained)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [(("one two three", True), 1.0), (("one two three", False), 0.9), (("", True), 0.0)],
)
def test_a_reply_that_is_cut_off_loses_a_tenth(reply: tuple[str, bool], expected: float):
    assert own_replies.score(reply, 3) == pytest.approx(expected)


def test_replies_are_paired_from_the_outside_in():
    replies = [("one two", True), ("one", True), ("", True), ("one two three four", True)]
    rows = own_replies.pair_replies("Q", 2, replies)
    assert rows == [
        {"prompt": "Q", "chosen": "one two", "rejected": "..."},
        {"prompt": "Q", "chosen": "one", "rejected": "one two three four"},
    ]


def test_a_win_is_a_larger_grade_and_a_tie_counts_half():
    assert word_count.win_rate([1.0, 0.5], [0.5, 0.0]) == pytest.approx(3.5 / 4)


def words(local_service, log_path: Path, **settings: object) -> list[str]:
    common = {
        "model_name": local_service.model,
        "base_url": local_service.base_url,
        "renderer_name": "chatml",
        "log_path": log_path,
        "lora_rank": 2,
        "batch_size": 2,
        "test_size": 2,
        "max_steps": 2,
        **settings,
    }
    return [f"{key}={value}" for key, value in common.items()]


def test_the_recipe_makes_pairs_trains_and_resumes(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    # A random model never writes the asked number of words; any difference makes a pair here.
    monkeypatch.setattr(own_replies, "count_reward", lambda reply, num_words: len(reply) / 1000)
    monkeypatch.setattr(own_replies, "MIN_DIFFERENCE", 0.001)
    settings = words(local_service, tmp_path / "run", num_prompts=8, samples_per_prompt=4)
    run_in_this_process(dpo, settings)
    pairs = read_rows(tmp_path / "run" / own_replies.PAIRS_FILE)
    assert len(pairs) >= 4
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"test/reward", "test/reward/stderr", "test/accuracy"} <= rows[-1].keys()
    assert rows[0]["test/win_rate"] == 0.5  # the first replies are compared with themselves
    out = capsys.readouterr().out
    assert "held-out accuracy  0.5000 -> " in out
    assert "\nsample   tinker-cookbook sample tinker://" in out
    run_in_this_process(dpo, settings)
    assert "already complete" in capsys.readouterr().out


def test_pairs_come_from_a_file(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_in_this_process(dpo, words(local_service, tmp_path / "run", data=path, loss="ipo"))
    assert "data     6 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0 is too small for a pair; use 1 or more"),
        ({"samples_per_prompt": 1}, "samples_per_prompt=1 is too small for a pair; use 2 or more"),
        ({"batch_size": 145}, "batch_size=145 is more than the 144 pairs"),
        ({"dpo_beta": -1.0}, "dpo_beta=-1.0 is not above 0"),
    ],
)
def test_settings_that_give_no_pairs_are_refused_before_sampling(bad: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        dpo.Config(**bad)


def test_pairs_beyond_the_context_are_refused_before_replies_are_sampled(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    with pytest.raises(SystemExit):
        run_in_this_process(dpo, words(local_service, tmp_path / "run", max_length=5000))
    assert "max_length=5000 is more than the 1024 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run" / own_replies.PAIRS_FILE).exists()
