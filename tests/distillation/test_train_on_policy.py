"""On-policy distillation against the real service."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.distillation.data import REPLY_TOKENS, TokenBuilder, train_teacher
from tests.number_format import by_format
from tests.rl.token_task import TokenDatasetBuilder
from tests.tiny_models import build_tiny_model
from tinker_cookbook.checkpoint_utils import load_checkpoints_file
from tinker_cookbook.distillation import train_on_policy
from tinker_cookbook.distillation.datasets import (
    CompositeDataset,
    DistillationDatasetConfig,
    PromptOnlyDataset,
    PromptOnlyDatasetBuilder,
    TeacherConfig,
)
from tinker_cookbook.distillation.teacher import Teacher
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher
from tinker_cookbook.exceptions import ConfigurationError, TinkerCookbookError
from tinker_cookbook.rl.config import AsyncConfig, StreamMinibatchConfig
from tinker_cookbook.utils.sdk_compat import wait_for_client

FLOOR = by_format(float32=1e-5, bfloat16=5e-2)


@pytest.fixture(autouse=True)
def _service(monkeypatch: pytest.MonkeyPatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


@pytest.fixture(scope="module")
def teacher_path(local_service: ServiceProcess) -> str:
    return train_teacher(local_service, favourite=77)


@pytest.fixture(scope="module")
def other_teacher_path(local_service: ServiceProcess) -> str:
    return train_teacher(local_service, favourite=88)


@pytest.fixture
def taught(local_service: ServiceProcess):
    def make(
        path: str | None, name: str | None = None, groups: int = 4, **data: Any
    ) -> DistillationDatasetConfig:
        return DistillationDatasetConfig(
            dataset_builder=TokenDatasetBuilder(groups_per_batch=groups, **data),
            teacher_config=TeacherConfig(base_model=local_service.model, load_checkpoint_path=path),
            groups_per_batch=groups,
            name=name,
        )

    return make


@pytest.fixture
def make_config(tmp_path: Path, local_service: ServiceProcess, taught):
    def make(
        name: str = "run", *, path: str | None = None, num_batches: int = 4, **options: Any
    ) -> train_on_policy.Config:
        defaults = {
            "dataset_configs": [taught(path, num_batches=num_batches)],
            "max_tokens": 4,
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "eval_every": 0,
            "save_every": 0,
            "reward_weight": 0.0,
            "behavior_if_log_dir_exists": "resume",
        }
        return train_on_policy.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            base_url=local_service.base_url,
            **defaults | options,
        )

    return make


def run(config: train_on_policy.Config) -> train_on_policy.RunResult:
    return asyncio.run(train_on_policy.main(config))


def rows_of(config: train_on_policy.Config) -> list[dict[str, Any]]:
    text = (Path(config.log_path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("topk", [0, 8])
def test_a_teacher_that_is_the_student_teaches_nothing(make_config, teacher_path: str, topk: int):
    same = make_config("same", num_batches=1, topk=topk)
    other = make_config("other", num_batches=1, topk=topk, path=teacher_path)
    run(same)
    run(other)
    one, normal = rows_of(same)[0], rows_of(other)[0]
    assert abs(one["teacher_kl"]) < FLOOR
    assert 0 <= one["teacher_kl_k3"] < FLOOR
    assert normal["teacher_kl"] > 0.05
    assert one["grad_norm"] < by_format(float32=1e-3, bfloat16=0.3) * normal["grad_norm"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"topk": 8}, {"topk": 8, "objective": "forward_kl"}],
    ids=["sampled", "reverse", "forward"],
)
def test_the_student_comes_nearer_to_the_teacher(
    make_config, taught, teacher_path: str, changes: dict[str, Any]
):
    num_batches = 12
    data = taught(teacher_path, num_batches=num_batches, group_size=16, prompt_length=2)
    config = make_config(dataset_configs=[data], learning_rate=4e-3, max_tokens=2, **changes)
    run(config)
    rows = rows_of(config)
    assert len(rows) == num_batches
    first = np.mean([row["teacher_kl"] for row in rows[:2]])
    last = np.mean([row["teacher_kl"] for row in rows[-2:]])
    assert last < 0.8 * first
    assert rows[0]["teacher_kl"] == pytest.approx(rows[0]["teacher_kl/dataset_0"])
    assert rows[0]["teacher_kl_stderr"] > 0
    if changes.get("topk"):
        assert 0 < rows[0]["top_k/teacher_mass"] <= 1
        assert rows[-1]["top_k/teacher_kl_reverse"] < rows[0]["top_k/teacher_kl_reverse"]


def test_advantages_are_minus_the_reverse_kl(
    local_service: ServiceProcess, shared_client: tinker.ServiceClient, teacher_path: str
):
    base = wait_for_client(shared_client.create_sampling_client(base_model=local_service.model))
    teacher = wait_for_client(shared_client.create_sampling_client(model_path=teacher_path))
    prompt = tinker.ModelInput.from_ints([20, 21, 22])
    sampled = base.sample(prompt, 1, tinker.SamplingParams(max_tokens=5, seed=1)).result()
    tokens = [20, 21, 22, *sampled.sequences[0].tokens]
    length = len(tokens) - 1
    arrays = {
        "target_tokens": np.array(tokens[1:]),
        "logprobs": np.array([0, 0, *sampled.sequences[0].logprobs], np.float32),
        "advantages": np.full(length, 0.25, np.float32),
        "mask": np.array([0, 0] + [1] * 5, np.float32)[:length],
    }
    inputs = {name: tinker.TensorData.from_numpy(array) for name, array in arrays.items()}
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs
    )
    data = [datum, datum]
    metrics = asyncio.run(
        train_on_policy.incorporate_kl_penalty(data, [teacher, base], [0, 1], 2.0, 0.0)
    )
    scores = teacher.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()[3:]
    difference = np.array(sampled.sequences[0].logprobs) - np.array(scores)
    found = data[0].loss_fn_inputs["advantages"].to_numpy()
    np.testing.assert_allclose(found[:2], 0.25)
    np.testing.assert_allclose(found[2:], 0.25 - 2 * difference, atol=10 * FLOOR)
    np.testing.assert_allclose(
        data[1].loss_fn_inputs["advantages"].to_numpy(), 0.25, atol=10 * FLOOR
    )
    assert metrics["teacher_kl/dataset_0"] == pytest.approx(difference.mean(), abs=10 * FLOOR)
    assert metrics["teacher_kl/dataset_1"] == pytest.approx(0, abs=10 * FLOOR)


def test_a_failed_group_shifts_nothing(
    make_config, taught, teacher_path: str, other_teacher_path: str
):
    """The second data set is the same task and teacher as in a run without failures."""

    def configs(failing: tuple[int, ...]) -> list[DistillationDatasetConfig]:
        first = taught(teacher_path, "first", 3, num_batches=1, failing_groups=failing)
        return [first, taught(other_teacher_path, "second", 2, num_batches=1, prompt_length=7)]

    whole = make_config("whole", dataset_configs=configs(()), rollout_error_tolerance=None)
    broken = make_config("broken", dataset_configs=configs((0, 1)), rollout_error_tolerance=None)
    run(whole)
    run(broken)
    one, other = rows_of(whole)[0], rows_of(broken)[0]
    assert other["num_datums"] == one["num_datums"] - 2 * 4
    assert other["teacher_kl/second"] == pytest.approx(one["teacher_kl/second"], abs=FLOOR)
    assert other["teacher_kl/first"] != pytest.approx(one["teacher_kl/first"], abs=1e-3)
    assert {"env/first/ac_tokens_per_turn", "env/second/ac_tokens_per_turn"} <= one.keys()


PROGRAM = """
import asyncio, pickle, sys
from tinker_cookbook.distillation import train_on_policy
config = pickle.load(open(sys.argv[1], "rb"))
if __name__ == "__main__":
    asyncio.run(train_on_policy.main(config))
"""
DEPENDS_ON_THE_CLOCK = ("time/", "cached_ob_tokens", "tokens/")


@pytest.fixture
def given(local_service: ServiceProcess):
    def make(path: str | None) -> DatasetWithTeacher:
        teacher = TeacherConfig(base_model=local_service.model, load_checkpoint_path=path)
        return DatasetWithTeacher(
            dataset_builder=TokenBuilder(count=6, batch_size=2), teacher_config=teacher
        )

    return make


@pytest.mark.parametrize("mixed", [False, True], ids=["sampled", "mixed"])
def test_a_killed_run_equals_an_unbroken_one(
    make_config, given, teacher_path: str, tmp_path: Path, mixed: bool
):
    options = {"path": teacher_path, "num_batches": 6, "save_every": 2}
    if mixed:
        options |= {"topk": 8, "given_configs": [given(teacher_path)], "given_batch_size": 4}
    unbroken, broken = make_config("unbroken", **options), make_config("broken", **options)
    run(unbroken)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(broken))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "config.pkl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    metrics = Path(broken.log_path) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(broken)
    assert load_checkpoints_file(broken.log_path)[-1].final
    for wanted, found in zip(rows_of(unbroken), rows_of(broken), strict=True):
        for key in wanted:
            if not any(word in key for word in DEPENDS_ON_THE_CLOCK):
                assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=FLOOR), key


def test_given_sequences_join_the_sampled_ones(make_config, given, teacher_path: str):
    config = make_config(
        path=teacher_path,
        num_batches=8,
        topk=8,
        objective="jensen_shannon",
        objective_beta=0.3,
        given_configs=[given(teacher_path)],
        given_batch_size=4,
    )
    run(config)
    rows = rows_of(config)
    for row in rows:
        assert row["num_datums"] == 4 * 4
        assert row["given/trained_length"] == REPLY_TOKENS
    assert 0 < rows[0]["given/teacher_mass"] < 1
    assert rows[-1]["given/teacher_kl"] < 0.9 * rows[0]["given/teacher_kl"]


def test_the_order_of_scoring_changes_nothing(make_config, teacher_path: str):
    options = {"path": teacher_path, "num_batches": 2}
    overlapped = make_config("overlapped", **options)
    in_sequence = make_config("in_sequence", overlap_scoring=False, **options)
    run(overlapped)
    run(in_sequence)
    for one, other in zip(rows_of(overlapped), rows_of(in_sequence), strict=True):
        for key in ("teacher_kl", "teacher_kl_stderr", "grad_norm", "env/all/reward/total"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=FLOOR)


def test_the_next_batch_is_sampled_and_scored_during_training(make_config, teacher_path: str):
    config = make_config(
        path=teacher_path,
        num_batches=4,
        topk=8,
        async_config=AsyncConfig(max_steps_off_policy=1, groups_per_batch=4),
    )
    run(config)
    rows = rows_of(config)
    assert len(rows) == 4
    assert max(row["async/staleness_max"] for row in rows) == 1
    assert all(row["top_k/teacher_kl_reverse"] > 0 for row in rows)


def test_groups_may_be_trained_as_they_finish(make_config, teacher_path: str):
    stream = StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2)
    config = make_config(path=teacher_path, num_batches=1, stream_minibatch_config=stream)
    whole = make_config("whole", path=teacher_path, num_batches=1)
    run(config)
    run(whole)
    [one], [other] = rows_of(config), rows_of(whole)
    for key in ("teacher_kl", "teacher_kl/dataset_0", "env/all/reward/total"):
        assert one[key] == pytest.approx(other[key], rel=1e-4, abs=FLOOR)


def test_a_teacher_of_another_chat_format_is_named(
    make_config, taught, local_service: ServiceProcess
):
    path = train_teacher(local_service, 77, steps=1, renderer_name="role_colon")
    with pytest.raises(
        ConfigurationError, match=r"has the chat format role_colon, but the student has chatml"
    ):
        run(make_config("refused", path=path, renderer_name="chatml"))
    one = taught(path, num_batches=1)
    teacher = chz.replace(one.teacher_config, renderer_name="chatml")
    config = make_config(
        renderer_name="chatml", dataset_configs=[chz.replace(one, teacher_config=teacher)]
    )
    run(config)
    assert len(rows_of(config)) == 1


class WithoutTopTokens:
    """A service that ignores the request for top tokens."""

    def sample(self, **request: Any) -> asyncio.Future[tinker.SampleResponse]:
        answered: asyncio.Future[tinker.SampleResponse] = asyncio.get_running_loop().create_future()
        answered.set_result(tinker.SampleResponse(sequences=[]))
        return answered


def test_a_teacher_without_top_tokens_is_refused():
    teacher = Teacher(WithoutTopTokens(), "teacher")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ConfigurationError, match=r"topk=20 is not possible .*teacher.*topk_prompt_logprobs.*topk=0"
    ):
        asyncio.run(teacher.check(20))
    asyncio.run(teacher.check(0))


def test_prompts_longer_than_the_context_are_named(make_config, taught):
    data = taught(None, num_batches=1, prompt_length=5000)
    with pytest.raises(TinkerCookbookError) as error:
        run(make_config(dataset_configs=[data]))
    assert re.search(r"5,?000|context", str(error.value))


def test_prompts_without_grades(make_config, local_service: ServiceProcess, teacher_path: str):
    from tinker_cookbook.renderers import load_renderer

    renderer = load_renderer("chatml", local_service.model)
    prompts = ["What is the capital of France?", "Call me a dog", "x" * 50, "left out"]
    dataset = PromptOnlyDataset(
        prompts, 3, 2, renderer, max_prompt_tokens=4, dataset_name="questions"
    )
    assert len(dataset) == 1
    group = dataset.get_batch(0)[2]
    environment = asyncio.run(group.make_envs())[0]
    observation = asyncio.run(environment.initial_observation())
    assert isinstance(observation, tuple)
    text = str(renderer.tokenizer.decode(observation[0].to_ints()))
    assert "xxx" in text
    assert "x" * 30 not in text
    result = asyncio.run(environment.step([5]))
    assert (result.reward, result.metrics) == (0.0, {"format": 0.0})
    assert group.logging_tags() == ["questions"]


STREAM = StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2)
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"topk": -1}, "topk=-1 is negative"),
    ({"topk": 4, "num_substeps": 2}, "num_substeps=2 with topk=4"),
    ({"objective": "forward"}, "objective=forward is unknown.*Did you mean forward_kl"),
    ({"objective": "renormalized"}, "objective=renormalized is unknown"),
    ({"objective_beta": 1.0}, "objective_beta=1.0 must be above 0 and below 1"),
    (
        {"async_config": AsyncConfig(max_steps_off_policy=1, groups_per_batch=3)},
        r"async_config.groups_per_batch=3 is not the sum .* set it to 4",
    ),
    (
        {
            "topk": 4,
            "stream_minibatch_config": StreamMinibatchConfig(groups_per_batch=4, num_minibatches=2),
        },
        "stream_minibatch_config with topk=4",
    ),
    ({"dataset_configs": []}, "dataset_configs is empty"),
    ({"kl_discount_factor": 2.0}, "kl_discount_factor=2.0"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS)
def test_bad_settings_are_refused_at_once(make_config, settings: dict[str, Any], words: str):
    with pytest.raises(ConfigurationError, match=words):
        make_config(**settings)


def test_bad_teachers_and_data_are_refused(make_config, tmp_path: Path, local_service, taught):
    other = tmp_path / "other-model"
    build_tiny_model(other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][-1]["content"] = "<|other|>"
    vocab = content["model"]["vocab"]
    vocab["<|other|>"] = vocab.pop("<|im_end|>")
    path.write_text(json.dumps(content))
    data = DistillationDatasetConfig(
        dataset_builder=TokenDatasetBuilder(),
        teacher_config=TeacherConfig(base_model=str(other)),
        groups_per_batch=4,
    )
    with pytest.raises(
        ConfigurationError, match=r"2 token ids differ, first id 2 .*<.other.>.*im_end"
    ):
        run(make_config("a", dataset_configs=[data]))
    with pytest.raises(ConfigurationError, match="does not have the teacher tinker://no"):
        run(make_config("b", path="tinker://no-such-run:train:0/sampler_weights/000001"))
    dataset, _ = asyncio.run(TokenDatasetBuilder(groups_per_batch=4)())
    with pytest.raises(ConfigurationError, match=r"groups_per_batch=3, but its batch 0 has 4"):
        CompositeDataset([dataset], [3]).get_batch(0)
    unknown = PromptOnlyDatasetBuilder(
        dataset_name="math",
        groups_per_batch=1,
        group_size=1,
        model_name_for_tokenizer=local_service.model,
        renderer_name="chatml",
    )
    with pytest.raises(ConfigurationError, match="dataset_name=math is unknown"):
        asyncio.run(unknown())
