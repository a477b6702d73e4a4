"""The distillation recipes: their tasks, and a run of each on a tiny model with its teachers."""

# pyright: reportArgumentType=false

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.distillation import (
    multi_teacher,
    off_policy,
    off_policy_reasoning,
    on_policy,
    on_policy_distillation,
    on_policy_multi_teacher,
    tasks,
)
from recipes.sdft import __main__ as sdft
from recipes.sdft import skill, supervised
from recipes.sdft import train as sdft_train
from tests.recipes.recipe_process import run_in_this_process
from tinker_cookbook.rl.problems import Problem
from tinker_cookbook.utils.jsonl_log import read_rows


@pytest.fixture
def settings(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    return [
        f"model_name={local_service.model}",
        f"base_url={local_service.base_url}",
        "renderer_name=chatml",
        f"log_path={tmp_path / 'run'}",
        "lora_rank=2",
        "max_steps=1",
        "max_tokens=3",
    ]


def rows_of(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.parametrize("problems", [tasks.count_problems, tasks.letter_problems])
def test_held_out_problems_are_not_trained_on(problems):
    trained, held_out = problems("train"), problems("test")
    assert held_out
    assert not {p.question for p in trained} & {p.question for p in held_out}


def test_solved_examples_earn_the_whole_reward():
    problems = {problem.question: problem for problem in tasks.count_problems("train")}
    for question, reply in tasks.count_examples():
        assert tasks.count_grade(str(reply["content"]), problems[question["content"]]) == 1.0
    for question, reply in tasks.letter_examples():
        assert str(reply["content"]) == str(question["content"]).split()[-1][0].upper()
    assert tasks.letter_grade(" a.", Problem("", "A")) == 1.0
    assert tasks.letter_grade("an", Problem("", "A")) == 0.0
    assert tasks.count_grade("one two", Problem("", "4")) == 0.5


def test_one_teacher_is_trained_and_then_asked(settings: list[str], tmp_path: Path, capsys):
    small = ["teacher_steps=1", "groups_per_batch=2", "eval_every=1", "topk=4"]
    run_in_this_process(on_policy, [*settings, *small])
    run = tmp_path / "run"
    assert len(rows_of(run / "teachers" / "word_count")) == 2
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 1]
    held_out = {"test/env/all/reward/total", "teacher/env/all/reward/total"}
    assert held_out <= rows[0].keys()
    assert {"teacher_kl/word_count", "top_k/teacher_kl_reverse_stderr"} <= rows[0].keys()
    run_in_this_process(on_policy, [*settings, *small])
    assert "already complete" in capsys.readouterr().out


def test_two_teachers_are_asked_about_their_tasks(settings: list[str], tmp_path: Path):
    small = ["teacher_steps=1", "groups_per_batch=2", "eval_every=1"]
    run_in_this_process(multi_teacher, [*settings, *small])
    [first, last] = rows_of(tmp_path / "run")
    for name in ("word_count", "first_letter"):
        assert f"top_k/teacher_kl_reverse/{name}" in first
        assert f"teacher_kl_stderr/{name}" in first
        assert f"test_{name}/env/all/reward/total" in last
        assert f"teacher_{name}/env/all/reward/total" in last


def test_a_teacher_writes_texts_and_is_asked_about_them(settings: list[str], tmp_path: Path):
    small = ["teacher_steps=1", "num_questions=8", "batch_size=4", "eval_every=1"]
    small += ["n_held_out_targets=64"]
    run_in_this_process(off_policy, [*settings, *small])
    [first, last] = rows_of(tmp_path / "run")
    assert first["teacher_kl_stderr"] > 0
    assert first["trained_length"] <= 3
    assert last["test/teacher_mass"] > first["teacher_mass"], "held-out data have more targets"


def test_the_model_teaches_itself(settings: list[str], tmp_path: Path):
    run_in_this_process(sdft, [*settings, "num_shots=2", "groups_per_batch=2", "eval_every=1"])
    [first, last] = rows_of(tmp_path / "run")
    assert first["top_k/teacher_kl"] > 0
    assert first["test/base_kl"] == pytest.approx(0, abs=0.05)
    assert last["test/base_kl"] != first["test/base_kl"]
    assert "test/accuracy" in last


def test_the_same_skill_supervised(settings: list[str], tmp_path: Path):
    small = [one for one in settings if not one.startswith("max_tokens")]
    run_in_this_process(supervised, [*small, "batch_size=4", "eval_every=1"])
    assert {"test/accuracy", "test/base_kl"} <= rows_of(tmp_path / "run")[-1].keys()
    shots, trained, test = skill.split_names(8, 4, seed=0)
    assert len({*shots, *trained, *test}) == len(skill.NAMES)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The initial of Paul is P.", True),
        (skill.write_record("Paul"), True),
        ("A name in P", True),
        ("Paul", False),
        ("The letter is Q, not P.", False),
    ],
)
def test_the_initial_is_right_in_any_style(reply: str, expected: bool):
    assert skill.is_right(reply, "Paul") is expected


def test_the_teacher_sees_the_record_that_supervised_training_imitates():
    messages = skill.build_demonstration(["Olga"], "Paul")
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "The initial of Olga is O."
    assert skill.write_record("Paul") in messages[-1]["content"]
    assert skill.ask("Paul") in messages[-1]["content"]


NO_TEACHER = "tinker://no-such-run:train:0/sampler_weights/final"
BAD_INPUT = [
    (on_policy, [f"teacher={NO_TEACHER}"], f"does not have the teacher {NO_TEACHER}: .*sampler_"),
    (on_policy, ["teacher_steps=0"], "teacher_steps=0 is less than 1; use 1 or more"),
    (on_policy, ["topk=4", "objective=reverse"], "objective=reverse is .*Did you mean reverse_kl"),
    (off_policy, [f"teacher={NO_TEACHER}"], f"does not have the teacher {NO_TEACHER}: .*sampler_"),
    (on_policy, ["group_size=0"], "group_size=0 is less than 1; use 1 or more"),
    # Known from the model's files, so that no teacher is trained first.
    (off_policy, ["base_url=local", "max_tokens=5000"], "max_tokens=5000 leaves no room.* 1024"),
    (supervised, ["base_url=local", "max_length=5000"], "max_length=5000 is more than the 1024 "),
    (off_policy, ["num_questions=3"], "num_questions=3 is less than batch_size=16; use more"),
    (multi_teacher, ["num_steps=0"], "num_steps=0 is less than 1; use 1 or more"),
    (sdft, ["num_shots=500"], "num_shots=500 and 16 names per step .* 45 or less"),
    (sdft, ["num_shots=-1"], "num_shots=-1 is negative; use 0 or more"),
    (sdft, ["topk=1000000"], "topk=1000000 is not possible with the teacher .*smaller number"),
    (supervised, ["batch_size=500"], "500 names per step .*batch_size.* 45 or less"),
]


@pytest.mark.parametrize(("module", "bad", "words"), BAD_INPUT)
def test_bad_input_is_named(settings: list[str], capsys, module, bad: list[str], words: str):
    own = [one for one in settings if module is not supervised or "max_tokens" not in one]
    with pytest.raises(SystemExit):
        run_in_this_process(module, [*own, *bad])
    assert re.search(words, capsys.readouterr().err)


def test_names_that_programs_of_the_cookbook_import():
    assert on_policy_distillation.Config is on_policy.Config
    assert on_policy_multi_teacher.Config is multi_teacher.Config
    assert off_policy_reasoning.Config is off_policy.Config
    assert sdft_train.main is sdft.main
