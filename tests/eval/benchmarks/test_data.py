"""Where questions come from, and how rows of each source become questions."""

# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.eval.benchmarks.scripted import chatml
from tinker_cookbook.eval.benchmarks import REGISTRY, BenchmarkConfig
from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark
from tinker_cookbook.eval.benchmarks._data import _rows
from tinker_cookbook.eval.benchmarks._likelihood import LikelihoodBenchmark, split_tokens
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.eval.benchmarks.aime import extract_aime_answer
from tinker_cookbook.eval.benchmarks.arithmetic import arithmetic_problem
from tinker_cookbook.eval.benchmarks.mmlu import parse_prompts
from tinker_cookbook.exceptions import DataError, DataFormatError


@pytest.fixture(autouse=True)
def offline_home(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "home" / "benchmarks").mkdir(parents=True)
    return tmp_path / "home"


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_in_the_home_folder_is_found(offline_home: Path) -> None:
    row = {"problem": "1/2 + 1/2", "answer": "1"}
    write(offline_home / "benchmarks" / "math500.jsonl", row, row)
    (first, second) = REGISTRY["math500"].make_envs(chatml(), BenchmarkConfig())
    assert first.message_env.example_id != second.message_env.example_id  # pyright: ignore
    key = REGISTRY["math500"].data_key(BenchmarkConfig())  # pyright: ignore
    assert key.startswith("file math500.jsonl ")


def test_a_file_of_the_config_is_used(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl", {"question": "2 + 3?", "answer": "It is\n#### 5", "id": 7}
    )
    config = BenchmarkConfig(data={"gsm8k": path})
    (env,) = REGISTRY["gsm8k"].make_envs(chatml(), config)
    assert env.message_env.example_id == "7"  # pyright: ignore
    assert env.message_env._logs == {"expected": "5"}  # pyright: ignore


def test_without_data_the_error_says_where_to_put_the_file(offline_home: Path) -> None:
    with pytest.raises(DataError) as caught:
        REGISTRY["math500"].make_envs(chatml(), BenchmarkConfig())
    message = str(caught.value)
    assert "HF_HUB_OFFLINE" in message
    assert str(offline_home / "benchmarks" / "math500.jsonl") in message
    assert '"problem", "answer"' in message
    assert message.count("Put a JSONL file") == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"question": "x"}\n', r"mine.jsonl:1: not a row of gsm8k; its keys are question, answer"),
        ('{"question": "x", "answer": "1"}\n{oops\n', "mine.jsonl:2: not JSON"),
        ("[1]\n", "mine.jsonl:1: not an object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    config = BenchmarkConfig(data={"gsm8k": str(tmp_path / "mine.jsonl")})
    with pytest.raises(DataFormatError, match=problem):
        REGISTRY["gsm8k"].make_envs(chatml(), config)


# One row per benchmark in the form in which the hub has it.
HUB_ROWS = {
    "gsm8k": {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "math500": {"problem": "p", "answer": "1", "unique_id": "test/algebra/1.json"},
    "mmlu_pro": {"question_id": 3, "question": "q", "options": ["a", "b", "c"], "answer": "C"},
    "aime_2026": {"problem_idx": 1, "problem": "p", "answer": "070"},
    "ceval": {"id": 1, "question": "q", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B"},
    "gpqa": {
        "Record ID": "r1",
        "Question": "q?",
        "Correct Answer": "right",
        "Incorrect Answer 1": "x",
        "Incorrect Answer 2": "y",
        "Incorrect Answer 3": "z",
        "High-level domain": "Physics",
    },
    "supergpqa": {
        "uuid": "u1",
        "question": "q",
        "options": ["a", "b"],
        "answer": "b",
        "answer_letter": "B",
        "discipline": "Law",
    },
    "mmlu_redux": {"question": "q", "choices": ["a", "b"], "answer": 1, "error_type": "ok"},
    "mmlu": {"question": "q", "subject": "us_law", "choices": ["a", "b"], "answer": 1},
    "ifeval": {
        "key": 1000,
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    },
    "humaneval": {"task_id": "HumanEval/0", "prompt": "p", "entry_point": "f", "test": "t"},
    "mbpp": {
        "task_id": 2,
        "prompt": "p",
        "test_list": ["assert f()"],
        "test_imports": ["import a"],
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man bakes.",
        "ctx_b": "he",
        "ctx": "A man bakes. he",
        "endings": ["eats [step] it.", "b", "c", "d"],
        "label": "1",
    },
    "truthfulqa": {
        "question": "q?",
        "mc1_targets": {"choices": ["no", "yes"], "labels": [0, 1]},
    },
}


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_rows_of_the_hub_are_read(name: str) -> None:
    benchmark = REGISTRY[name]
    assert isinstance(benchmark, QuestionBenchmark | LikelihoodBenchmark)
    rows = _rows(benchmark.data, [HUB_ROWS[name]], "hub", "hub").rows
    if isinstance(benchmark, QuestionBenchmark):
        assert benchmark.question(rows[0])
        assert benchmark.reference(rows[0])
    else:
        assert benchmark.expected(rows[0]) == 1


def test_hellaswag_text_is_that_of_lm_evaluation_harness() -> None:
    benchmark = REGISTRY["hellaswag"]
    assert isinstance(benchmark, LikelihoodBenchmark)
    row = HUB_ROWS["hellaswag"]
    assert benchmark.context(row) == "Baking: A man bakes. He"
    assert benchmark.endings(row)[0] == "eats it."


def test_generated_questions_are_right_and_never_change() -> None:
    for index in range(200):
        question, answer, operation = arithmetic_problem(index)
        expression = question.removeprefix("What is ").removesuffix("?")
        assert eval(expression) == answer
        assert answer >= 0
        assert operation == ("add", "subtract", "multiply")[index % 3]
    assert arithmetic_problem(150)[0] == "What is 124 + 271?"


def test_an_ending_starts_where_its_tokens_differ() -> None:
    tokens, count = split_tokens(chatml(), "The quick brown", " fox jumps")
    assert chatml().encoder.decode(tokens) == "The quick brown fox jumps"
    assert chatml().encoder.decode(tokens[-count:]) == " fox jumps"
    # A space at the end of the context belongs to the ending.
    assert split_tokens(chatml(), "The quick brown ", "fox jumps") == (tokens, count)


def test_the_letter_of_a_shuffled_answer_is_its_new_place() -> None:
    benchmark = REGISTRY["gpqa"]
    assert isinstance(benchmark, ChoiceBenchmark)
    letters = set()
    for number in range(20):
        given = HUB_ROWS["gpqa"] | {"Question": f"q{number}?"}
        (row,) = _rows(benchmark.data, [given], "hub", "hub").rows
        assert row["options"]["ABCD".index(row["answer"])] == "right"
        assert sorted(row["options"]) == ["right", "x", "y", "z"]
        letters.add(row["answer"])
    assert len(letters) > 1
    assert benchmark.reference(row) == {
        "expected": row["answer"],
        "letters": "ABCD",
        "group": "Physics",
    }


def test_groups_have_metrics() -> None:
    benchmark = REGISTRY["supergpqa"]
    assert isinstance(benchmark, ChoiceBenchmark)
    (row,) = _rows(benchmark.data, [HUB_ROWS["supergpqa"]], "hub", "hub").rows
    grade = asyncio.run(
        benchmark.grade("The answer is (B).", benchmark.reference(row), BenchmarkConfig())
    )
    assert (grade.reward, grade.metrics["acc/Law"]) == (1.0, 1.0)


def test_faulty_questions_are_left_out() -> None:
    benchmark = REGISTRY["mmlu_redux"]
    assert isinstance(benchmark, ChoiceBenchmark)
    good = HUB_ROWS["mmlu_redux"]
    faulty = good | {"question": "r", "error_type": "wrong_groundtruth"}
    found = _rows(benchmark.data, [faulty, good], "hub", "hub")
    assert [row["question"] for row in found.rows] == ["q"]


def test_prompts_of_mmlu_are_read_and_written_as_lm_evaluation_harness_does() -> None:
    prompts = {
        "us_law": "Questions about law.\n\nQ: First?\nMore.\n(A) one (B) two (C) three (D) four\n"
        "A: Let us see. The answer is (C).\n\nQ: Second?\n(A) 1 (B) 2 (C) 3 (D) 4 (E) 5\n"
        "A: The answer is (E)."
    }
    first, second = parse_prompts(json.dumps(prompts).encode())
    assert first == {
        "question": "First?\nMore.",
        "subject": "us_law",
        "choices": ["one", "two", "three", "four"],
        "answer": 2,
    }
    assert (second["choices"][4], second["answer"]) == ("5", 4)
    benchmark = REGISTRY["mmlu"]
    assert isinstance(benchmark, LikelihoodBenchmark)
    assert benchmark.context(first) == (
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "First?\nMore.\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("So \\boxed{070}", 70),
        ("\\boxed{3} then \\boxed{ 12 }", 12),
        ("It is 204.", 204),
        ("1.5", None),
        ("none", None),
    ],
)
def test_answers_of_aime_are_whole_numbers(reply: str, expected: int | None) -> None:
    assert extract_aime_answer(reply) == expected
