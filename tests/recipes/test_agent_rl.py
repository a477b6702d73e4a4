"""The agent recipe: its agent knows nothing of us, its grading, and two steps of a run."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest

from recipes.agent_rl import __main__ as module
from recipes.agent_rl.__main__ import WordTask, problems, score
from recipes.agent_rl.agent import call_tool, count_words
from tests.recipes.rl_runs import read_replies, run_two_steps
from tinker_cookbook.capture import read_calls
from tinker_cookbook.rl.types import RLDataset


def test_the_agent_imports_only_its_client():
    tree = ast.parse(module.AGENT.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = {alias.name for node in imports for alias in node.names}
    assert names == {"asyncio", "json", "os", "re", "sys", "openai"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize(
    ("text", "reward"),
    [("Bees make good honey", 1.0), ("Bees fly", 0.5), ("", 0.0), ("bee " * 8, 0.0)],
)
def test_the_reward_falls_with_the_distance(text: str, reward: float):
    assert score(text, WordTask("bees", 4)).reward == reward


def test_the_tool_counts_and_names_bad_arguments():
    assert call_tool('{"text": "one two"}') == "2" == str(count_words("one two"))
    assert call_tool("nonsense").startswith("error")


def test_no_topic_is_trained_on_and_held_out():
    trained, held_out = ({task.topic for task in problems(split)} for split in ("train", "test"))
    assert trained
    assert held_out
    assert not trained & held_out


def test_the_data_are_functions_of_the_settings(tiny_model_folder: Path):
    config = module.Config(
        model_name=str(tiny_model_folder), renderer_name="qwen2_5", log_path="unused"
    )
    data, held_out = asyncio.run(module.build(config).dataset_builder())
    assert isinstance(held_out, RLDataset)
    assert len(data) > 40


@pytest.mark.parametrize("subprocess", [False, True])
def test_it_runs(local_service, tmp_path: Path, monkeypatch, capsys, subprocess: bool):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    rows = run_two_steps(
        module,
        local_service,
        tmp_path / "run",
        capsys,
        max_tokens=6,
        max_test_problems=1,
        renderer_name="chatml",
        subprocess=subprocess,
        record_calls=True,
        group_size=2,
        groups_per_batch=1,
    )
    assert rows[0]["env/all/agent_calls"] >= 1
    calls = [c for path in (tmp_path / "run/calls").glob("*.jsonl") for c in read_calls(path)]
    assert {len(call.tokens) for call in calls} <= set(range(1, 7))
    assert all(len(call.logprobs) == len(call.tokens) for call in calls)
    assert len(read_replies(tmp_path / "run", 0)) == 2
