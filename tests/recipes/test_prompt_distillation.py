"""The prompt distillation recipe: its words, two steps on a tiny model, and resuming."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import prompt_distillation
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook.distillation.prompt_distillation import REPLIES_FILE
from tinker_cookbook.utils.jsonl_log import read_rows


def test_examples_training_and_test_share_no_word():
    shots, trained, test = prompt_distillation.split_words(8, seed=0)
    assert len(shots) == 8
    assert len(test) == 38
    assert len({*shots, *trained, *test}) == len(prompt_distillation.WORDS)
    assert len(set(prompt_distillation.WORDS)) == len(prompt_distillation.WORDS)


@pytest.mark.parametrize(
    ("reply", "expected"), [("C", True), (" c.", True), ("castle", False), ("D", False)]
)
def test_the_first_letter_is_right(reply: str, expected: bool):
    assert prompt_distillation.is_correct(reply, "castle") is expected


def test_the_recipe_trains_and_resumes(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    settings = [
        f"model_name={local_service.model}",
        f"base_url={local_service.base_url}",
        "renderer_name=chatml",
        f"log_path={tmp_path / 'run'}",
        "lora_rank=2",
        "num_shots=2",
        "max_steps=2",
        "eval_every=2",
    ]
    run_in_this_process(prompt_distillation, settings)
    replies = read_rows(tmp_path / "run" / REPLIES_FILE)
    assert len(replies) == len(prompt_distillation.WORDS) - 2
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {"teacher_kl", "teacher_mass", "teacher_entropy", "student_entropy"} <= rows[0].keys()
    assert {"test/accuracy", "test/teacher_accuracy", "test/teacher_kl"} <= rows[-1].keys()
    # The teacher's prompt is not the student's, so the two differ though they are one model.
    assert rows[0]["teacher_kl"] > 0.01
    out = capsys.readouterr().out
    assert "teacher  writes " in out
    assert "\nsample   tinker-cookbook sample tinker://" in out
    run_in_this_process(prompt_distillation, settings)
    assert "already complete" in capsys.readouterr().out
