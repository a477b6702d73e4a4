"""The recipes of a reward model and of self-play for short replies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from recipes.preference.reward_model import __main__ as reward_model
from recipes.preference.reward_model.help_requests import (
    FRIENDLY,
    UNFRIENDLY,
    HelpRequestComparisons,
)
from recipes.preference.shorter import __main__ as shorter
from recipes.preference.shorter.env import (
    PreferenceModelShorter,
    ShorterComparisonBuilder,
    ShorterPreferenceModelBuilder,
)
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook.preference.types import Comparison
from tinker_cookbook.utils.jsonl_log import read_rows


def compare(first: str, second: str) -> Comparison:
    return Comparison(
        [{"role": "user", "content": "Speak."}],
        [{"role": "assistant", "content": first}],
        [{"role": "assistant", "content": second}],
    )


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [("a", "bc", -1), ("bc", "a", 1), ("ab", "cd", 0), ("", "a", 1), (" ", "", 0)],
)
def test_the_shorter_text_wins_and_no_text_loses(first: str, second: str, verdict: float):
    judge = ShorterPreferenceModelBuilder()()
    assert isinstance(judge, PreferenceModelShorter)
    assert asyncio.run(judge(compare(first, second))) == verdict


def test_questions_have_no_completions():
    trained, held_out = ShorterComparisonBuilder(num_comparisons=10).get_labeled_comparisons()
    assert (len(trained), held_out) == (10, None)
    assert trained[0].comparison.completion_A == []
    assert trained[0].comparison == trained[8].comparison


def common(local_service, log_path: Path, **changes: object) -> list[str]:
    settings = {
        "model_name": local_service.model,
        "base_url": local_service.base_url,
        "renderer_name": "chatml",
        "log_path": log_path,
        "lora_rank": 4,
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def service(local_service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    return local_service


def test_the_tournament_is_a_zero_sum_game(service, tmp_path: Path):
    log_path = tmp_path / "run"
    run_in_this_process(shorter, common(service, log_path, max_tokens=12, num_batches=3))
    rows = read_rows(log_path / "metrics.jsonl")
    assert len(rows) == 3
    assert rows[0]["env/all/by_group/frac_mixed"] == 1.0
    assert all(abs(row["env/all/win_minus_loss"]) < 1e-9 for row in rows)
    assert all(row["env/all/length_adjustment"] == 0.0 for row in rows)


def test_held_out_replies_are_phrased_in_other_ways():
    trained, held_out = HelpRequestComparisons(
        num_comparisons=60, swap=True
    ).get_labeled_comparisons()
    assert len(trained) == 120
    assert {one.label for one in trained} == {"A", "B", "Tie"}
    assert held_out is not None
    assert {one.label for one in held_out} == {"A", "B"}
    for replies in (FRIENDLY, UNFRIENDLY):
        assert not set(replies["train"]) & set(replies["test"])
    asked = {str(one.comparison.prompt_conversation[0]["content"]) for one in trained}
    assert not asked & {str(o.comparison.prompt_conversation[0]["content"]) for o in held_out}
    lengths = [sum(len(text) for text in replies["train"]) for replies in (FRIENDLY, UNFRIENDLY)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.25)  # length does not tell


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_a_judge_of_each_kind_learns_a_file(service, tmp_path: Path, kind: str, capsys):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"no {n}"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "kind": kind,
        "data": path,
        "test_size": 8,
        "num_epochs": 20,
        "max_steps": 40,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "eval_every": 40,
    }
    words = common(service, tmp_path / "run", **settings)
    run_in_this_process(reward_model, words)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 40
    assert rows[-1]["test/auc"] > 0.9
    assert rows[-1]["test/num_comparisons"] == 8
    assert "held-out accuracy  " in capsys.readouterr().out


def test_a_dry_run_of_the_pairwise_judge_counts_both_orders(tiny_model_folder: Path, capsys):
    settings = [f"model_name={tiny_model_folder}", "renderer_name=chatml", "base_url=local"]
    run_in_this_process(
        reward_model, [*settings, "dry_run=true", "max_steps=3", "batch_size=4", "lora_rank=4"]
    )
    assert "rows     24 sequences in 3 steps" in capsys.readouterr().out
