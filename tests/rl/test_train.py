"""The loops against a real service with a tiny random model."""

# pyright: reportPossiblyUnboundVariable=false, reportReturnType=false

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chz
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.rl.token_task import TokenDatasetBuilder
from tinker_cookbook.checkpoint_utils import CheckpointManager, load_checkpoints_file
from tinker_cookbook.exceptions import (
    AllTrajectoriesFailedError,
    ConfigurationError,
    TrainingError,
)
from tinker_cookbook.rl import train


@pytest.fixture
def build(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make a config on the shared service."""
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)

    def make(name: str = "run", **changes: Any) -> train.Config:
        settings = {
            "log_path": str(tmp_path / name),
            "model_name": local_service.model,
            "base_url": local_service.base_url,
            "dataset_builder": TokenDatasetBuilder(num_batches=changes.pop("num_batches", 4)),
            "max_tokens": 4,
            "learning_rate": 5e-3,
            "lora_rank": 4,
            "eval_every": 2,
            "save_every": 2,
            "behavior_if_log_dir_exists": "resume",
        }
        return train.Config(**(settings | changes))

    return make


def rows(config: train.Config) -> list[dict[str, Any]]:
    text = (Path(config.log_path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def context_windows(service: ServiceProcess) -> list[int]:
    rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
    models = rest.get_server_capabilities().result().supported_models
    return [model.max_context_length for model in models]


def run(config: train.Config) -> train.RunResult:
    return asyncio.run(train.main(config))


@pytest.mark.parametrize("changes", [{}, {"num_substeps": 2}], ids=["one step", "substeps"])
def test_the_floor_is_said_once_at_the_start(build, capfd, changes):
    """Of data scored before the first update: with more of them the gap would be the update's."""
    run(build(num_batches=2, learning_rate=5e-2, eval_every=0, **changes))
    lines = capfd.readouterr()
    (line,) = [text for text in (lines.out + lines.err).splitlines() if "nats per token" in text]
    assert float(line.split(" differ by ")[1].split()[0]) < 1e-4


def test_reward_rises_and_everything_is_written(build):
    config = build(num_batches=12, eval_every=6, save_every=5, learning_rate=2e-2)
    result = run(config)
    written = rows(config)
    steps = [row for row in written if "optim/lr" in row]
    assert [row["step"] for row in steps] == list(range(12))
    before = written[0]["test/env/all/reward/total"]
    assert result.metrics["test/env/all/reward/total"] > before + 0.1
    for key in ("progress/batch", "optim/entropy", "env/all/by_group/frac_mixed", "time/total"):
        assert key in steps[0], key
    assert max(row["optim/kl_sample_train_v2"] for row in steps) < 1e-3
    folder = Path(config.log_path) / "iteration_000003"
    records = [
        json.loads(line)
        for line in (folder / "train_rollout_summaries.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(records) == 4 * 4
    assert {"prompt", "reply"} <= records[0]["steps"][0].keys()
    page = (folder / "train.html").read_text(encoding="utf-8")
    assert "Group 0" in page
    assert "src=" not in page  # the page is one file
    assert 'href="../iteration_000002/train.html"' in page
    assert 'href="../iteration_000004/train.html"' in page
    steps_page = (Path(config.log_path) / "transcripts.html").read_text(encoding="utf-8")
    assert steps_page.count('/train.html">') == 2 * 12, "a row and a link for each step"
    assert steps_page.count('/eval_test.html">') == 2 * 3
    names = [record.name for record in load_checkpoints_file(config.log_path)]
    assert names[-1] == "final"
    assert {"000005", "000010", "best_000012"} <= set(names)
    assert "best_000012" in result.best_sampler_path
    assert run(config).metrics == {}  # complete: nothing to do


DEPENDS_ON_THE_CLOCK = ("time/", "cached_ob_tokens", "tokens/")


def assert_same_runs(config: train.Config, expected: train.Config) -> None:
    """Equal replies, and equal metrics but for times and for what the service had cached."""
    for path in sorted(Path(expected.log_path).glob("iteration_*/*.jsonl")):
        other = Path(config.log_path) / path.parent.name / path.name
        assert other.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), path.name
    different = [
        (row["step"], key, row.get(key), wanted.get(key))
        for row, wanted in zip(rows(config), rows(expected), strict=True)
        for key in row.keys() | wanted.keys()
        if row.get(key) != wanted.get(key) and not any(w in key for w in DEPENDS_ON_THE_CLOCK)
    ]
    assert not different


def test_a_resumed_run_equals_an_unbroken_one(build):
    unbroken = build("unbroken", num_batches=6, save_every=3)
    run(unbroken)
    broken = build("broken", num_batches=6, save_every=3)

    # The same data, and an error where the fifth batch is asked for.
    failing = chz.replace(broken, dataset_builder=TokenDatasetBuilder(num_batches=6, fail_at=4))
    with pytest.raises(InterruptedError):
        run(failing)
    assert [row["step"] for row in rows(broken)] == [0, 1, 2, 3]
    run(broken)
    assert_same_runs(broken, unbroken)


def test_a_killed_run_equals_an_unbroken_one(build, tmp_path: Path):
    unbroken, killed = build("unbroken"), build("killed")
    run(unbroken)
    program = (
        "import asyncio, sys\n"
        "from tests.rl.token_task import TokenDatasetBuilder\n"
        "from tinker_cookbook.rl import train\n"
        "asyncio.run(train.main(train.Config(log_path=sys.argv[1], model_name=sys.argv[2],\n"
        "    base_url=sys.argv[3], max_tokens=4, learning_rate=5e-3, lora_rank=4, eval_every=2,\n"
        "    save_every=2, behavior_if_log_dir_exists='resume',\n"
        "    dataset_builder=TokenDatasetBuilder(num_batches=4, pause_at=3))))\n"
    )
    arguments = [killed.log_path, killed.model_name, killed.base_url or ""]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    deadline = time.monotonic() + 120
    paused = Path(killed.log_path) / "metrics.jsonl"
    while not (paused.exists() and len(paused.read_text().splitlines()) >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get far enough"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(killed)
    assert_same_runs(killed, unbroken)


def test_a_loss_that_the_local_service_lacks_is_refused_before_sampling(
    build, monkeypatch: pytest.MonkeyPatch
):
    config = build(base_url="local", loss_fn="stable_reinforce")
    with pytest.raises(ConfigurationError, match="not offered by the local service"):
        run(config)


def test_a_loop_of_ones_own_saves_and_samples(build, shared_client, tmp_path: Path):
    config = build()

    async def work() -> tuple[list[str], dict, int]:
        training = shared_client.create_lora_training_client(config.model_name, rank=4).result()
        manager = CheckpointManager(training, shared_client, str(tmp_path), save_every=2)
        seen: dict = {}
        for step in range(3):
            client, metrics = await train.save_checkpoint_and_get_sampling_client(
                training, manager, step, start_batch=0
            )
            seen |= metrics
        prompt = tinker.ModelInput.from_ints([5, 6])
        sampled = await client.sample(prompt, 1, tinker.SamplingParams(max_tokens=3))
        names = [record.name for record in load_checkpoints_file(str(tmp_path))]
        return names, seen, len(sampled.sequences[0].tokens)

    names, metrics, num_tokens = asyncio.run(work())
    assert names == ["000002"]
    assert load_checkpoints_file(str(tmp_path))[0].batch == 2
    assert metrics.keys() == {"time/save_checkpoint"}
    assert num_tokens == 3


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo", "dro"])
def test_losses(build, loss_fn: str):
    settings = {"loss_fn_config": {"beta": 0.05}} if loss_fn == "dro" else {}
    config = build(
        num_batches=2, loss_fn=loss_fn, eval_every=0, num_substeps=2, save_every=0, **settings
    )
    run(config)
    steps = rows(config)
    assert [row["optim/num_steps"] for row in steps] == [2, 2]
    assert all("loss:sum" in row for row in steps)


def test_the_chosen_advantages_reach_the_gradient(build):
    def first_step(name: str, **changes: Any) -> dict[str, Any]:
        config = build(name, num_batches=1, eval_every=0, save_every=0, **changes)
        run(config)
        return rows(config)[0]

    plain = first_step("plain")
    mean_length = plain["env/all/total_ac_tokens"] / plain["env/all/total_episodes"]
    others = first_step("others", advantage_estimator="leave_one_out")
    scaled = first_step("scaled", length_normalization="batch")
    # Groups of 4 with the same samples: 4/3 of the centred reward, and a fixed part of it.
    assert others["grad_norm"] == pytest.approx(plain["grad_norm"] * 4 / 3, rel=1e-3)
    assert scaled["grad_norm"] == pytest.approx(plain["grad_norm"] / mean_length, rel=1e-3)


def test_streaming(build):
    stream = train.StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2)
    config = build(num_batches=10, stream_minibatch_config=stream, eval_every=0, learning_rate=2e-2)
    run(config)
    steps = rows(config)
    assert [row["num_datums"] for row in steps] == [16] * 10
    rewards = [row["env/all/reward/total"] for row in steps]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    wrong = train.StreamMinibatchConfig(groups_per_batch=8, num_minibatches=2)
    with pytest.raises(ConfigurationError, match="groups_per_batch=8, but the data has 4"):
        run(build("wrong", stream_minibatch_config=wrong, eval_every=0))


@pytest.mark.parametrize("max_steps_off_policy", [0, 2])
def test_async_staleness_is_bounded(build, max_steps_off_policy: int):
    setting = train.AsyncConfig(max_steps_off_policy=max_steps_off_policy, groups_per_batch=4)
    config = build(num_batches=8, async_config=setting, eval_every=4)
    run(config)
    steps = [row for row in rows(config) if "optim/lr" in row]
    assert len(steps) == 8
    assert max(row["async/staleness_max"] for row in steps) <= max_steps_off_policy
    if max_steps_off_policy:
        assert max(row["async/staleness_max"] for row in steps) > 0
    assert all(row["env/all/total_episodes"] == 16 for row in steps)


def test_kl_penalty_and_post_kl(build):
    config = build(
        num_batches=2,
        kl_penalty_coef=0.1,
        kl_discount_factor=0.9,
        kl_reference_config=train.KLReferenceConfig(base_model=build().model_name),
        compute_post_kl=True,
        remove_constant_reward_groups=True,
        advantage_estimator="leave_one_out",
        eval_every=0,
    )
    run(config)
    first, second = rows(config)
    assert abs(first["kl_policy_base"]) < 1e-2  # the policy still is the reference
    assert second["kl_pre_post_v2"] > 0
    assert first["env/all/total_episodes"] == 16  # all groups are measured


def test_failing_envs_do_not_lose_the_batch(build):
    data = TokenDatasetBuilder(num_batches=2, failing_groups=(1,))
    config = build(dataset_builder=data, eval_every=0)
    run(config)
    first = rows(config)[0]
    assert first["env/all/total_episodes"] == 12
    assert first["rollout_errors/groups_failed"] == 1
    folder = Path(config.log_path) / "iteration_000000"
    text = (folder / "train_rollout_summaries.jsonl").read_text(encoding="utf-8")
    assert "this group always fails" in text


def test_if_all_fail_the_cause_is_said(build):
    data = TokenDatasetBuilder(num_batches=2, failing_groups=(0, 1, 2, 3))
    with pytest.raises(AllTrajectoriesFailedError, match=r"all 4 groups.*this group always fails"):
        run(build(dataset_builder=data, eval_every=0))


def test_group_size_one_is_refused(build):
    data = TokenDatasetBuilder(num_batches=2, group_size=1)
    with pytest.raises(ConfigurationError, match="group_size=1 gives every advantage 0"):
        run(build(dataset_builder=data, eval_every=0))


def test_equal_rewards_are_survived_and_reported(build, caplog: pytest.LogCaptureFixture):
    data = TokenDatasetBuilder(num_batches=1, constant_reward=1.0)
    config = build(dataset_builder=data, eval_every=0, remove_constant_reward_groups=True)
    run(config)
    assert rows(config)[0]["env/all/by_group/frac_all_good"] == 1.0
    assert "nothing to learn" in caplog.text


def test_groups_with_equal_rewards_are_replaced(build):
    """Two of four groups are constant; each round adds the first groups of another batch."""
    data = TokenDatasetBuilder(num_batches=4, constant_reward=1.0, constant_groups=(0, 3))
    settings = {"dataset_builder": data, "eval_every": 0, "remove_constant_reward_groups": True}
    plain, refilled = build("plain", **settings), build("refilled", max_refill_rounds=2, **settings)
    run(plain)
    run(refilled)
    for row, other in zip(rows(plain), rows(refilled), strict=True):
        assert row["env/all/total_episodes"] == 16
        assert row["num_datums"] <= 8
        # The first round adds a constant group and one that is usually mixed.
        assert other["env/all/total_episodes"] >= 28
    assert sum(row["num_datums"] for row in rows(refilled)) >= 4 + sum(
        row["num_datums"] for row in rows(plain)
    )
    stopped = chz.replace(data, fail_at=3)
    with pytest.raises(InterruptedError):
        run(chz.replace(refilled, dataset_builder=stopped, log_path=f"{refilled.log_path}-again"))
    resumed = chz.replace(refilled, log_path=f"{refilled.log_path}-again")
    run(resumed)
    assert_same_runs(resumed, refilled)


@pytest.mark.parametrize("async_steps", [None, 1])
def test_a_correction_weights_the_samples(build, async_steps: int | None):
    loop = async_steps and train.AsyncConfig(max_steps_off_policy=1, groups_per_batch=4)
    settings = {"num_batches": 4, "eval_every": 0, "learning_rate": 2e-2, "async_config": loop}
    config = build(rollout_correction="token_truncate", loss_fn="ppo", **settings)
    run(config)
    steps = [row for row in rows(config) if "optim/lr" in row]
    assert len(steps) == 4
    for row in steps:
        assert row["correction/kl"] == pytest.approx(row["optim/kl_sample_train_v1"], abs=1e-5)
        if async_steps is None:
            assert row["correction/weight"] == pytest.approx(1.0, abs=1e-3)
            assert row["correction/limited"] == 0
    if async_steps:
        assert max(abs(row["correction/weight"] - 1) for row in steps) > 1e-4


def test_replies_that_were_cut_are_not_trained_on(build):
    """A random model nearly never ends a reply, so nearly everything is cut."""
    config = build(num_batches=1, train_truncated=False, eval_every=0)
    run(config)
    ended = rows(config)[0]["num_datums"]
    assert ended < 4
    config = build("all", num_batches=1, eval_every=0)
    run(config)
    assert rows(config)[0]["num_datums"] == 16


def test_a_run_that_does_not_improve_stops(build):
    data = TokenDatasetBuilder(num_batches=8, constant_reward=0.5)
    config = build(dataset_builder=data, eval_every=2, early_stopping_evals=2)
    run(config)
    steps = [row["step"] for row in rows(config) if "optim/lr" in row]
    assert steps == [0, 1, 2, 3]
    assert load_checkpoints_file(config.log_path)[-1].name == "final"


def test_prompts_longer_than_the_context_are_reported(build):
    data = TokenDatasetBuilder(num_batches=1, prompt_length=5000)
    with pytest.raises(TrainingError, match="so a reply does not fit"):
        run(build(dataset_builder=data, eval_every=0))


def test_a_max_tokens_without_room_for_a_prompt_is_refused_before_sampling(build):
    config = build(num_batches=1, max_tokens=100_000)
    message = r"max_tokens=100000 leaves no room.* at most \d+ "
    with pytest.raises(ConfigurationError, match=message):
        run(config)
    assert not (Path(config.log_path) / "metrics.jsonl").exists()


def test_held_out_replies_get_the_room_that_the_context_leaves(build, local_service):
    [window] = context_windows(local_service)
    data = TokenDatasetBuilder(
        num_batches=1, prompt_length=window - 2, groups_per_batch=1, group_size=2
    )
    config = build(dataset_builder=data, max_tokens=4)
    run(config)
    lengths = [row["test/env/all/ac_tokens_per_turn"] for row in rows(config)]
    assert all(1 <= length <= 2 for length in lengths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"max_tokens": 0}, "max_tokens=0 is less than 1"),
        ({"kl_penalty_coef": 0.1}, "needs a reference"),
        ({"loss_fn": "ppoo"}, "loss_fn=ppoo is unknown; .* Did you mean 'ppo'"),
        (
            {
                "stream_minibatch_config": train.StreamMinibatchConfig(
                    groups_per_batch=5, num_minibatches=2
                )
            },
            "groups_per_batch=5 cannot be divided",
        ),
        ({"max_refill_rounds": 1}, "remove_constant_reward_groups=True leaves out; set that too"),
        (
            {
                "max_refill_rounds": 1,
                "remove_constant_reward_groups": True,
                "async_config": train.AsyncConfig(max_steps_off_policy=1, groups_per_batch=4),
            },
            "max_refill_rounds=1 works in the synchronous loop only",
        ),
        (
            {
                "early_stopping_evals": 1,
                "async_config": train.AsyncConfig(max_steps_off_policy=1, groups_per_batch=4),
            },
            "early_stopping_evals=1 works in the synchronous loop only",
        ),
        ({"overlong_buffer": 5}, "overlong_buffer=5 must be between 0 and max_tokens=4"),
        ({"turn_discount": 1.5}, "turn_discount=1.5 must be between 0 and 1"),
        ({"correction_limit": 1.0}, "correction_limit=1.0 must be above 1"),
        (
            {"async_config": train.AsyncConfig(max_steps_off_policy=-1, groups_per_batch=4)},
            "max_steps_off_policy=-1 is negative",
        ),
    ],
)
def test_settings_are_checked_before_anything_starts(build, changes, message: str):
    with pytest.raises(ConfigurationError, match=message):
        build(**changes)
