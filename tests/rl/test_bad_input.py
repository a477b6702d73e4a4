"""What goes wrong in environments, through the whole loop: what happens, and what is said.

The table of docs/rl.md has each message too, without the words that vary.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.rl.bad_task import BadDatasetBuilder, Fault
from tinker_cookbook.exceptions import AllTrajectoriesFailedError, ConfigurationError
from tinker_cookbook.rl import train

DOCS = (Path(__file__).parents[2] / "docs/rl.md").read_text(encoding="utf-8")


@pytest.fixture
def build(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)

    def make(
        fault: Fault, *, name: str = "run", data: dict[str, Any] | None = None, **changes: Any
    ) -> train.Config:
        settings: dict[str, Any] = {
            "log_path": str(tmp_path / name),
            "model_name": local_service.model,
            "base_url": local_service.base_url,
            "dataset_builder": BadDatasetBuilder(fault=fault, **data or {}),
            "max_tokens": 4,
            "learning_rate": 5e-3,
            "lora_rank": 4,
            "eval_every": 0,
            "save_every": 1,
        }
        return train.Config(**settings | changes)

    return make


def rows(config: train.Config) -> list[dict[str, Any]]:
    text = (Path(config.log_path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def causes(config: train.Config, step: int = 0) -> str:
    """The errors that the rollouts' records name."""
    folder = Path(config.log_path) / f"iteration_{step:06d}"
    return (folder / "train_rollout_summaries.jsonl").read_text(encoding="utf-8")


# The fault of every member, and the message that ends the run.
FATAL = [
    ("raises", AllTrajectoriesFailedError,
     r"all 4 groups of the batch failed; last error: .*ZeroDivisionError at bad_task\.py:\d+: "
     r"reward is 1/0.*rollout_error_tolerance=False shows the whole traceback"),
    ("nan", AllTrajectoriesFailedError,
     r"reward=nan of BadEnv\.step at turn 0 is not a finite number; one such reward would spoil "
     r"the whole batch\. Correct the reward function\."),
    ("text_reward", AllTrajectoriesFailedError, r"reward=good of BadEnv\.step at turn 0 is not a "),
    ("no_result", AllTrajectoriesFailedError, r"BadEnv\.step returned tuple; return a StepResult"),
    ("cannot_build", AllTrajectoriesFailedError, r"BadGroup: OSError at .*: the database is gone"),
    ("group_rewards", AllTrajectoriesFailedError,
     r"BadGroup\.compute_group_rewards returned 1 rewards for 4 trajectories"),
    ("long_prompt", AllTrajectoriesFailedError,
     r"prompt of 5000 tokens fills the model's context of \d+ tokens, so a reply does not fit"),
    ("empty_group", ConfigurationError,
     r"BadGroup\.make_envs returned no environment; a group has at least 2 members to compare\. "
     r"Check its group size\."),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "error", "message"), FATAL, ids=[row[0] for row in FATAL])
def test_if_all_are_bad_the_run_ends_with_the_cause(build, fault: Fault, error, message: str):
    with pytest.raises(error, match=message):
        asyncio.run(train.main(build(fault)))


@pytest.mark.parametrize("fault", ["raises", "nan", "cannot_build", "group_rewards", "long_prompt"])
def test_if_one_group_is_bad_the_others_are_trained_on(build, fault: Fault):
    config = build(fault, data={"bad_groups": (1,)})
    asyncio.run(train.main(config))
    [row] = rows(config)
    assert (row["env/all/total_episodes"], row["num_datums"]) == (12, 12)
    assert row["rollout_errors/groups_failed"] == 1
    assert re.search(r"\\?\"error|Error", causes(config))


def test_the_first_error_is_raised_as_it_is_if_none_is_tolerated(build):
    with pytest.raises(ZeroDivisionError, match="reward is 1/0"):
        asyncio.run(train.main(build("raises", rollout_error_tolerance=False)))


def test_a_hanging_environment_is_cut_off_and_its_turns_are_kept(build):
    config = build("hangs", data={"bad_groups": (1,)}, rollout_timeout_seconds=4.0)
    started = time.monotonic()
    asyncio.run(train.main(config))
    assert time.monotonic() - started < 100
    [row] = rows(config)
    assert row["env/all/total_episodes"] == 16
    assert row["env/all/stop/rollout_timeout"] == 0.25


def test_an_environment_that_hangs_before_its_first_prompt_is_recorded(build):
    config = build("hangs_at_start", data={"bad_groups": (1,)}, rollout_timeout_seconds=4.0)
    asyncio.run(train.main(config))
    [row] = rows(config)
    assert (row["env/all/total_episodes"], row["num_datums"]) == (16, 12)
    assert row["env/all/stop/rollout_timeout"] == 0.25


def test_a_blocking_environment_holds_up_nobody_in_an_executor(build):
    config = build("blocks")
    with ThreadPoolExecutor(4) as pool:
        asyncio.run(train.main(config, rollout_executor=pool))
    assert rows(config)[0]["env/all/total_episodes"] == 16


def test_equal_rewards_are_said_and_skipped(build, caplog: pytest.LogCaptureFixture):
    config = build("equal", remove_constant_reward_groups=True)
    asyncio.run(train.main(config))
    assert "all 4 groups have equal rewards within: there is nothing to learn" in caplog.text


def test_episodes_without_a_token_make_no_datum(build, caplog: pytest.LogCaptureFixture):
    config = build("overflow", data={"bad_groups": (1,)})
    asyncio.run(train.main(config))
    [row] = rows(config)
    assert (row["env/all/total_episodes"], row["num_datums"]) == (16, 12)
    nothing = build("overflow", name="nothing")
    asyncio.run(train.main(nothing))
    assert rows(nothing)[0]["num_datums"] == 0
    assert (
        "step 0 has nothing to train on and is skipped (episodes by their end: context_overflow 16)"
        in caplog.text
    )


def test_a_builder_that_does_not_pickle_is_named(build):
    message = r"env group builder BadGroup cannot be pickled \(.*\), which a rollout executor needs"
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigurationError, match=message):
        asyncio.run(train.main(build("lambda"), rollout_executor=pool))
    asyncio.run(train.main(build("lambda")))  # without an executor nothing is pickled


PROGRAM = """
import sys
import chz
from tests.rl.bad_task import BadDatasetBuilder
from tinker_cookbook import cli_utils
from tinker_cookbook.rl import recipe, train
def main(config: train.RunOptions) -> None:
    data = BadDatasetBuilder(fault="pauses", num_batches=3, bad_groups=(6,), flag=sys.argv[4])
    recipe.run(train.Config(log_path=sys.argv[1], model_name=sys.argv[2], base_url=sys.argv[3],
        max_tokens=4, learning_rate=5e-3, lora_rank=4, eval_every=0, save_every=1,
        dataset_builder=data))
cli_utils.entrypoint(main, [])
"""


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(signal.SIGINT, id="ctrl_c"),
        pytest.param(signal.SIGKILL, id="kill", marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_is_interrupted_is_done_again(build, tmp_path: Path, stop: signal.Signals):
    """Stopped while the second batch is half sampled; resumed, all is as in an unbroken run."""
    done = tmp_path / "unbroken_flag"
    done.touch()
    whole = {"num_batches": 3, "bad_groups": (6,), "flag": str(done)}
    unbroken = build("pauses", name="unbroken", data=whole)
    asyncio.run(train.main(unbroken))
    flag = tmp_path / "flag"
    broken = build("pauses", name="broken", data=whole | {"flag": str(flag)})
    arguments = [broken.log_path, broken.model_name, broken.base_url or "", str(flag)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not flag.exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline, "the run did not get far enough"
        time.sleep(0.02)
    time.sleep(0.3)  # the other groups of the batch are done meanwhile
    os.kill(process.pid, stop)
    _, said = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert "the same command resumes from checkpoint" in said
    asyncio.run(train.main(broken))
    for step in range(3):
        assert causes(broken, step) == causes(unbroken, step)


@pytest.mark.parametrize("message", [row[2] for row in FATAL], ids=[row[0] for row in FATAL])
def test_the_messages_stand_in_the_documentation(message: str):
    words = re.split(r"\\d\+|\.\*|\(|BadEnv|BadGroup|bad_task|5000|1 rewards for 4|good", message)
    longest = max(words, key=len).replace("\\", "").strip(" .;:")
    assert longest in " ".join(DOCS.split())
