"""The distillation recipes: their tasks, and a run of each on a tiny model with its teachers."""

from __future__ import annotations

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
    shots, trained, test = skill.split_names(8, seed=0)
    assert len({*shots, *trained, *test}) == len(skill.NAMES)


def test_names_that_programs_of_the_cookbook_import():
    assert on_policy_distillation.Config is on_policy.Config
    assert on_policy_multi_teacher.Config is multi_teacher.Config
    assert off_policy_reasoning.Config is off_policy.Config
    assert sdft_train.main is sdft.main
