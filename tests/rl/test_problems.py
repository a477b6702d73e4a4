"""Environments from two functions: prompts, grades, held-out problems, and what goes wrong."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import chz
import pytest

from tests.assets import load_tokenizer
from tests.rl.envs import EchoEnv, ScriptedPolicy
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import Message, get_renderer
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.message_env import MessageEnv, MessageStepResult
from tinker_cookbook.rl.problems import (
    Grade,
    Problem,
    ProblemDatasetBuilder,
    ProblemLike,
    SingleTurn,
    episode_data,
    generated_data,
    problem_data,
)
from tinker_cookbook.rl.rollout_strategy import FailFast, MinViableGroup
from tinker_cookbook.rl.rollouts import RolloutSettings, rollout_group, set_rollout_executor
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, TrajectoryGroup

TOKENIZER = load_tokenizer("qwen3")
RENDERER = get_renderer("qwen3_disable_thinking", TOKENIZER)
STRICT = RolloutSettings(FailFast())
TOLERANT = RolloutSettings(MinViableGroup())
SUMS = [Problem(f"What is {n} + 1?", str(n + 1)) for n in range(12)]


def problems(split: str) -> list[Problem]:
    return SUMS[:9] if split == "train" else SUMS[9:]


def grade(reply: str, problem: Problem) -> float:
    return float(reply == problem.answer)


@chz.chz
class SumsDatasetBuilder(ProblemDatasetBuilder):
    """Uses the renderer of the test, since there is not a model to load one for."""

    def build_renderer(self) -> Renderer:
        return RENDERER


def build(**changes: Any) -> tuple[RLDataset, RLDataset | None]:
    settings: dict[str, Any] = {
        "problems": problems,
        "environment": SingleTurn(grade),
        "model_name": "none",
        "renderer_name": "none",
        "groups_per_batch": 4,
        "group_size": 2,
    }
    return asyncio.run(SumsDatasetBuilder(**settings | changes)())


def group_of(environment: Callable, problem: ProblemLike = SUMS[1]) -> EnvGroupBuilder:
    data = episode_data(problems, environment, name="sums")
    settings = {"model_name": "", "renderer_name": "", "groups_per_batch": 1, "group_size": 2}
    return data(**settings).make_group(problem, RENDERER, 2)


def roll_out(
    builder: EnvGroupBuilder,
    reply: str = "2",
    *,
    end: str = "<|im_end|>",
    settings: RolloutSettings = STRICT,
) -> TrajectoryGroup:
    policy = ScriptedPolicy([TOKENIZER.encode(reply + end, add_special_tokens=False)])
    return asyncio.run(rollout_group(builder, policy, settings))


def questions(dataset: RLDataset) -> list[str]:
    groups = [group for index in range(len(dataset)) for group in dataset.get_batch(index)]
    return [str(group.problem.question) for group in groups]  # pyright: ignore[reportAttributeAccessIssue]


def test_problems_are_shuffled_by_the_seed_and_the_held_out_ones_are_not():
    trained, held_out = build()
    assert len(trained) == 2  # nine problems are two whole batches of four
    assert held_out is not None
    assert len(held_out) == 1
    assert questions(held_out) == [problem.question for problem in SUMS[9:]]
    assert questions(trained) == questions(build()[0])
    assert questions(trained) != questions(build(seed=1)[0])
    assert set(questions(trained)) <= {str(problem.question) for problem in SUMS[:9]}
    fewer = build(max_test_problems=2)[1]
    assert fewer is not None
    assert questions(fewer) == [problem.question for problem in SUMS[9:11]]


def test_a_split_without_problems_holds_nothing_out():
    assert build(problems=lambda split: SUMS if split == "train" else [])[1] is None


def test_too_few_problems_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"groups_per_batch=10 is more than the 9 problems of problems\("
    ):
        build(groups_per_batch=10)


def test_held_out_problems_that_are_trained_on_are_told(caplog: pytest.LogCaptureFixture):
    build()
    assert not caplog.records
    build(problems=lambda split: SUMS)
    assert "12 of 12 held-out problems have a question that is trained on too" in caplog.text


def test_the_prompt_has_system_message_and_examples():
    single_turn = SingleTurn(grade, system_prompt="Only digits.", examples=[("1 + 1?", "2")])
    wanted: list[Message] = [
        {"role": "system", "content": "Only digits."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    [first, _] = roll_out(group_of(single_turn)).trajectories_G
    assert first.transitions[0].ob == RENDERER.build_generation_prompt(wanted)
    conversation: list[Message] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "1 + 1?"},
    ]
    [first, _] = roll_out(group_of(SingleTurn(grade), Problem(conversation))).trajectories_G
    assert first.transitions[0].ob == RENDERER.build_generation_prompt(conversation)


def test_a_cut_or_badly_formed_reply_costs_the_penalty():
    group = group_of(SingleTurn(grade, format_penalty=0.5))
    assert roll_out(group).get_total_rewards() == [1.0, 1.0]
    assert roll_out(group, end="").get_total_rewards() == [0.5, 0.5]
    shouted = group_of(SingleTurn(lambda reply, problem: Grade(1.0, well_formed=False)))
    assert roll_out(shouted).get_total_rewards() == [0.9, 0.9]


def test_a_grade_has_metrics_and_a_reason():
    def explained(reply: str, problem: Problem) -> Grade:
        return Grade(0.25, {"length": len(reply)}, "too short")

    [turn] = roll_out(group_of(SingleTurn(explained))).trajectories_G[0].transitions
    assert turn.metrics == {"format": 1.0, "correct": 0.25, "length": 1, "stop/completed": 1}
    assert turn.logs == {"reference_answer": "2", "reason": "too short"}


def test_grades_may_be_async_booleans_or_made_in_a_thread():
    async def waited(reply: str, problem: Problem) -> bool:
        await asyncio.sleep(0)
        return reply == problem.answer

    threads: list[int] = []

    def slow(reply: str, problem: Problem) -> float:
        threads.append(threading.get_ident())
        return 1.0

    assert roll_out(group_of(SingleTurn(waited))).get_total_rewards() == [1.0, 1.0]
    roll_out(group_of(SingleTurn(slow)))
    assert set(threads) == {threading.get_ident()}
    threads.clear()
    roll_out(group_of(SingleTurn(slow, in_thread=True)))
    assert threading.get_ident() not in threads


def test_problems_of_ones_own_with_tags():
    @dataclass
    class Riddle:
        question: str
        secret: int
        tags: tuple[str, ...] = ("riddles",)

    def solved(reply: str, riddle: Riddle) -> bool:
        return reply == str(riddle.secret)

    group = group_of(SingleTurn(solved), Riddle("?", 2))
    assert group.logging_tags() == ["riddles"]
    assert roll_out(group).get_total_rewards() == [1.0, 1.0]
    assert group_of(SingleTurn(solved)).logging_tags() == ["sums"]


def test_an_error_in_the_grade_is_recorded_and_costs_that_rollout():
    calls: list[str] = []

    def fails_once(reply: str, problem: Problem) -> float:
        calls.append(reply)
        if len(calls) == 1:
            raise KeyError("no such word")
        return 1.0

    group = roll_out(group_of(SingleTurn(fails_once)), settings=TOLERANT)
    assert group.get_total_rewards() == [1.0, 1.0]
    [error] = group.rollout_errors
    assert error.error_type == "KeyError"
    assert "test_problems.py" in error.error_message


@pytest.mark.parametrize("result", [None, "good"])
def test_a_grade_that_is_no_number_names_the_function(result: object):
    def forgot(reply: str, problem: Problem) -> Any:
        return result

    group = roll_out(group_of(SingleTurn(forgot)), settings=TOLERANT)
    assert group.trajectories_G == []
    [error] = group.rollout_errors
    assert f"forgot returned {result!r}; return a number or a Grade." in error.error_message


def test_groups_can_be_sent_to_an_executor():
    with ThreadPoolExecutor(1) as executor:
        set_rollout_executor(executor)
        try:
            assert roll_out(group_of(SingleTurn(grade))).get_total_rewards() == [1.0, 1.0]
        finally:
            set_rollout_executor(None)


def test_environments_may_be_made_late_and_are_cleaned_up():
    cleaned: list[str] = []

    class Opened(MessageEnv):
        async def initial_observation(self) -> list[Message]:
            return [{"role": "user", "content": "Say it."}]

        async def step(self, message: Message) -> MessageStepResult:
            return MessageStepResult(1.0, True, [])

        async def cleanup(self) -> None:
            cleaned.append("closed")

    async def open_one(problem: Problem, renderer: Renderer) -> Opened:
        await asyncio.sleep(0)
        return Opened()

    assert roll_out(group_of(open_one)).get_total_rewards() == [1.0, 1.0]
    assert cleaned == ["closed", "closed"]


def test_an_environment_of_tokens_is_used_as_it_is_and_anything_else_is_refused():
    made = roll_out(group_of(lambda problem, renderer: EchoEnv()))
    assert made.get_total_rewards() == [1.0, 1.0]

    def nothing(problem: Problem, renderer: Renderer) -> None:
        return None

    lost = roll_out(group_of(nothing), settings=TOLERANT)
    assert "nothing returned NoneType; return a MessageEnv or an Env." in (
        lost.rollout_errors[0].error_message
    )


def test_problem_data_passes_its_settings_on():
    data = problem_data(
        problems, grade, name="sums", system_prompt="s", examples=[("q", "r")], format_penalty=0.2
    )
    settings = {"model_name": "", "renderer_name": "", "groups_per_batch": 1, "group_size": 2}
    made = data(**settings)
    assert made.environment == SingleTurn(grade, "s", [("q", "r")], 0.2)
    assert (made.problems, made.name) == (problems, "sums")


def test_generated_problems_depend_on_seed_step_and_split():
    def draw(split: str, rng: random.Random) -> Problem:
        return Problem(f"{split} {rng.randrange(10**9)}")

    made = generated_data(draw, grade, name="numbers")

    @chz.chz
    class Data(made):
        def build_renderer(self) -> Renderer:
            return RENDERER

    def questions(seed: int, **changes: Any) -> tuple[list[list[str]], list[str]]:
        sizes: dict[str, Any] = {
            "groups_per_batch": 2,
            "group_size": 3,
            "num_batches": 4,
            "test_problems": 5,
        }
        data = Data(model_name="m", renderer_name="r", seed=seed, **(sizes | changes))
        trained, held_out = asyncio.run(data())
        steps = [[g.problem.question for g in trained.get_batch(i)] for i in range(len(trained))]
        kept = held_out.get_batch(0) if held_out is not None else []
        assert {group.num_envs for group in kept} <= {4}
        return steps, [group.problem.question for group in kept]

    steps, held_out = questions(0)
    assert questions(0) == (steps, held_out)
    assert [len(step) for step in steps] == [2, 2, 2, 2]
    assert len({question for step in steps for question in step}) == 8
    assert all(question.startswith("train ") for step in steps for question in step)
    assert len(held_out) == 5
    assert all(question.startswith("test ") for question in held_out)
    assert questions(1)[0] != steps
    assert questions(0, test_problems=0) == (steps, [])
