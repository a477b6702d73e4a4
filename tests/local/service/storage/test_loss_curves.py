"""What the service knows of a run's progress: measures by loss function, parts that are one run."""

# pyright: reportOperatorIssue=false

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, rl_datum, tokens, train_step
from tinker_cookbook.local.engine.types import SparseRows, TrainDatum, TrainResult
from tinker_cookbook.local.service.storage.batch_sums import BatchSums
from tinker_cookbook.local.service.storage.loss_curves import ProgressLog
from tinker_cookbook.local.service.storage.rows import CheckpointRow
from tinker_cookbook.local.service.storage.run_facts import MAX_MARKS, Origin, RunFacts


def get(service: ServiceProcess, path: str) -> Any:
    headers = {"X-API-Key": service.api_key}
    answer = httpx.get(f"{service.base_url}/api/v1/local/{path}", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def described(service: ServiceProcess, run: tinker.TrainingClient) -> dict[str, Any]:
    runs = get(service, "status?limit=500")["runs"]
    return next(item for item in runs if item["run_id"] == run.model_id)


def points_of(service: ServiceProcess, run: tinker.TrainingClient) -> list[dict[str, Any]]:
    curve = get(service, f"curves/{quote(run.model_id)}")
    return [dict(zip(curve["columns"], point, strict=True)) for point in curve["points"]]


def rl_batch() -> list[tinker.Datum]:
    """Six of eleven tokens were sampled."""
    advantages = [0.0] * 5 + [1.0, -1.0, 0.5, -0.5, 2.0, -1.0]
    return [rl_datum(tokens(12, seed), [0.0] * 5 + [-5.0] * 6, advantages) for seed in range(2)]


@pytest.fixture(scope="module")
def base(local_service: ServiceProcess) -> tinker.ServiceClient:
    return local_service.connect()


def create(service: ServiceProcess, client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(base_model=service.model, rank=2).result()


def test_points_of_reinforcement_learning(local_service, base) -> None:
    run = create(local_service, base)
    result = train_step(run, rl_batch(), loss="importance_sampling")
    assert described(local_service, run)["loss_fn"] == "importance_sampling"
    (point,) = points_of(local_service, run)
    found = np.concatenate([o["logprobs"].to_numpy()[5:] for o in result.loss_fn_outputs])
    assert point["tokens"] == 22
    assert point["loss"] == pytest.approx(result.metrics["loss:sum"] / 12, rel=1e-4)
    assert point["negative_logprob"] == pytest.approx(-found.mean(), rel=1e-4)
    assert point["divergence"] == pytest.approx(0.5 * np.square(-5.0 - found).mean(), rel=1e-4)


def test_points_of_supervised_learning(local_service, base) -> None:
    run = create(local_service, base)
    train_step(run, batch())
    assert described(local_service, run)["loss_fn"] == "cross_entropy"
    (point,) = points_of(local_service, run)
    assert point["loss"] == pytest.approx(point["negative_logprob"], rel=1e-4)  # weights of 1
    assert point["divergence"] is None


def test_a_loss_that_the_client_computes_has_no_loss_per_token(local_service, base) -> None:
    """It arrives as gradients in the weights."""

    def loss(data, logprobs):
        total = sum(values.exp().sum() - 2 * values[:3].sum() for values in logprobs)
        return total, {}

    run = create(local_service, base)
    run.forward_backward_custom(batch(), loss).result()
    run.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    assert described(local_service, run)["loss_fn"] == "custom"
    (point,) = points_of(local_service, run)
    assert point["loss"] is None
    assert point["negative_logprob"] > 0


def train(run: tinker.TrainingClient, steps: int) -> None:
    for _ in range(steps):
        train_step(run, batch())


def test_a_resumed_run_is_one_with_its_first_part(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    first = create(service, service.connect(display_name="one run"))
    train(first, 2)
    # all three are sent before the first has ended: the checkpoint is of step 2 all the same
    saving = first.save_state("at-2")
    train(first, 1)
    path = saving.result().path
    whole = points_of(service, first)
    client = service.connect(display_name="one run")
    second = client.create_training_client_from_state_with_optimizer(path).result()
    train(second, 2)
    path = second.save_state("at-4").result().path
    third = client.create_training_client_from_state_with_optimizer(path).result()
    train(third, 1)

    def check(service: ServiceProcess) -> None:
        runs = [described(service, run) for run in (first, second, third)]
        assert [run["first_step"] for run in runs] == [0, 2, 4]
        assert [run["num_steps"] for run in runs] == [3, 2, 1]
        newer = [run["continued_by"] for run in runs]
        assert newer == [second.model_id, third.model_id, None]
        assert runs[1]["origin"]["path"] == f"tinker://{first.model_id}/weights/at-2"
        joined = points_of(service, third)
        assert [point["step"] for point in joined] == [1, 2, 3, 4, 5]
        assert joined[:2] == whole[:2]
        assert joined[2]["time"] > whole[2]["time"], "step 3 is that of the resumed part"
        assert [point["step"] for point in points_of(service, first)] == [1, 2, 3]

    check(service)
    service.process.kill()
    service.process.wait()
    again = service_factory(tiny_model_folder)
    # the last step is in no checkpoint and may be lost with the process
    runs = [described(again, run) for run in (first, second)]
    assert [run["first_step"] + run["num_steps"] for run in runs] == [3, 4]
    assert described(again, third)["first_step"] == 4
    assert [point["step"] for point in points_of(again, third)][:4] == [1, 2, 3, 4]
    assert described(again, second)["continued_by"] == third.model_id


def test_a_run_that_goes_on_itself_stands_alone(local_service, base) -> None:
    first = create(local_service, base)
    train(first, 1)
    path = first.save_state("fork").result().path
    fork = base.create_training_client_from_state_with_optimizer(path).result()
    assert described(local_service, first)["continued_by"] == fork.model_id
    train(first, 1)
    assert described(local_service, first)["continued_by"] is None
    train_step(fork, rl_batch(), loss="ppo")
    assert [point["step"] for point in points_of(local_service, fork)] == [2], "another measure"


def test_a_run_from_saved_weights_begins_anew(local_service, base) -> None:
    first = create(local_service, base)
    train(first, 2)
    path = first.save_state("start").result().path
    second = base.create_training_client_from_state(path).result()
    train(second, 1)
    shown = described(local_service, second)
    assert (shown["first_step"], shown["num_steps"]) == (0, 1)
    assert shown["origin"]["is_resumed"] is False
    assert described(local_service, first)["continued_by"] is None
    assert [point["step"] for point in points_of(local_service, second)] == [1]


def test_runs_show_the_name_that_their_program_gave_them(local_service) -> None:
    metadata = {"run_name": "rl_basic smollm lr=0.0001"}
    client = tinker.ServiceClient(base_url=local_service.base_url, api_key=local_service.api_key)
    run = client.create_lora_training_client(
        base_model=local_service.model, rank=2, user_metadata=metadata
    ).result()
    assert described(local_service, run)["name"] == metadata["run_name"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 5000,
        '{"origin": {"x": 1}}',
        '{"origin": {"path": "p", "run_id": "r", "step": "x", "is_resumed": true}}',
        '{"num_steps": "x"}',
        '{"marks": {"weights/x": []}}',
        '{"marks": 1}',
    ],
)
def test_damaged_facts_are_no_facts(tmp_path: Path, text: str) -> None:
    log = ProgressLog(tmp_path)
    (tmp_path / "curves").mkdir()
    log._path("run", "json").write_text(text)
    assert log.facts("run") == RunFacts()
    assert log.curve("run") == []


def test_damaged_points_are_left_out(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path)
    (tmp_path / "curves").mkdir()
    lines = ["[1, 0.5, 10, 100.0]", "[]", "5", '["x", 0.5, 10, 1.0]', '[2, {"a": 1}, 10, 1.0]']
    lines += ["[3, NaN, 10, 300.0]", "[4, 0.5", "[5, 0.5, 10, 500.0]"]
    log._path("run").write_text("\n".join(lines))
    assert [point[:2] for point in log.curve("run")] == [[1, 0.5], [3, None]]


def test_runs_that_begin_from_each_other_end(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path)
    for run_id, other in (("a", "b"), ("b", "a")):
        log.begin_from(run_id, Origin(f"tinker://{other}/weights/x", other, 3, is_resumed=True))
        log.add_batch(run_id, [], TrainResult([], {}))
        log.add_step(run_id)
    assert [point[0] for point in log.curve("a")] == [4]


def test_checkpoints_of_older_versions_are_placed_by_their_time(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path)
    (tmp_path / "curves").mkdir()
    log._path("run").write_text("[1, 0.5, 10, 100.0]\n[2, 0.4, 10, 200.0]\n[3, 0.3, 10, 300.0]\n")
    row = CheckpointRow("f", "run", "weights", "x", 250.0, 1, True, False, None, None)
    origin = log.origin_in(row, is_resumed=True)
    assert origin.step == 2
    log.begin_from("next", origin)
    assert log.curve("next") == [[1, 0.5, 10, 100.0, None, None], [2, 0.4, 10, 200.0, None, None]]


def test_the_marks_of_a_run_are_bounded() -> None:
    facts = RunFacts()
    for number in range(MAX_MARKS + 5):
        facts.num_steps = number
        facts.mark(f"weights/{number}")
    assert len(facts.marks) == MAX_MARKS
    assert facts.marks[f"weights/{MAX_MARKS + 4}"] == MAX_MARKS + 4


def test_what_is_not_finite_is_left_out() -> None:
    """Browsers read no `NaN` in JSON."""
    sums = BatchSums()
    inputs = {name: np.ones(3, np.float32) for name in ("advantages", "logprobs")}
    logprobs = np.array([-1.0, -np.inf, -1.0], np.float32)
    sums.add(TrainDatum(np.zeros(3, np.int32), dict(inputs)), logprobs)
    sums.loss = float("nan")
    assert (sums.mean_loss, sums.mean_negative_logprob, sums.divergence) == (None, None, None)
    assert sums.weight == 3


def test_many_targets_a_position_have_a_loss_only() -> None:
    rows = SparseRows(np.ones(4, np.float32), np.array([0, 2, 4]), np.array([0, 1, 0, 1]), (2, 2))
    sums = BatchSums()
    sums.loss = 2.0
    sums.add(TrainDatum(np.zeros(2, np.int32), {"weights": rows}), np.zeros((2, 2), np.float32))
    assert sums.mean_loss == 0.5
    assert sums.mean_negative_logprob is None


def test_facts_of_a_run_that_is_gone_go_with_its_curve(tmp_path: Path) -> None:
    log = ProgressLog(tmp_path)
    for run_id in ("kept", "gone"):
        log.add_batch(run_id, [], TrainResult([], {"loss:sum": 1.0}))
        log.add_step(run_id)
        log.mark_saved(run_id, "weights/x")
    log.save()
    for run_id in ("kept", "gone"):
        log.drop(run_id)
    log.remove_unknown(lambda: ["kept"])
    assert log.facts("kept").marks == {"weights/x": 1}
    assert log.facts("gone") == RunFacts()
    assert len(list((tmp_path / "curves").iterdir())) == 2
    assert time.time() - log.curve("kept")[0][3] < 60
