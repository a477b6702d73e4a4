"""The programming recipe: problems, grading in the sandbox, a second attempt, and a run."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest

from recipes.code_rl import __main__ as module
from recipes.code_rl.envs import CodeDatasetBuilder, CodeEnv, CodeGroup
from recipes.code_rl.grading import Verdict, extract_code, run_tests
from recipes.code_rl.problems import FAMILIES, Problem, all_problems, split_problems
from tests.recipes.rl_runs import run_two_steps
from tinker_cookbook.rl.message_env import MessageStepResult
from tinker_cookbook.sandbox import LocalSandbox, SandboxBackend

PROBLEM = Problem("arithmetic", "a plus b", "a, b", (((1, 2), 3), ((4, 5), 9)))


def judge(code: str, problem: Problem = PROBLEM) -> Verdict:
    async def work() -> Verdict:
        sandbox = LocalSandbox()
        try:
            return await run_tests(sandbox, problem, code, 2 if "while True" in code else 60)
        finally:
            await sandbox.cleanup()

    return asyncio.run(work())


def test_problems_are_distinct_and_held_out_ones_apart():
    trained, held_out = split_problems()
    questions = {problem.question() for problem in all_problems()}
    assert len(questions) == len(trained) + len(held_out) == 10 * len(FAMILIES)
    assert not {p.task for p in trained} & {p.task for p in held_out}


def test_right_code_passes():
    assert judge("def solve(a, b):\n    return a + b") == Verdict(1.0, "")


@pytest.mark.parametrize(
    ("code", "share", "problem"),
    [
        ("def solve(a, b):\n    return 3", 0.5, "solve(4, 5) should be 9: returned 3"),
        ("def solve(a, b):\n    return float(a + b)", 0.0, "returned 3.0"),
        ("def solve(a, b):\n    return a / 0", 0.0, "raised ZeroDivisionError"),
        ("def solve(a):\n    return a", 0.0, "raised TypeError"),
        ("def solve(a, b) return", 0.0, "SyntaxError"),
        ("import sys\nsys.exit(0)\ndef solve(a, b): pass", 0.0, "SystemExit"),
        ("import os\nos._exit(0)\ndef solve(a, b): pass", 0.0, "ended early"),
        ("while True: pass\ndef solve(a, b): pass", 0.0, "longer than 2 seconds"),
        ('print(\'["", ""]\')\ndef solve(a, b):\n    return None', 0.0, "returned None"),
        ("def solve(a, b):\n    return open('cases.json').read()", 0.0, "FileNotFoundError"),
    ],
)
def test_wrong_code_does_not(code: str, share: float, problem: str):
    verdict = judge(code)
    assert verdict.share_passed == share
    assert problem in verdict.problem


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (
            "Sure:\n```python\ndef solve(a):\n    return a\n```\nDone.",
            "def solve(a):\n    return a\n",
        ),
        ("```\ndef solve(a): pass", "def solve(a): pass"),
        ("def solve(a): return a", "def solve(a): return a"),
        ("I cannot.", None),
    ],
)
def test_code_is_found(reply: str, code: str | None):
    assert extract_code(reply) == code


def test_a_failing_test_is_shown_and_a_second_attempt_counts():
    async def play() -> list[MessageStepResult]:
        sandbox = LocalSandbox()
        env = CodeEnv(PROBLEM, sandbox, max_turns=2, timeout_seconds=2)
        await env.initial_observation()
        first = await env.step({"role": "assistant", "content": "def solve(a, b): return a"})
        second = await env.step({"role": "assistant", "content": "def solve(a, b): return a + b"})
        await sandbox.cleanup()
        return [first, second]

    first, second = asyncio.run(play())
    assert (first.reward, first.episode_done) == (0.0, False)
    assert "solve(1, 2) should be 3: returned 1" in str(first.next_messages[-1]["content"])
    assert (second.reward, second.episode_done, second.metrics["correct"]) == (1.0, True, 1.0)


def test_groups_pickle_and_remove_their_sandboxes(tiny_model_folder: Path):
    data = CodeDatasetBuilder(
        model_name=str(tiny_model_folder),
        renderer_name="chatml",
        groups_per_batch=1,
        group_size=3,
        num_batches=1,
        max_turns=1,
        sandbox=SandboxBackend.LOCAL,
        timeout_seconds=5,
        test_problems=0,
    )
    group = pickle.loads(pickle.dumps(CodeGroup(data, False, 5)))

    async def use() -> list[Path]:
        await group.make_envs()
        folders = [sandbox.folder for sandbox in group.sandboxes]
        assert all(folder.is_dir() for folder in folders)
        await group.cleanup()
        return folders

    assert not any(folder.exists() for folder in asyncio.run(use()))


def test_it_runs(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    rows = run_two_steps(
        module,
        local_service,
        tmp_path / "run",
        capsys,
        max_tokens=6,
        test_problems=2,
        renderer_name="chatml",
    )
    assert rows[0]["env/all/total_episodes"] == 4
