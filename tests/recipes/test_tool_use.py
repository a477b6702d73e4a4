"""The tool recipe: its tools, its grading, its data, and a run."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import re
from pathlib import Path

import pytest

from recipes.tool_use import __main__ as module
from recipes.tool_use.corpus import make_village
from recipes.tool_use.envs import (
    ToolUseDatasetBuilder,
    grade,
    is_right,
    make_question,
    people_for,
    search_index,
    solved_example,
)
from recipes.tool_use.tools import calculator, evaluate
from recipes.tool_use.warm_start import conversations
from tests.recipes.rl_runs import run_two_steps
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.types import StepResult
from tinker_cookbook.tool_use import ToolInput


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 + 3 * 4", 14), ("(2 + 3) * 4", 20), ("-7 / 2", -3.5), (" 1.5 * 2 ", 3)],
)
def test_the_calculator_computes(expression: str, value: float):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "2 +", "__import__('os')", "a + 1", "9 ** 9", "1e30 * 1", "True + 1", "1 " * 90, "(" * 90],
)
def test_the_calculator_refuses_the_rest(expression: str):
    with pytest.raises(ValueError, match=r"expression|numbers|large"):
        evaluate(expression)
    result = asyncio.run(calculator.run(ToolInput({"expression": expression})))
    assert "error" in json.loads(str(result.messages[0]["content"]))


def test_the_search_finds_everybody_by_name():
    for person in make_village()[:30]:
        result = asyncio.run(search_index().search.run(ToolInput({"query": person.name})))
        assert result.messages[0]["content"] == person.sentence()
    nothing = asyncio.run(search_index().search.run(ToolInput({"query": "zzz"})))
    assert nothing.messages[0]["content"] == "Nothing was found."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Lakewood", True),
        ("He lives in Lakewood.", True),
        ("Oakdale", False),
        ("", False),
        ("word " * 30 + "Lakewood", False),
    ],
)
def test_answers_are_found_in_short_replies(text: str, right: bool):
    assert is_right(text, "Lakewood") is right


def test_other_numbers_are_no_answer():
    assert is_right("It is 1,326.", "1326")
    assert not is_right("1326 or 1327", "1326")


@pytest.mark.parametrize("tasks", ["calculator", "search", "chained"])
def test_a_solved_example_earns_the_whole_reward(tasks):
    question = make_question(tasks, random.Random(1), people_for("training"))
    example = solved_example(question)
    reward, metrics = asyncio.run(grade(question, 1, example))
    assert (reward, metrics) == (1.0, {"correct": 1.0, "used_tool": 1.0})
    guessed: list[Message] = [example[0], {"role": "assistant", "content": "no idea"}]
    assert asyncio.run(grade(question, 1, guessed))[0] == 0.0
    wrong: list[Message] = [*example[:-1], {"role": "assistant", "content": "no idea"}]
    assert asyncio.run(grade(question, 1, wrong))[0] == 0.2


def test_nobody_is_trained_on_and_held_out():
    trained, held_out = people_for("training"), people_for("evaluation")
    assert not set(trained) & set(held_out)
    assert len(trained) + len(held_out) == len(make_village())


def builder(**changes) -> ToolUseDatasetBuilder:
    settings = {
        "model_name": "m",
        "renderer_name": "qwen2_5",
        "groups_per_batch": 2,
        "group_size": 2,
        "tasks": "mixed",
        "num_batches": 3,
        "max_turns": 3,
        "num_examples": 0,
        "test_problems": 4,
    }
    return ToolUseDatasetBuilder(**settings | changes)


def test_groups_pickle_and_are_functions_of_their_number():
    dataset, held_out = asyncio.run(builder()())
    assert held_out is not None
    assert (len(dataset), len(held_out.get_batch(0))) == (3, 4)
    group = dataset.get_batch(1)[1]
    assert pickle.loads(pickle.dumps(group)) == group == dataset.get_batch(1)[1]


def test_the_first_examples_have_calls_and_tools():
    rows = conversations(builder(), 6, people_for("training"))
    assert len({json.dumps(row) for row in rows}) == 6
    assert all(row["messages"][2]["tool_calls"] and len(row["tools"]) == 2 for row in rows)


def test_who_calls_as_in_the_first_examples_earns_the_whole_reward(tiny_model_folder: Path):
    """With a vocabulary that has no token for `<tool_call>`, like that of the default model."""
    data = builder(model_name=str(tiny_model_folder), tasks="calculator")
    renderer = data.build_renderer()
    stop = int(renderer.get_stop_sequences()[0])

    async def play() -> StepResult:
        dataset, _ = await data()
        (env, _) = await dataset.get_batch(0)[0].make_envs()
        first = await env.initial_observation()
        assert isinstance(first, tuple)
        text = str(renderer.tokenizer.decode(first[0].to_ints()))
        expression = re.findall(r"What is (\d+ . \d+)\?", text)[-1]
        body = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
        for said in (f"<tool_call>\n{body}\n</tool_call>", str(int(evaluate(expression)))):
            result = await env.step([*renderer.tokenizer.encode(said), stop])
        return result

    result = asyncio.run(play())
    assert (result.reward, result.metrics["used_tool"]) == (1.0, 1.0)


def test_it_runs(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    rows = run_two_steps(
        module,
        local_service,
        tmp_path / "run",
        capsys,
        max_tokens=4,
        test_problems=2,
        tasks="calculator",
        warm_start_examples=8,
        renderer_name="chatml",
    )
    assert "env/all/used_tool" in rows[0] or "env/all/max_tokens_reached" in rows[0]
    assert (tmp_path / "run/warm_start/run/metrics.jsonl").exists()
