"""The preference loop against a real service: gradient, reference, resume, metrics, errors."""

from __future__ import annotations

import asyncio
import json
import math
import os
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
from tests.number_format import by_format
from tinker_cookbook import checkpoint_utils, tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError, DataValidationError
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons, PairDataset
from tinker_cookbook.preference.losses import PAIR_LOSSES, PairBatch, PairLoss, dpo
from tinker_cookbook.preference.pair_gradients import submit_pair_gradient
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.preference.reference import REFERENCE_FILE
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils import ml_log

FRUIT = ("apple", "pear", "plum", "fig", "lime", "date", "kiwi", "mango", "peach", "grape")
TOLERANCE = by_format(float32=1e-5, bfloat16=2e-2)


@pytest.fixture(autouse=True)
def _service(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"What is a {fruit}?",
            "chosen": f"A {fruit} is a fruit.",
            "rejected": f"I will not talk about any {fruit} today.",
        }
        for fruit in FRUIT
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tmp_path: Path, pairs_file: Path, local_service: ServiceProcess):
    def make(name: str = "run", *, batch_size: int = 2, **options: Any) -> train_dpo.Config:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=local_service.model,
            renderer_name="chatml",
            max_length=64,
            batch_size=batch_size,
        )
        builder = DPODatasetBuilderFromComparisons(
            common_config=common,
            comparison_builder=ComparisonBuilderFromJsonl(train_path=str(pairs_file), test_size=2),
        )
        defaults = {"learning_rate": 3e-3, "lora_rank": 4, "save_every": 0, "eval_every": 4}
        return train_dpo.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            dataset_builder=builder,
            **defaults | options,
        )

    return make


def rows_of(config: train_dpo.Config) -> list[dict[str, Any]]:
    path = Path(config.log_path) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_learns_the_preference(make_config):
    config = make_config(num_epochs=3)
    result = train_dpo.main(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(13))
    # Before the first step the policy is the reference: every pair has the loss log 2.
    assert rows[0]["dpo_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert rows[0]["margin"] == pytest.approx(0, abs=TOLERANCE)
    assert rows[0]["test/dpo_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    assert rows[-2]["dpo_loss"] < 0.3
    assert rows[-1]["test/accuracy"] == 1.0
    assert rows[-1]["test/margin"] > 1.0
    assert result.metrics["test/accuracy"] == 1.0
    assert rows[0]["chosen_length"] < rows[0]["rejected_length"]
    # 8 pairs and 2 held-out pairs: the reference scores each completion once in three epochs.
    assert rows[-2]["reference/scored"] == 20
    assert len(set(Path(config.log_path, REFERENCE_FILE).read_text().split("\n")) - {""}) == 20


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo", "cpo", "hinge", "robust_dpo"])
def test_every_loss_trains(make_config, name: str):
    config = make_config(name, loss=name, dpo_beta=1.0 if name == "simpo" else 0.1, num_epochs=2)
    train_dpo.main(config)
    rows = rows_of(config)
    assert rows[-1]["test/margin"] > 0.05


def test_a_loss_of_your_own_trains(make_config):
    def difference(batch: PairBatch) -> PairLoss:
        ones = np.ones_like(batch.chosen_P)
        return PairLoss(batch.rejected_P - batch.chosen_P, -ones, ones)

    config = make_config(num_epochs=1)
    train_dpo.main(config, loss=difference)
    assert rows_of(config)[-1]["test/margin"] > 0.1


def test_the_gradient_is_that_of_the_sdks_custom_loss(
    make_config, local_service: ServiceProcess
) -> None:
    """Both ways, from the same start: equal gradient norms and equal weights after the step."""
    torch = pytest.importorskip("torch")
    config = make_config(batch_size=5)
    dataset, _ = config.dataset_builder()
    data = dataset.get_batch(0)
    client = local_service.connect()
    reference = np.linspace(-40, -60, len(data))
    policies = [
        client.create_lora_training_client(local_service.model, rank=4, seed=3).result()
        for _ in range(2)
    ]

    async def two_requests() -> tinker.OptimStepResponse:
        step = await submit_pair_gradient(policies[0], data, reference, dpo(beta=0.1))
        update = policies[0].optim_step(tinker.AdamParams(learning_rate=1e-2))
        for gradient in step.gradients:
            await gradient
        return await update

    def custom(data: list[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        weights = [torch.tensor(d.loss_fn_inputs["weights"].to_numpy()) for d in data]
        sums = [(w * p).sum() for w, p in zip(weights, logprobs, strict=True)]
        scores = [torch.tensor(value) for value in reference]
        return train_dpo.compute_dpo_loss(
            sums[0::2], sums[1::2], scores[0::2], scores[1::2], dpo_beta=0.1
        )

    first = asyncio.run(two_requests())
    policies[1].forward_backward_custom(data, custom).result()
    second = policies[1].optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    assert first.metrics is not None
    assert second.metrics is not None
    assert first.metrics["grad_norm"] == pytest.approx(
        second.metrics["grad_norm"], rel=by_format(float32=1e-4, bfloat16=5e-2)
    )
    after = [policy.forward(data, "cross_entropy").result() for policy in policies]
    for one, other in zip(after[0].loss_fn_outputs, after[1].loss_fn_outputs, strict=True):
        np.testing.assert_allclose(
            one["logprobs"].to_numpy(),
            other["logprobs"].to_numpy(),
            atol=by_format(float32=1e-3, bfloat16=0.3),
        )


def test_the_reference_of_a_later_run_is_what_it_starts_from(make_config):
    first = train_dpo.main(make_config("first", num_epochs=2))
    config = make_config("second", load_checkpoint_path=first.state_path, max_steps=1)
    train_dpo.main(config)
    assert rows_of(config)[0]["dpo_loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    named = make_config(
        "named",
        load_checkpoint_path=first.state_path,
        max_steps=1,
        reference_model_name=config.model_name,
    )
    train_dpo.main(named)
    assert rows_of(named)[0]["margin"] > 0.5, "the reference is the base model here"


def test_a_loop_that_a_program_writes_out_learns_and_keeps_its_reference(
    make_config, local_service: ServiceProcess, tmp_path: Path
):
    config = make_config(num_epochs=2)
    client = local_service.connect()
    policy, reference = train_dpo.create_dpo_clients(config, client)
    dataset, _ = config.dataset_builder()
    tokenizer = tokenizer_utils.get_tokenizer(local_service.model)
    logger = ml_log.setup_logging(str(tmp_path), config=config)

    def update(policy: tinker.TrainingClient, reference: tinker.SamplingClient, step: int) -> None:
        train_dpo.do_update(
            step // 4, step % 4, 4, 8, config, policy, reference, [], [], dataset, logger,
            str(tmp_path), tokenizer,
        )  # fmt: skip

    for step in range(3):
        update(policy, reference, step)
    saved = policy.save_state("three").result().path
    record = checkpoint_utils.CheckpointRecord(name="three", state_path=saved)
    resumed, again = train_dpo.create_dpo_clients(config, client, resume_info=record)
    update(resumed, again, 3)
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    margins = [row["margin"] for row in rows]
    assert margins[0] == pytest.approx(0, abs=by_format(float32=1e-3, bfloat16=0.2))
    # Were the resumed model its reference, this margin would be 0.
    assert margins[3] > margins[1] > 0.01


PROGRAM = """
import pickle, sys
from tinker_cookbook.preference import train_dpo
config = pickle.load(open(sys.argv[1], "rb"))
if __name__ == "__main__":
    train_dpo.main(config)
"""


@pytest.mark.parametrize("kill_after_rows", [0, 3, 6])
def test_a_killed_run_resumes_to_the_rows_of_an_unbroken_one(
    make_config, tmp_path: Path, kill_after_rows: int
):
    import pickle

    options = {"num_epochs": 2, "save_every": 2, "batch_size": 2}
    unbroken = make_config("unbroken", **options)
    train_dpo.main(unbroken)
    broken = make_config("broken", **options)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(broken))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "config.pkl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = Path(broken.log_path) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= kill_after_rows:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_dpo.main(broken)
    wanted, found = rows_of(unbroken), rows_of(broken)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for one, other in zip(wanted, found, strict=True):
        for key in ("dpo_loss", "margin", "test/margin", "learning_rate"):
            if key in one:
                assert other[key] == pytest.approx(
                    one[key], abs=by_format(float32=1e-6, bfloat16=1e-2)
                )
    records = checkpoint_utils.load_checkpoints_file(broken.log_path)
    assert records[-1].final


@pytest.fixture
def pair_dataset(local_service: ServiceProcess):
    def make(*rows: dict[str, Any], path: Path, **options: Any) -> PairDataset:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        comparisons, _ = ComparisonBuilderFromJsonl(train_path=str(path)).get_labeled_comparisons()
        renderer = get_renderer("chatml", tokenizer_utils.get_tokenizer(local_service.model))
        return PairDataset(comparisons, renderer, **{"batch_size": 1} | options)

    return make


USER = {"role": "user", "content": "Q"}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_all_shapes_of_rows_make_the_same_pair(pair_dataset, tmp_path: Path):
    comparison = {
        "prompt_conversation": [USER],
        "completion_A": [reply("bad")],
        "completion_B": [reply("good")],
    }
    shapes: list[dict[str, Any]] = [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [reply("good")], "rejected": [reply("bad")]},
        {"prompt": "Q", "chosen": [USER, reply("good")], "rejected": [USER, reply("bad")]},
        {"chosen": [USER, reply("good")], "rejected": [USER, reply("bad")]},
        {"comparison": comparison, "label": "B"},
    ]
    dataset = pair_dataset(*shapes, path=tmp_path / "p.jsonl", batch_size=5)
    data = dataset.get_batch(0)
    assert len({tuple(datum.model_input.to_ints()) for datum in data[0::2]}) == 1
    assert len({tuple(datum.model_input.to_ints()) for datum in data[1::2]}) == 1


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q", "chosen": "same", "rejected": "same"}, "chosen and rejected are equal"),
    (
        {"chosen": [USER, reply("a")], "rejected": [{**USER, "content": "R"}, reply("b")]},
        "the prompts of chosen and rejected differ",
    ),
    ({"prompt": "Q", "chosen": "good"}, "the row has 'prompt', 'chosen'; use"),
    ({"chosen": "good", "rejected": "bad"}, "chosen is text and the row has no prompt"),
    ({"prompt": "Q", "chosen": 3, "rejected": "bad"}, "chosen is a number"),
    ({"chosen": [reply("a"), USER], "rejected": [reply("a"), USER]}, "ends with a message of"),
    ({"comparison": {"prompt_conversation": [USER]}, "label": "A"}, "completion_A is missing"),
    (
        {
            "comparison": {
                "prompt_conversation": [USER],
                "completion_A": [reply("a")],
                "completion_B": [reply("b")],
            },
            "label": "C",
        },
        "label='C' must be A, B or Tie",
    ),
    (
        {"prompt": "Q", "chosen": [{"role": "bot", "content": "x"}], "rejected": "b"},
        "role 'bot' is unknown",
    ),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_bad_rows_are_named(pair_dataset, tmp_path: Path, row: dict[str, Any], words: str):
    path = tmp_path / "bad.jsonl"
    with pytest.raises((DataFormatError, DataValidationError)) as caught:
        pair_dataset({"prompt": "Q", "chosen": "a", "rejected": "b"}, row, path=path)
    assert words in str(caught.value)
    assert "bad.jsonl:2" in str(caught.value)


def test_pairs_that_max_length_makes_useless_are_named(pair_dataset, tmp_path: Path):
    long = "word " * 60
    cut = pair_dataset(
        {"prompt": long, "chosen": "a", "rejected": "b"}, path=tmp_path / "p.jsonl", max_length=30
    )
    with pytest.raises(DataValidationError, match=r"p\.jsonl:1: no token of the chosen comp.*30"):
        cut.get_batch(0)
    equal = pair_dataset(
        {"prompt": "Q", "chosen": long + "a", "rejected": long + "b"},
        path=tmp_path / "p.jsonl",
        max_length=30,
    )
    with pytest.raises(DataValidationError, match="both completions are the same tokens within"):
        equal.get_batch(0)


def test_ties_are_left_out_and_counted(pair_dataset, tmp_path: Path):
    comparison = {
        "prompt_conversation": [USER],
        "completion_A": [reply("a")],
        "completion_B": [reply("b")],
    }
    dataset = pair_dataset(
        {"comparison": comparison, "label": "Tie"},
        {"comparison": comparison, "label": "A"},
        path=tmp_path / "p.jsonl",
    )
    assert dataset.summary == ["1 pairs, 1 ties left out"]
    assert len(dataset) == 1


def test_unknown_losses_and_settings_are_refused(make_config):
    with pytest.raises(ConfigurationError, match=r"loss=dop is unknown.*Did you mean dpo"):
        make_config(loss="dop")
    with pytest.raises(ConfigurationError, match="gamma is not a setting of dpo; it takes label_"):
        make_config(loss_config={"gamma": 1.0})
    assert set(PAIR_LOSSES) >= {"dpo", "ipo", "simpo", "orpo", "cpo"}
