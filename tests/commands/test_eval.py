"""`tinker-cookbook eval`: the table, resuming, comparing, and mistakes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tinker_cookbook import cli


@pytest.fixture
def evaluate(local_service: ServiceProcess, monkeypatch, capsys, tmp_path: Path):
    """Run the command against a service of one model, which is not named."""
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", str(tmp_path / "runs"))

    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(["eval", "--renderer", "chatml", "--max-tokens", "4", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_table_is_printed_and_the_replies_are_kept(evaluate, tmp_path: Path) -> None:
    words = ("--max-examples", "3", "--num-samples", "2", "--temperature", "1")
    status, shown, _ = evaluate(*words)
    assert status == 0
    assert "arithmetic  0.000 ± 0.000" in shown
    assert "pass@1 0.000, pass@2 0.000" in shown
    (folder,) = (tmp_path / "runs" / "eval").iterdir()
    stored = folder / "arithmetic" / "trajectories.jsonl"
    before = stored.read_text()
    assert len(before.splitlines()) == 6
    assert evaluate(*words)[0] == 0
    assert stored.read_text() == before, "the same command resumes"


def test_a_model_is_compared_with_itself_and_with_a_stored_evaluation(
    evaluate, tmp_path: Path, local_service: ServiceProcess
) -> None:
    data = tmp_path / "mine.jsonl"
    row = {"question": "What?", "choices": ["a dog", "a fox"], "label": 0}
    data.write_text("".join(json.dumps(row | {"id": number}) + "\n" for number in range(3)))
    words = ("--benchmarks", "truthfulqa", "--data", f"truthfulqa={data}")
    status, shown, _ = evaluate(*words, "--save-dir", str(tmp_path / "a"))
    assert status == 0
    assert "truthfulqa" in shown
    status, shown, _ = evaluate(*words, "--compare", str(tmp_path / "a"))
    assert status == 0
    assert "+0.000 ± 0.000" in shown
    assert "p = 1, 0 better, 0 worse, 3 examples" in shown
    status, shown, _ = evaluate(*words, "--compare", local_service.model)
    assert (status, shown.count("0 better, 0 worse")) == (0, 1)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--benchmarks", "gsm9k"), "Did you mean 'gsm8k'?"),
        (("--data", "gsm8k"), "--data=gsm8k is not NAME=FILE"),
        (("--num-samples", "0"), "num_samples=0 is too small"),
        (("--benchmarks", "gsm8k", "--data", "gsm8k=/none.jsonl"), "/none.jsonl cannot be read"),
    ],
)
def test_mistakes_are_told(evaluate, words, problem: str) -> None:
    status, _, told = evaluate(*words)
    assert status == 2
    assert problem in told


def test_other_settings_in_the_same_folder_need_a_restart(evaluate, tmp_path: Path) -> None:
    words = ("--max-examples", "1", "--save-dir", str(tmp_path / "a"))
    assert evaluate(*words)[0] == 0
    status, _, told = evaluate(*words, "--temperature", "0")
    assert status == 2
    assert "temperature: 0.6 there, 0.0 now" in told
    assert evaluate(*words, "--temperature", "0", "--restart")[0] == 0


def test_the_benchmarks_are_listed(evaluate) -> None:
    status, shown, _ = evaluate("--benchmarks", "list")
    assert status == 0
    assert "hellaswag" in shown
