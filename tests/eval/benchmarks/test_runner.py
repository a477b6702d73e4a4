"""The runner: counts, retries, resuming, pass@k, grading again, and comparing."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.scripted import CUT, HANG, Capitals, ScriptedClient, chatml
from tinker_cookbook.eval.benchmarks import (
    REGISTRY,
    BenchmarkBuilder,
    BenchmarkConfig,
    BenchmarkResult,
    compare_results,
    load_result,
    load_summary,
    load_trajectories,
    print_trajectory,
    register,
    regrade_trajectories,
    run_benchmark,
    run_benchmarks,
)
from tinker_cookbook.exceptions import BenchmarkNotFoundError, ConfigurationError, EvalError

RIGHT = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid"}


def answer_all(prompt: str, call: int) -> list[str]:
    return [next(f"It is {RIGHT[name]}." for name in RIGHT if name in prompt)]


def answers(**replies: str | Exception) -> Callable[[str, int], Sequence[str] | Exception]:
    """Answer as given per country, and correctly otherwise."""

    def answer(prompt: str, call: int) -> Sequence[str] | Exception:
        for country, reply in replies.items():
            if country in prompt:
                return reply if isinstance(reply, Exception) else [reply]
        return answer_all(prompt, call)

    return answer


def run(client: ScriptedClient, benchmark: BenchmarkBuilder | None = None, **settings: Any):
    config = BenchmarkConfig(
        **{"retry_pause_seconds": 0.0, "weights": "w1", "max_tokens": 50} | settings
    )
    return asyncio.run(run_benchmark(benchmark or Capitals(), client, chatml(), config))  # pyright: ignore[reportArgumentType]


def test_correct_wrong_and_cut_replies_are_counted_separately(tmp_path: Path) -> None:
    client = ScriptedClient(answers(Italy="It is Paris.", Spain=f"It is Madrid{CUT}"))
    result = run(client, save_dir=str(tmp_path))
    assert (result.num_examples, result.num_correct, result.num_truncated) == (3, 1, 1)
    assert (result.num_errors, result.num_completed, result.score_completed) == (0, 2, 0.5)
    assert result.score == pytest.approx(1 / 3)
    assert result.standard_error == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert load_result(str(tmp_path), "capitals") == result
    assert load_summary(str(tmp_path))["capitals"]["num_truncated"] == 1


def test_trajectories_hold_the_text_that_was_graded(tmp_path: Path, capsys) -> None:
    run(ScriptedClient(answers(Italy="Turin")), save_dir=str(tmp_path), system_prompt="Be short.")
    found = load_trajectories(str(tmp_path), "capitals")
    assert [each.example_id for each in found] == ["France", "Italy", "Spain"]
    assert [turn.role for turn in found[0].turns] == ["environment", "user", "assistant"]
    assert found[0].reply == "It is Paris."
    assert found[0].turns[-1].metadata == {"stop_reason": "stop", "raw": "It is Paris.<|im_end|>"}
    (wrong,) = load_trajectories(str(tmp_path), "capitals", incorrect_only=True)
    assert (wrong.example_id, wrong.logs["expected"]) == ("Italy", "Rome")
    assert len(load_trajectories(str(tmp_path), "capitals", correct_only=True)) == 2
    print_trajectory(wrong)
    shown = capsys.readouterr().out
    assert "Be short." in shown
    assert "Turin" in shown
    assert "expected: Rome" in shown


def test_a_finished_evaluation_is_not_sampled_again(tmp_path: Path) -> None:
    first = run(ScriptedClient(answer_all), save_dir=str(tmp_path))
    client = ScriptedClient(answer_all)
    second = run(client, save_dir=str(tmp_path))
    assert client.requests == []
    assert (second.score, second.num_examples) == (first.score, 3)


def test_more_examples_are_added_to_the_stored_ones(tmp_path: Path) -> None:
    run(ScriptedClient(answer_all), save_dir=str(tmp_path), max_examples=1)
    client = ScriptedClient(answer_all)
    assert run(client, save_dir=str(tmp_path)).num_examples == 3
    assert len(client.requests) == 2
    # Fewer examples score only those, and lose none.
    assert run(client, save_dir=str(tmp_path), max_examples=1).num_examples == 1
    assert len(load_trajectories(str(tmp_path), "capitals")) == 3


def test_errors_are_tried_again_and_never_scored(tmp_path: Path) -> None:
    broken = ScriptedClient(answers(Italy=ValueError("the service is away")))
    result = run(broken, save_dir=str(tmp_path))
    assert len(broken.requests) == 2 + 3, "three attempts at Italy"
    assert (result.score, result.num_errors, result.num_correct) == (1.0, 1, 2)
    (error,) = load_trajectories(str(tmp_path), "capitals", errors_only=True)
    assert "the service is away" in str(error.error)
    healthy = ScriptedClient(answer_all)
    again = run(healthy, save_dir=str(tmp_path))
    assert len(healthy.requests) == 1
    assert (again.num_errors, again.num_correct) == (0, 3)
    assert len((tmp_path / "capitals" / "trajectories.jsonl").read_text().splitlines()) == 3


def test_a_failure_that_passes_leaves_no_error() -> None:
    def answer(prompt: str, call: int) -> Sequence[str] | Exception:
        return ValueError("busy") if call <= 3 else answer_all(prompt, call)

    client = ScriptedClient(answer)
    result = run(client)
    assert (result.num_errors, result.num_correct, len(client.requests)) == (0, 3, 6)


def test_a_reply_that_takes_too_long_is_an_error() -> None:
    client = ScriptedClient(answers(Spain=HANG))
    result = run(client, timeout_seconds=0.3, max_attempts=2)
    assert (result.num_errors, result.score) == (1, 1.0)
    assert sum("Spain" in prompt for prompt, _ in client.requests) == 2


def test_a_prompt_that_fills_the_context_is_truncated_and_not_tried_again() -> None:
    client = ScriptedClient(answer_all)
    result = run(client, context_window=5)
    assert (result.num_truncated, result.num_errors, result.score) == (3, 0, 0.0)
    assert client.requests == []


def test_a_reply_that_cannot_be_stored_ends_the_evaluation(tmp_path: Path) -> None:
    def answer(prompt: str, call: int) -> list[str]:
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        return answer_all(prompt, call)

    with pytest.raises(OSError, match=r"trajectories\.jsonl"):
        run(ScriptedClient(answer), save_dir=str(tmp_path / "e"))


def test_nothing_but_errors_is_an_error() -> None:
    client = ScriptedClient(lambda prompt, call: ValueError("wrong key"))
    with pytest.raises(EvalError, match=r"none of 3 replies has a grade.*wrong key"):
        run(client)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 1.0}, "temperature: 0.6 there, 1.0 now"),
        ({"weights": "w2"}, "weights: 'w1' there, 'w2' now"),
        ({"weights": None}, "weights: the client cannot tell"),
        ({"max_tokens": 51}, "max_tokens: 50 there, 51 now"),
        ({"num_samples": 2}, "num_samples: 1 there, 2 now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"system_prompt": "Hi."}, "system_prompt: None there, 'Hi.' now"),
        ({"benchmark": Capitals("2")}, "grader: 'capitals 1' there, 'capitals 2' now.*regrade"),
        ({"benchmark": Capitals(question="Which is {}'s?")}, "example France has changed"),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, settings, named) -> None:
    run(ScriptedClient(answer_all), save_dir=str(tmp_path))
    client = ScriptedClient(answer_all)
    with pytest.raises(ConfigurationError, match=named):
        run(client, save_dir=str(tmp_path), **settings)
    assert client.requests == []


def test_a_restart_moves_the_old_replies_aside(tmp_path: Path) -> None:
    run(ScriptedClient(answers(Italy="Turin")), save_dir=str(tmp_path))
    client = ScriptedClient(answer_all)
    settings: dict[str, Any] = {"weights": "w2", "if_settings_differ": "restart"}
    assert run(client, save_dir=str(tmp_path), **settings).num_correct == 3
    assert len(client.requests) == 3
    assert (tmp_path / "capitals-old-1" / "trajectories.jsonl").exists()
    assert run(client, save_dir=str(tmp_path), **settings).num_correct == 3
    assert len(client.requests) == 3, "equal settings are resumed"


def test_all_samples_of_an_example_come_from_one_request(tmp_path: Path) -> None:
    def answer(prompt: str, call: int) -> list[str]:
        right = answer_all(prompt, call)[0]
        return [right, "no", right, "no"] if "France" in prompt else ["no"] * 3 + [right]

    client = ScriptedClient(answer)
    result = run(client, num_samples=4, save_dir=str(tmp_path))
    assert [num for _, num in client.requests] == [4, 4, 4]
    assert (result.num_examples, result.num_samples, result.num_correct) == (3, 4, 4)
    assert result.score == pytest.approx(4 / 12)
    # France: 2 of 4 correct, so two draws miss with 2/4 * 1/3 = 1/6; the others have 1 of 4.
    assert result.pass_at_k[2] == pytest.approx((5 / 6 + 1 / 2 + 1 / 2) / 3)
    assert result.pass_at_k[4] == 1.0
    assert len(load_trajectories(str(tmp_path), "capitals")) == 12
    run(client, num_samples=4, save_dir=str(tmp_path))
    assert len(client.requests) == 3


def test_a_grader_that_raises_costs_one_example(tmp_path: Path) -> None:
    client = ScriptedClient(answers(Italy="raise"))
    result = run(client, save_dir=str(tmp_path))
    assert (result.num_errors, result.num_correct, len(client.requests)) == (1, 2, 3)
    (error,) = load_trajectories(str(tmp_path), "capitals", errors_only=True)
    assert "RuntimeError: this reply cannot be graded" in str(error.error)
    assert error.reply == "raise", "the reply is kept"


def test_a_grader_that_hangs_costs_one_example() -> None:
    def grade(reply: str, logs: dict) -> float:
        if "Rome" in reply:
            time.sleep(2)
        return 1.0

    result = run(ScriptedClient(answer_all), grade_fn=grade, timeout_seconds=0.5, max_attempts=1)
    assert (result.num_errors, result.num_correct) == (1, 2)


@pytest.fixture
def capitals():
    """The benchmark, registered."""
    yield register(Capitals())
    REGISTRY.pop("capitals", None)


def test_replies_are_graded_again_without_sampling(tmp_path: Path, capitals) -> None:
    client = ScriptedClient(answers(Italy="Turin", Spain=f"Madrid{CUT}"))
    run(client, save_dir=str(tmp_path))
    stored = (tmp_path / "capitals" / "trajectories.jsonl").read_text()
    lenient = regrade_trajectories(str(tmp_path), "capitals", lambda reply, logs: 1.0)
    assert (lenient.num_correct, lenient.num_truncated) == (2, 1)
    assert (tmp_path / "capitals" / "trajectories.jsonl").read_text() == stored
    # A new version of the benchmark's grader updates the files, and the evaluation continues.
    register(Capitals("2"))
    assert regrade_trajectories(str(tmp_path), "capitals").num_correct == 1
    settings = json.loads((tmp_path / "capitals" / "settings.json").read_text())
    assert settings["grader"] == "capitals 2"
    assert run(client, benchmark=Capitals("2"), save_dir=str(tmp_path)).num_correct == 1
    assert len(client.requests) == 3


def test_two_evaluations_are_compared_by_example(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    run(ScriptedClient(answers(Italy="Turin", Spain="Seville")), save_dir=a)
    run(ScriptedClient(answers(Italy=ValueError("away"))), save_dir=b, weights="w2")
    found = compare_results(a, b, "capitals")
    assert (found.num_examples, found.num_better, found.num_worse) == (2, 1, 0)
    assert (found.mean_a, found.mean_b, found.p_value) == (0.5, 1.0, 1.0)


def test_results_survive_json() -> None:
    result = BenchmarkResult("x", 0.5, 2, 1, pass_at_k={1: 0.5, 2: 0.75}, metrics={"a": 1.0})
    assert BenchmarkResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_unknown_names_are_told_with_the_nearest(capitals) -> None:
    with pytest.raises(BenchmarkNotFoundError, match="Did you mean 'gsm8k'"):
        asyncio.run(run_benchmarks(["gsm8kk"], ScriptedClient(answer_all), chatml()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"temperature": -1}, {"concurrency": 0}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        BenchmarkConfig(**settings)
