"""The train loop against a real service: schedule, options, evaluation, checkpoints, errors."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServiceProcess
from tests.number_format import by_format
from tinker_cookbook import checkpoint_utils
from tinker_cookbook.checkpoint_utils import CheckpointRecord
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator, TrainingClientEvaluator
from tinker_cookbook.exceptions import CheckpointError, ConfigurationError, TrainingError
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.nll_evaluator import NLLEvaluator, SamplerNLLEvaluator
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils.sdk_compat import rest_client_of

FRUIT = ("apple", "pear", "plum", "fig", "lime", "date", "kiwi", "mango", "peach", "grape")


TOLERANCE = by_format(float32=1e-5, bfloat16=2e-3)
"""Relative, of a mean loss. Rounding to 8 bits is off by 0.4 % at most, and averages out."""


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        [
            {"role": "user", "content": f"What is a {fruit}?"},
            {"role": "assistant", "content": f"A {fruit} is a fruit."},
        ]
        for fruit in FRUIT
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _service(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


@pytest.fixture
def make_config(tmp_path: Path, conversations: Path, local_service: ServiceProcess):
    def make(name: str = "run", *, batch_size: int = 2, test_size: int = 2, **options: Any):
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=local_service.model,
            renderer_name="chatml",
            max_length=64,
            batch_size=batch_size,
        )
        builder = FromConversationFileBuilder(
            common_config=common, file_path=str(conversations), test_size=test_size
        )
        defaults = {"learning_rate": 1e-2, "lora_rank": 4, "save_every": 0}
        return train.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            dataset_builder=builder,
            **defaults | options,
        )

    return make


def run(config: train.Config) -> train.RunResult:
    return asyncio.run(train.main(config))


def rows_of(config: train.Config) -> list[dict[str, Any]]:
    return [
        json.loads(x) for x in (Path(config.log_path) / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_run_learns_and_leaves_its_files(make_config, capfd):
    config = make_config(
        num_epochs=3,
        eval_every=4,
        warmup_steps=2,
        save_every=5,
        enable_trace=True,
        span_chart_every=6,
    )
    result = run(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(13))
    assert rows[-2]["train_mean_nll"] < rows[0]["train_mean_nll"] - 1
    assert rows[-1]["test/nll"] < rows[0]["test/nll"] - 1
    assert [row["step"] for row in rows if "test/nll" in row] == [0, 4, 8, 12]
    assert result.metrics == {k: rows[-1][k] for k in ("test/nll", "test/bpb")}
    assert [row["epoch"] for row in rows[:-1]] == [0] * 4 + [1] * 4 + [2] * 4
    assert rows[0]["learning_rate"] == pytest.approx(1e-2 / 3)
    assert rows[2]["learning_rate"] == pytest.approx(1e-2)
    assert rows[11]["learning_rate"] == pytest.approx(1e-3)
    assert rows[0]["num_sequences"] == 2
    assert 0 < rows[0]["num_loss_tokens"] < rows[0]["num_tokens"]
    assert isinstance(rows[0]["num_loss_tokens"], int)
    assert rows[11]["tokens/elapsed"] == sum(row["num_tokens"] for row in rows[:-1])
    assert {"time/total", "time/step", "time/get_batch", "time/evals"} <= rows[0].keys()
    charts = ("iteration_000000/timing_gantt.html", "iteration_000006/timing_gantt.html")
    own = ("config.json", "code.diff", "logs.log", "timing_spans.jsonl", "trace_events.jsonl")
    for name in own + charts:
        assert (Path(config.log_path) / name).exists(), name
    records = checkpoint_utils.load_checkpoints_file(config.log_path)
    assert [(r.name, r.epoch, r.batch, r.final) for r in records] == [
        ("000005", 1, 1, None),
        ("000010", 2, 2, None),
        ("final", 3, 0, True),
    ]
    captured = capfd.readouterr()
    assert captured.out.startswith("service  http://127.0.0.1")
    assert "TINKER_BASE_URL is set" in captured.out
    assert "«A " in captured.err
    assert "step 12/12" in captured.err


def test_train_loss_of_a_row_is_that_of_the_weights_before_the_step(make_config):
    """The same batch, evaluated as held-out data before training starts."""
    config = make_config(test_size=0, batch_size=10, eval_every=0)
    dataset, _ = config.dataset_builder()
    evaluator = NLLEvaluator.from_dataset(dataset, "same")
    config = make_config(
        test_size=0, batch_size=10, eval_every=1, evaluator_builders=[lambda: evaluator]
    )
    run(config)
    first = rows_of(config)[0]
    # Evaluated in float32, trained in the engine's format.
    assert first["same/nll"] == pytest.approx(first["train_mean_nll"], rel=TOLERANCE)


def test_pipelining_changes_nothing_but_time(make_config):
    def numbers(name: str, **options: Any) -> list[dict[str, Any]]:
        config = make_config(name, eval_every=2, **options)
        run(config)
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows_of(config)]

    assert numbers("serial", submit_ahead=0) == numbers("pipelined", submit_ahead=3)


def test_accumulated_batches_are_one_larger_step(make_config):
    large = make_config("large", batch_size=4, test_size=3, eval_every=1)
    small = make_config("small", batch_size=2, test_size=3, eval_every=1, gradient_accumulation=2)
    run(large)
    run(small)
    one, two = rows_of(large), rows_of(small)
    assert len(one) == len(two) == 3, "7 rows: a step of 4, one of 3, and the evaluation"
    for a, b in zip(one, two, strict=True):
        assert a["test/nll"] == pytest.approx(b["test/nll"], rel=10 * TOLERANCE)
        assert a.get("num_tokens") == b.get("num_tokens")


def test_options_reach_the_optimizer(make_config):
    def last_loss(name: str, **options: Any) -> float:
        config = make_config(name, eval_every=100, **options)
        run(config)
        return rows_of(config)[-1]["test/nll"]

    plain = last_loss("plain")
    assert last_loss("clipped", grad_clip_norm=1e-3) == pytest.approx(plain, rel=0.2)
    assert last_loss("decayed", weight_decay=50.0) != plain
    assert last_loss("seeded", seed=1) != plain
    assert last_loss("slow", learning_rate=1e-7) > plain


class Recorder(TrainingClientEvaluator):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, training_client: Any) -> dict[str, float]:
        del training_client
        self.calls += 1
        return {"recorder": float(self.calls)}


class Greedy(SamplingClientEvaluator):
    """Samples one token."""

    async def __call__(self, sampling_client: Any) -> dict[str, float]:
        import tinker

        params = tinker.SamplingParams(max_tokens=1, temperature=0.0)
        result = await sampling_client.sample(tinker.ModelInput.from_ints([5]), 1, params)
        return {"token": float(result.sequences[0].tokens[0])}


def test_evaluators_run_before_the_first_step_periodically_and_at_the_end(make_config):
    often, seldom = Recorder(), Recorder()
    config = make_config(
        num_epochs=2,
        eval_every=3,
        infrequent_eval_every=100,
        evaluator_builders=[lambda: often, Greedy],
        infrequent_evaluator_builders=[lambda: seldom],
    )
    run(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows if "token" in row] == [0, 3, 6, 8]
    assert (often.calls, seldom.calls) == (4, 2)


class Told(TrainingClientEvaluator):
    """Reports given values, by the number of steps done."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.calls = 0

    async def __call__(self, training_client) -> dict[str, float]:
        self.calls += 1
        return {"score": self.values[min(self.calls - 1, len(self.values) - 1)]}


def best_records(config: train.Config) -> list[tuple[str, float]]:
    records = checkpoint_utils.load_checkpoints_file(config.log_path)
    return [(r.name, r.get("best_value")) for r in records if r.has("best_value")]


def test_the_best_weights_are_kept_and_the_run_stops_early(make_config, service_client):
    told = Told([0.5, 0.6, 0.4, 0.9, 0.8, 0.9, 1.0])  # 0.9 again is not better
    config = make_config(
        num_epochs=4,
        eval_every=1,
        evaluator_builders=[lambda: told],
        best_metric="score",
        early_stopping_evals=2,
    )
    result = run(config)
    assert best_records(config) == [("best_000001", 0.6), ("best_000003", 0.9)]
    assert result.best_sampler_path.endswith("/best_000003")
    assert result.sampler_path.endswith("/final")
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert "train_mean_nll" not in rows[-1]  # stopped before step 5 was submitted
    rest = rest_client_of(service_client)
    weights = rest.list_checkpoints(result.sampler_path.split("/")[2]).result().checkpoints
    limited = {item.checkpoint_id: item.expires_at is not None for item in weights}
    assert limited["sampler_weights/best_000001"], "once better weights are saved"
    assert not limited["sampler_weights/best_000003"]
    calls = told.calls
    assert run(config).best_sampler_path == result.best_sampler_path
    assert told.calls == calls  # complete


def test_a_resumed_run_stops_where_an_unbroken_one_does(make_config):
    """The loss rises with this learning rate, so that nothing after the first steps is better."""
    options = {"num_epochs": 4, "eval_every": 1, "save_every": 2, "learning_rate": 0.1}
    options |= {"best_metric": "test/nll", "early_stopping_evals": 3}
    unbroken, broken = make_config("unbroken", **options), make_config("broken", **options)
    run(unbroken)
    steps = [row["step"] for row in rows_of(unbroken)]
    assert steps[-1] < 16
    cut = make_config("broken", max_steps=None, **options)
    records = Path(cut.log_path) / "checkpoints.jsonl"
    run(broken)
    kept = [line for line in records.read_text().splitlines(keepends=True) if "final" not in line]
    records.write_text("".join(kept))  # as after a kill before the last save
    run(cut)
    assert [row["step"] for row in rows_of(cut)] == steps
    assert best_records(cut) == best_records(unbroken)


def test_both_held_out_losses_agree(make_config, local_service: ServiceProcess, service_client):
    config = make_config()
    _, test = config.dataset_builder()
    assert test is not None
    run_client = service_client.create_lora_training_client(local_service.model, rank=4).result()
    sampler = run_client.save_weights_and_get_sampling_client().result()
    by_forward = asyncio.run(NLLEvaluator.from_dataset(test)(run_client))
    by_sampler = asyncio.run(SamplerNLLEvaluator.from_dataset(test)(sampler))
    assert by_forward.keys() == by_sampler.keys() == {"test/nll"}
    assert by_forward["test/nll"] == pytest.approx(by_sampler["test/nll"], rel=1e-3)
    assert math.isfinite(by_forward["test/nll"])


def test_training_goes_on_from_given_weights_with_a_new_optimizer(make_config):
    first = make_config("first", num_epochs=2, eval_every=100)
    state = run(first).state_path
    second = make_config("second", load_checkpoint_path=state, eval_every=100)
    run(second)
    assert rows_of(second)[0]["test/nll"] == pytest.approx(rows_of(first)[-1]["test/nll"], rel=1e-5)


def test_rolling_checkpoints_leave_only_the_final_one(make_config, service_client):
    config = make_config(num_epochs=2, rolling_save_every=2, eval_every=0)
    result = run(config)
    names = [record.name for record in checkpoint_utils.load_checkpoints_file(config.log_path)]
    assert names == ["000002", "000004", "000006", "final"]
    run_id = result.state_path.removeprefix("tinker://").split("/")[0]
    import tinker

    rest = tinker.RestClient(service_client._get_rest_holder())
    listed = rest.list_checkpoints(run_id).result().checkpoints
    assert sorted(checkpoint.checkpoint_id for checkpoint in listed) == [
        "sampler_weights/final",
        "weights/final",
    ]


def test_a_run_longer_than_before_is_resumed_when_asked_to(make_config):
    run(make_config(num_epochs=1, eval_every=0))
    longer = make_config(num_epochs=2, eval_every=0, behavior_if_log_dir_exists="resume")
    result = run(longer)
    assert result.sampler_path
    assert len(rows_of(longer)) in (4, 8)


def test_data_that_changed_is_refused_unless_asked_for(make_config, conversations: Path):
    options = {"eval_every": 0, "save_every": 1, "keep_checkpoints": 0}
    config = make_config(**options)
    run(config)
    records = Path(config.log_path) / "checkpoints.jsonl"
    records.write_text(records.read_text().splitlines(keepends=True)[0])  # as after a kill
    conversations.write_text(conversations.read_text().replace("apple", "melon"))
    before = records.read_text()
    with pytest.raises(ConfigurationError, match=r"the data has changed .*=resume.*=delete"):
        run(config)
    assert records.read_text() == before
    run(make_config(**options, behavior_if_log_dir_exists="resume"))
    assert [row["step"] for row in rows_of(config)] == [0, 1, 2, 3]


def test_a_lost_checkpoint_is_explained(make_config):
    config = make_config(eval_every=0)
    Path(config.log_path).mkdir()
    record = {"name": "000002", "batch": 2, "epoch": 0, "state_path": "tinker://gone/weights/x"}
    (Path(config.log_path) / "checkpoints.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(CheckpointError, match="behavior_if_log_dir_exists=delete"):
        run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 is not between"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"lora_rank": 0}, "lora_rank=0 is out of range; use 1 to 1024"),
        ({"num_epochs": 0}, "num_epochs=0 is less than 1"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1\.0 is out of range"),
        ({"ttl_seconds": 60}, "ttl_seconds=60"),
        ({"eval_every": -1}, "eval_every=-1 is negative"),
    ],
)
def test_unusable_settings_are_refused_at_once(make_config, options: dict, message: str):
    with pytest.raises(ConfigurationError, match=message):
        make_config(**options)


def test_too_little_data_is_refused(make_config):
    with pytest.raises(ConfigurationError, match="batch_size=20"):
        run(make_config(batch_size=20))


def test_a_diverged_run_stops_with_advice(make_config):
    config = make_config(learning_rate=1.0, num_epochs=40, eval_every=0, adam_beta2=0.0)
    with pytest.raises(TrainingError, match=r"diverged .* lower learning_rate=1\.0"):
        run(config)


def test_positions_of_steps():
    schedule = train.Schedule(batches_per_epoch=7, num_epochs=3, accumulation=2, max_steps=None)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (4, 12)
    assert [schedule.position(step) for step in (0, 2, 4, 9)] == [(0, 0), (0, 4), (1, 0), (2, 2)]
    assert [list(schedule.batches(step)) for step in (2, 3, 4)] == [[4, 5], [6], [0, 1]]
    for step in range(12):
        epoch, batch = schedule.position(step)
        assert schedule.step_of(CheckpointRecord("x", batch=batch, epoch=epoch)) == step
    assert schedule.step_of(CheckpointRecord("x", final=True)) == 12
    assert train.Schedule(7, 3, 1, max_steps=5).total_steps == 5
