"""docs/agents.md: its code runs, and its table of requests agrees with the endpoint."""

import asyncio
import re
from pathlib import Path

import pytest

from tinker_cookbook.capture import Address
from tinker_cookbook.capture.chat import _NEUTRAL
from tinker_cookbook.rl.problems import ProblemDatasetBuilder

PAGE = (Path(__file__).parents[2] / "docs/agents.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_task_runs_its_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    agent = "import os, sys; print(sys.stdin.read(), os.environ['OPENAI_BASE_URL'], 20)"
    (tmp_path / "my_agent.py").write_text(agent)
    names: dict = {}
    exec(compile(BLOCKS[0], "summing.py", "exec"), names)
    problem = names["problems"]("train")[0]
    outcome = asyncio.run(names["run"](problem, Address("http://host/v1", "key", "m")))
    assert outcome.stdout == "What is 10 + 10? http://host/v1 20\n"
    assert names["score"](outcome, problem) == 1.0
    assert issubclass(names["Data"], ProblemDatasetBuilder)


def test_the_other_example_is_a_function():
    names: dict = {}
    [block] = [block for block in BLOCKS if "async def record(" in block]
    exec(compile(block, "docs/agents.md", "exec"), names)
    assert asyncio.iscoroutinefunction(names["record"])


def test_what_is_refused_is_named():
    for name in ("n", "response_format", "logit_bias"):
        assert name in _NEUTRAL
        assert f"`{name}`" in PAGE
