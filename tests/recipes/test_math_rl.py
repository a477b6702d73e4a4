import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.math_rl.answers import (
    AnswerNotFound,
    extract_boxed,
    extract_gsm8k_final_answer,
    last_number,
    parse_number,
    safe_grade,
)
from recipes.math_rl.problems import make_arithmetic, read_problems
from tests.recipes.recipe_process import recipe_environment, run_recipe
from tests.traced_memory import traced_memory
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError


def test_boxes_are_read_with_their_braces():
    assert extract_boxed(r"so \boxed{1} no, \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    for text in ("no box", r"\boxed{1"):
        with pytest.raises(AnswerNotFound):
            extract_boxed(text)


def test_other_answers_are_read():
    assert extract_gsm8k_final_answer("1 + 1 = 2\n#### 1,200\n") == "1,200"
    assert last_number("first 3, then -4.5 apples.") == "-4.5"
    for extract in (extract_gsm8k_final_answer, last_number):
        with pytest.raises(AnswerNotFound):
            extract("nothing")


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("12", "12.0", True),
        ("$1,234", "1234", True),
        ("50%", "0.5", True),
        (r"\frac{3}{4}", "0.75", True),
        ("3/4", r"\dfrac{3}{4}", True),
        ("1e3", "1000", True),
        ("12", "13", False),
        ("1/0", "1/0", True),  # no number, but the same text
        ("x + 1", "x+1", True),
        ("1 + x", "x + 1", False),  # needs math_verify
    ],
)
def test_numbers_are_compared_exactly(given: str, wanted: str, same: bool):
    assert safe_grade(given, wanted) is same


def test_long_digits_neither_hang_nor_round():
    huge = "9" * 3000
    assert parse_number(huge) == int(huge)
    assert not safe_grade(huge, huge[:-1])


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("1e10000000", "5", False),
        ("1e-10000000", "0", False),
        ("5", "-1E+99999999999", False),
        ("1e10000000%", "5", False),
        ("1e10000000", "1e10000000", True),  # the same text
        ("1e400", "1" + 400 * "0", True),
    ],
)
def test_huge_exponents_are_not_written_out(given: str, wanted: str, same: bool):
    _, peak = traced_memory(
        "from recipes.math_rl.answers import safe_grade",
        f"assert safe_grade({given!r}, {wanted!r}) is {same}\n"
        f"assert safe_grade({given!r}, {wanted!r}, 'math_verify') is {same}",
    )
    assert peak < 2**20


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        ("1 + x", "x + 1", True),
        (r"\frac{1}{2} + y", "y + 0.5", True),
        ("x^2", "x^3", False),
        ("9^{9^{9^9}}", "5 + x", False),  # takes its time, or its memory
        ("100000!", "5", False),
        ("5", "10^{1,000,000}", False),
        ("x + 2", "2 + x", True),  # after one that was ended
    ],
)
def test_expressions_are_compared_in_bounds(given: str, wanted: str, same: bool):
    assert safe_grade(given, wanted, "math_verify") is same


WITHOUT_GUARD = """
print("the script runs")
from recipes.math_rl.answers import safe_grade
print(safe_grade("1 + x", "x + 1", "math_verify"))
print(safe_grade("9^{9^{9^9}}", "x", "math_verify"))
print(safe_grade("y + x", "x + y", "math_verify"))
"""


def test_a_script_without_a_guard_runs_once(tmp_path: Path):
    script = tmp_path / "grade.py"
    script.write_text(WITHOUT_GUARD)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["the script runs", "True", "False", "True", ""]


def test_graders_are_named():
    with pytest.raises(ConfigurationError, match="'sympy2' is unknown"):
        safe_grade("x", "y", grader="sympy2")


@pytest.mark.parametrize("env", ["gsm8k", "math"])
def test_without_a_hub_there_is_one_line_at_once(env: str, tmp_path: Path):
    environment = recipe_environment(None, tmp_path) | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # where nothing listens
    }
    done = run_recipe("recipes.math_rl", f"env={env}", env=environment)
    assert done.returncode != 0
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert re.search(r"cannot be fetched: http://127.0.0.1:9 is not reachable .*file_path=", line)
    assert f"env={env} needs it" in line
    assert not (tmp_path / "runs").exists()


def test_sums_are_right():
    for problem in make_arithmetic(20, seed=1):
        a, b = (int(part) for part in problem.question[8:-1].split(" + "))
        assert problem.answer == str(a + b)


def test_files_of_both_kinds_are_read(tmp_path: Path):
    rows = [
        {"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"},
        {"problem": "half?", "solution": r"it is \boxed{\frac12}"},
        {"question": "plain?", "answer": 7},
        {"question": "5-5?", "answer": 0},
        {"problem": "none?", "answer": None, "solution": 0.0},
        {"question": "empty?", "answer": "", "solution": "3"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [problem.answer for problem in read_problems(str(path))] == [
        "2",
        r"\frac12",
        "7",
        "0",
        "0.0",
        "3",
    ]
    path.write_text('{"q": 1}\n', encoding="utf-8")
    with pytest.raises(DataFormatError, match=r"p.jsonl:1: has the keys \['q'\]; needs"):
        read_problems(str(path))
    path.write_text('{"question": "5-5?", "answer": ""}\n', encoding="utf-8")
    with pytest.raises(DataFormatError, match=r"question='5-5\?', answer=''; needs question"):
        read_problems(str(path))
