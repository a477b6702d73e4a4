"""Off-policy distillation against the real service."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.distillation.data import REPLY_TOKENS, TokenBuilder, make_datum, train_teacher
from tests.number_format import by_format
from tests.tiny_models import build_tiny_model
from tinker_cookbook.checkpoint_utils import load_checkpoints_file
from tinker_cookbook.distillation import train_off_policy
from tinker_cookbook.distillation.target_cache import TARGETS_FILE, TargetCache
from tinker_cookbook.distillation.teacher import Teacher, TeacherConfig, place
from tinker_cookbook.distillation.top_k import OBJECTIVES, TaughtDatum, build_target_datum, measure
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.utils.sdk_compat import wait_for_client

FLOOR = by_format(float32=1e-5, bfloat16=2e-2)


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
def make_config(tmp_path: Path, local_service: ServiceProcess):
    def make(
        name: str = "run",
        *,
        path: str | None = None,
        builder: TokenBuilder | None = None,
        **options: Any,
    ) -> train_off_policy.Config:
        teacher = TeacherConfig(base_model=local_service.model, load_checkpoint_path=path)
        data = DatasetWithTeacher(dataset_builder=builder or TokenBuilder(), teacher_config=teacher)
        defaults = {
            "dataset_configs": [data],
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "save_every": 0,
            "eval_every": 4,
            "batch_size": 4,
        }
        return train_off_policy.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            base_url=local_service.base_url,
            **defaults | options,
        )

    return make


def run(config: train_off_policy.Config) -> train_off_policy.RunResult:
    return asyncio.run(train_off_policy.main(config))


def rows_of(config: train_off_policy.Config) -> list[dict[str, Any]]:
    text = (Path(config.log_path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_a_teacher_that_is_the_student_teaches_nothing(make_config, teacher_path, objective: str):
    options = {"objective": objective, "max_steps": 1}
    same, other = make_config("same", **options), make_config("other", path=teacher_path, **options)
    run(same)
    run(other)
    one, normal = rows_of(same)[0], rows_of(other)[0]
    assert abs(one["teacher_kl"]) < FLOOR
    assert abs(one["test/teacher_kl"]) < FLOOR
    assert one["teacher_entropy"] == pytest.approx(one["student_entropy"], abs=1e2 * FLOOR)
    assert normal["teacher_kl"] > 0.05
    assert one["grad_norm"] < by_format(float32=1e-3, bfloat16=0.2) * normal["grad_norm"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_brings_the_student_to_the_teacher(
    make_config, teacher_path: str, objective: str
):
    config = make_config(path=teacher_path, objective=objective, num_epochs=10, eval_every=20)
    result = run(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(21))
    assert rows[-2]["teacher_kl"] < 0.7 * rows[0]["teacher_kl"]
    assert {"test/teacher_kl", "test/teacher_mass"} <= result.metrics.keys()
    # 8 sequences and 4 held-out ones are scored once in 10 epochs; drawn tokens are others.
    assert rows[-2]["teacher/scored"] == 12
    if objective != "sampled":
        assert 0 < rows[0]["teacher_mass"] < 1
    again = run(config)  # complete: nothing to do
    assert again.sampler_path == result.sampler_path


def test_scores_agree_with_what_the_teacher_sampled(local_service: ServiceProcess, teacher_path):
    """Sampled logprobs are the scores of the same tokens, at these places and not one further."""
    session = local_service.connect()
    client = wait_for_client(session.create_sampling_client(model_path=teacher_path))
    teacher = Teacher(client, "teacher")
    prompt, long_prompt = [20, 21, 22], [30, 31, 32, 33, 34]
    params = tinker.SamplingParams(max_tokens=8, seed=3)
    sampled = client.sample(tinker.ModelInput.from_ints(long_prompt), 1, params).result()
    reply = sampled.sequences[0]
    tokens = [*prompt, *reply.tokens]
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:]))},
    )
    positions = np.arange(len(prompt) - 1, len(tokens) - 1)
    placed = place(datum, positions, tinker.ModelInput.from_ints(long_prompt))
    assert placed.sequence.to_ints() == [*long_prompt, *reply.tokens]
    found = asyncio.run(teacher.score(placed))
    np.testing.assert_allclose(found, reply.logprobs, atol=by_format(float32=1e-4, bfloat16=0.1))
    targets = asyncio.run(teacher.targets(placed, 3, "top"))
    assert (np.diff(targets.logprobs_nK, axis=-1) <= 0).all()
    best = targets.tokens_nK[:, 0] == np.array(reply.tokens)
    np.testing.assert_allclose(targets.logprobs_nK[best, 0], found[best], atol=1e-3)
    without = asyncio.run(teacher.score(place(datum, positions)))
    assert np.abs(without - found).max() > 0.01, "the prompt matters"


def test_all_tokens_of_the_vocabulary_give_the_exact_kl(
    local_service: ServiceProcess, teacher_path: str, shared_client: tinker.ServiceClient
):
    vocab = json.loads((Path(local_service.model) / "config.json").read_text())["vocab_size"]
    client = wait_for_client(shared_client.create_sampling_client(model_path=teacher_path))
    student = shared_client.create_lora_training_client(local_service.model, rank=4).result()
    teacher = Teacher(client, "teacher")
    datum = make_datum(3)
    positions = np.flatnonzero(datum.loss_fn_inputs["weights"].to_numpy())
    values = []
    for count in (2, 20, vocab):
        targets = asyncio.run(teacher.targets(place(datum, positions), count, "top"))
        taught = TaughtDatum(datum, positions, np.ones(len(positions)), targets, "data")
        output = student.forward([build_target_datum(taught)], "cross_entropy").result()
        found = output.loss_fn_outputs[0]["logprobs"].to_numpy().reshape(-1, count)[positions]
        values.append(measure([taught], [found], "top")["teacher_kl"])
    q = targets.logprobs_nK.astype(np.float64)
    exact = (np.exp(q) * (q - found)).sum(-1).mean()
    assert values[-1] == pytest.approx(exact, abs=1e-3)
    assert values[0] < values[1] < values[2] + 1e-3


PROGRAM = """
import asyncio, pickle, sys
from tinker_cookbook.distillation import train_off_policy
config = pickle.load(open(sys.argv[1], "rb"))
if __name__ == "__main__":
    asyncio.run(train_off_policy.main(config))
"""


@pytest.mark.parametrize("kill_after_rows", [5])
def test_a_killed_run_equals_an_unbroken_one(
    make_config, teacher_path: str, tmp_path: Path, kill_after_rows: int
):
    # 10 datums in batches of 4: batches contain the end of an epoch and the start of the next.
    options = {"path": teacher_path, "builder": TokenBuilder(count=10, batch_size=2)}
    options |= {"num_epochs": 4, "save_every": 2}
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
        if metrics.exists() and metrics.read_text().count("\n") >= kill_after_rows:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(broken)
    wanted, found = rows_of(unbroken), rows_of(broken)
    assert [row["step"] for row in found] == list(range(11))
    for one, other in zip(wanted, found, strict=True):
        for key in ("teacher_kl", "teacher_mass", "test/teacher_kl", "num_tokens", "grad_norm"):
            if key in one:
                assert other[key] == pytest.approx(
                    one[key], rel=by_format(float32=1e-6, bfloat16=0.05), abs=FLOOR
                )
    assert load_checkpoints_file(broken.log_path)[-1].final


def test_two_teachers_on_two_data_sets(
    make_config, local_service: ServiceProcess, teacher_path: str, other_teacher_path: str
):
    def data(name: str, path: str, first: int, weight: float, prompted: bool) -> DatasetWithTeacher:
        return DatasetWithTeacher(
            dataset_builder=TokenBuilder(first=first, count=24, prompted=prompted),
            teacher_config=TeacherConfig(base_model=local_service.model, load_checkpoint_path=path),
            weight=weight,
            name=name,
        )

    configs = [
        data("plain", teacher_path, 0, 3.0, prompted=False),
        data("prompted", other_teacher_path, 100, 1.0, prompted=True),
    ]
    config = make_config(dataset_configs=configs, num_epochs=3)
    run(config)
    rows = rows_of(config)
    # Each step takes 3 of the 24 datums of the first and 1 of the second.
    assert len(rows) - 1 == 3 * 24 // 3
    for row in rows[:-1]:
        both = 0.75 * row["teacher_kl/plain"] + 0.25 * row["teacher_kl/prompted"]
        assert row["teacher_kl"] == pytest.approx(both, rel=1e-5)
        assert row["num_loss_tokens"] == 4 * REPLY_TOKENS
    assert {"test/teacher_kl/plain", "test/teacher_kl/prompted"} <= rows[-1].keys()
    assert rows[-2]["teacher_kl/plain"] < 0.9 * rows[0]["teacher_kl/plain"]
    assert rows[-2]["teacher_kl/prompted"] < 0.9 * rows[0]["teacher_kl/prompted"]


def test_a_cut_file_of_targets_is_repaired(make_config, teacher_path: str):
    config = make_config(path=teacher_path, max_steps=2)
    run(config)
    path = Path(config.log_path) / TARGETS_FILE
    whole = len(TargetCache(config.log_path))
    path.write_bytes(path.read_bytes()[:-5])
    cache = TargetCache(config.log_path)
    assert len(cache) == whole - 1
    assert len(TargetCache(config.log_path)) == whole - 1


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"objective": "forward"}, "objective=forward is unknown"),
    ({"n_teacher_targets": 0}, "n_teacher_targets=0 is less than 1"),
    ({"dataset_configs": []}, "dataset_configs is empty"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"n_held_out_targets": 0}, "n_held_out_targets=0 is less than 1"),
]


@pytest.mark.parametrize(("settings", "words"), BAD_SETTINGS)
def test_bad_settings_are_refused_at_once(make_config, settings: dict[str, Any], words: str):
    with pytest.raises(ConfigurationError, match=words):
        make_config(**settings)


def test_a_teacher_with_another_tokenizer_is_refused_before_any_request(
    make_config, tmp_path: Path, local_service: ServiceProcess
):
    other = tmp_path / "other-model"
    build_tiny_model(other)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    data = DatasetWithTeacher(
        dataset_builder=TokenBuilder(), teacher_config=TeacherConfig(base_model=str(other))
    )
    config = make_config(dataset_configs=[data])
    with pytest.raises(ConfigurationError, match="different tokenizers: 2 token ids differ") as e:
        run(config)
    assert str(other) in str(e.value)
    assert local_service.model in str(e.value)
    assert not (Path(config.log_path) / "metrics.jsonl").exists()


def test_a_missing_teacher_and_bad_data_are_named(make_config, local_service: ServiceProcess):
    with pytest.raises(ConfigurationError, match="does not have the teacher tinker://no"):
        run(make_config("a", path="tinker://no-such-run:train:0/sampler_weights/000001"))
    with pytest.raises(
        ConfigurationError, match=r"n_teacher_targets=1000000 is not possible .*topk_prompt"
    ):
        run(make_config("b", n_teacher_targets=10**6, eval_every=0))
    with pytest.raises(ConfigurationError, match="batch_size=64 is more than the data"):
        run(make_config("c", batch_size=64))


def test_a_datum_without_trained_tokens_is_named(make_config, monkeypatch: pytest.MonkeyPatch):
    from tests.distillation import data

    def untrained(number: int) -> tinker.Datum:
        datum = make_datum(number)
        zeros = np.zeros(datum.model_input.length, np.float32)
        datum.loss_fn_inputs["weights"] = tinker.TensorData.from_numpy(zeros)
        return datum

    monkeypatch.setattr(data, "make_datum", untrained)
    with pytest.raises(DataValidationError, match="step 0, datum 0: no token is trained"):
        run(make_config(eval_every=0))
