"""The prompt distillation recipe: its words, two steps on a tiny model, and resuming."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.prompt_distillation import __main__ as prompt_distillation
from recipes.prompt_distillation import create_data, letters, train
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook.distillation.prompt_distillation import REPLIES_FILE
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.jsonl_log import read_rows


def test_examples_training_and_test_share_no_word():
    shots, trained, test = letters.split_words(8, seed=0)
    assert len(shots) == 8
    assert len(test) == 38
    assert len({*shots, *trained, *test}) == len(letters.WORDS)
    assert len(set(letters.WORDS)) == len(letters.WORDS)


@pytest.mark.parametrize(
    ("reply", "expected"), [("C", True), (" c.", True), ("castle", False), ("D", False)]
)
def test_the_first_letter_is_right(reply: str, expected: bool):
    assert letters.is_correct(reply, "castle") is expected


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
    assert len(replies) == len(letters.WORDS) - 2
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


def test_the_recipe_runs_in_two_commands(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    replies = tmp_path / "replies.jsonl"
    settings = [
        f"model_name={local_service.model}",
        f"base_url={local_service.base_url}",
        "renderer_name=chatml",
        "num_shots=2",
        f"replies={replies}",
    ]
    run_in_this_process(create_data, settings)
    rows = read_rows(replies)
    assert len(rows) == len(letters.WORDS) - 2
    assert not (tmp_path / "run").exists()
    more = [f"log_path={tmp_path / 'run'}", "lora_rank=2", "max_steps=1", "eval_every=0"]
    run_in_this_process(train, [*settings, *more])
    assert "replies of the teacher" in capsys.readouterr().out
    assert not (tmp_path / "run" / REPLIES_FILE).exists()
    assert read_rows(replies) == rows


BAD_FILES = [
    ('{"text": "x"}\n', "line 1: expected a JSON object with question, tokens, ended; got"),
    ("hello\n", "line 1: expected a JSON object with .*create_data"),
    ("", "batch_size=16 is more than the 0 replies in .*replies.jsonl; use a smaller"),
    (None, "is a folder; name a file"),
]


@pytest.mark.parametrize(("content", "words"), BAD_FILES)
def test_a_wrong_file_of_replies_is_named(
    local_service, tmp_path: Path, monkeypatch, capsys, content: str | None, words: str
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    replies = tmp_path / "replies.jsonl"
    if content is None:
        replies.mkdir()
    else:
        replies.write_text(content)
    settings = [f"model_name={local_service.model}", f"base_url={local_service.base_url}"]
    settings += ["renderer_name=chatml", f"replies={replies}", f"log_path={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        run_in_this_process(prompt_distillation, settings)
    assert re.search(words, capsys.readouterr().err)


def test_examples_that_leave_no_word_are_refused():
    with pytest.raises(ConfigurationError, match=r"num_shots=500 is too many.* at most"):
        letters.split_words(500, seed=0)
