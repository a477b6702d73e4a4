"""Training on rated replies against a real service: gradient, KL estimate, resume, data errors."""

# pyright: reportOptionalSubscript=false

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.number_format import by_format
from tinker_cookbook import tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError, DataError
from tinker_cookbook.preference import train_kto
from tinker_cookbook.preference.losses import SingleBatch, kto
from tinker_cookbook.preference.rated_replies import (
    RatedReplyBuilderFromJsonl,
    RatedReplyDataset,
    find_partners,
    from_comparisons,
    parse_rated_reply,
)
from tinker_cookbook.preference.reply_gradients import (
    compute_reply_metrics,
    submit_reply_gradient,
)
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

FRUIT = ("apple", "pear", "plum", "fig", "lime", "date", "kiwi", "mango")
USER = {"role": "user", "content": "Q"}


@pytest.fixture(autouse=True)
def _service(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


@pytest.fixture
def replies_file(tmp_path: Path) -> Path:
    path = tmp_path / "replies.jsonl"
    rows = [
        {"prompt": f"What is a {fruit}?", "completion": text, "label": is_good}
        for fruit in FRUIT
        for text, is_good in (
            (f"A {fruit} is a fruit.", True),
            (f"I will not talk about any {fruit} today.", False),
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_config(tmp_path: Path, replies_file: Path, local_service: ServiceProcess):
    def make(name: str = "run", *, batch_size: int = 4, **options: Any) -> train_kto.Config:
        common = ChatDatasetBuilderCommonConfig(
            model_name_for_tokenizer=local_service.model,
            renderer_name="chatml",
            max_length=64,
            batch_size=batch_size,
        )
        builder = RatedReplyBuilderFromJsonl(
            common_config=common, train_path=str(replies_file), test_size=4, seed=3
        )
        defaults = {"learning_rate": 3e-3, "lora_rank": 4, "save_every": 2, "eval_every": 4}
        return train_kto.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            dataset_builder=builder,
            **defaults | options,
        )

    return make


def rows_of(config: train_kto.Config) -> list[dict[str, Any]]:
    path = Path(config.log_path) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


PROGRAM = """
import pickle, sys
from tinker_cookbook.preference import train_kto
config = pickle.load(open(sys.argv[1], "rb"))
if __name__ == "__main__":
    train_kto.main(config)
"""


def kill_after(config: train_kto.Config, num_rows: int, folder: Path) -> None:
    """Run as another process and SIGKILL it once it has written that many rows."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "config.pkl").write_bytes(pickle.dumps(config))
    process = subprocess.Popen(
        [sys.executable, str(folder / "program.py"), str(folder / "config.pkl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = Path(config.log_path) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= num_rows:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_run_learns_and_a_killed_one_resumes_to_its_rows(make_config, tmp_path: Path):
    unbroken = make_config("unbroken", num_epochs=4)
    train_kto.main(unbroken)
    wanted = rows_of(unbroken)
    # The model is its reference: each loss is 1 - sigmoid(0).
    tolerance = by_format(float32=1e-5, bfloat16=2e-2)
    assert wanted[0]["dpo_loss"] == pytest.approx(0.5, abs=tolerance)
    assert wanted[0]["kl_baseline"] == pytest.approx(0, abs=by_format(float32=1e-4, bfloat16=0.2))
    assert wanted[-1]["test/margin"] > 0.5
    assert wanted[-1]["test/accuracy"] == 1.0
    # 12 replies and 4 held-out ones, each with a mismatched one, scored once in four epochs.
    assert 16 < wanted[3]["reference/scored"] == wanted[-2]["reference/scored"] <= 32
    for kill_after_rows in (0, 5):
        broken = make_config(f"broken{kill_after_rows}", num_epochs=4)
        kill_after(broken, kill_after_rows, tmp_path)
        train_kto.main(broken)
        found = rows_of(broken)
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for one, other in zip(wanted, found, strict=True):
            for key in ("dpo_loss", "kl_baseline", "margin", "test/margin", "learning_rate"):
                if key in one:
                    assert other[key] == pytest.approx(
                        one[key], abs=by_format(float32=1e-6, bfloat16=1e-2)
                    )


def test_the_gradient_is_that_of_the_sdks_custom_loss(make_config, local_service: ServiceProcess):
    torch = pytest.importorskip("torch")
    dataset, _ = make_config(batch_size=6).dataset_builder()
    data, is_good_S = dataset.load_batch(0)
    assert 0 < is_good_S.sum() < 6
    client = local_service.connect()
    policies = [
        client.create_lora_training_client(local_service.model, rank=4, seed=3).result()
        for _ in range(2)
    ]
    before = policies[0].forward(data, "cross_entropy").result().loss_fn_outputs
    sums = [
        float(np.dot(d.loss_fn_inputs["weights"].to_numpy(), o["logprobs"].to_numpy()))
        for d, o in zip(data, before, strict=True)
    ]
    # A reference that is less likely on the mismatched replies, so that the estimate is above 0.
    reference = np.array(sums) - np.tile([0.5, 1.25], 6)
    adam = tinker.AdamParams(learning_rate=1e-2)

    async def own() -> tuple[float, float]:
        loss = partial(kto, beta=0.2, good_weight=1.0, bad_weight=1.5)
        step = await submit_reply_gradient(policies[0], data, is_good_S, reference, loss)
        update = policies[0].optim_step(adam)
        for gradient in step.gradients:
            await gradient
        assert step.batch.kl_baseline == pytest.approx(1.25, abs=1e-3)
        return float(step.loss.loss_S.mean()), (await update).metrics["grad_norm"]

    def custom(singles: list[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        losses = []
        for number, (datum, found) in enumerate(zip(singles, logprobs, strict=True)):
            weights = torch.tensor(datum.loss_fn_inputs["weights"].to_numpy())
            ratio = (weights * found).sum() - reference[2 * number]
            sign = 1.0 if is_good_S[number] else -1.0
            value = torch.sigmoid(0.2 * sign * (ratio - 1.25))
            losses.append((1.0 if is_good_S[number] else 1.5) * (1 - value))
        mean = torch.stack(losses).mean()
        return mean, {"custom": mean.item()}

    loss, norm = asyncio.run(own())
    result = policies[1].forward_backward_custom(data[0::2], custom).result()
    other = policies[1].optim_step(adam).result()
    assert loss == pytest.approx(result.metrics["custom"], abs=1e-4)
    assert norm == pytest.approx(
        other.metrics["grad_norm"], rel=by_format(float32=1e-4, bfloat16=5e-2)
    )


def test_partners_answer_another_prompt():
    def replies(prompts: str) -> list[Any]:
        rows = [{"prompt": p, "completion": "x", "label": True} for p in prompts]
        return [parse_rated_reply(SourceRow("row", row)) for row in rows]

    assert find_partners(replies("abcd")) == [3, 0, 1, 2]
    assert find_partners(replies("aabb")) == [3, 3, 1, 1]
    assert find_partners(replies("abbb")) == [3, 0, 0, 0]
    with pytest.raises(DataError, match="all replies answer the same prompt"):
        find_partners(replies("aa"))


def test_all_shapes_make_the_same_reply():
    answer = {"role": "assistant", "content": "yes"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Q", "completion": "yes", "label": False},
        {"prompt": [USER], "completion": [answer], "label": 0},
        {"prompt": "Q", "completion": [USER, answer], "label": "false"},
        {"messages": [USER, answer], "label": False},
    ]
    first, *others = [parse_rated_reply(SourceRow("row", row)) for row in rows]
    assert others == [first] * 3
    assert not first.is_good


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "completion": "a"}, "label=None must be true"),
        ({"prompt": "Q", "completion": "a", "label": "good"}, "label='good' must be true"),
        ({"prompt": "Q", "label": True}, "the row has 'prompt', 'label'; use"),
        ({"prompt": "Q", "completion": 5, "label": True}, "completion is a number"),
        ({"messages": [USER], "label": True}, "messages ends with a message of 'user'"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], words: str):
    with pytest.raises(DataError) as caught:
        parse_rated_reply(SourceRow("r.jsonl:7", row))
    assert words in str(caught.value)
    assert "r.jsonl:7" in str(caught.value)


def test_replies_that_max_length_cuts_away_are_named_before_the_run(
    local_service: ServiceProcess,
):
    renderer = get_renderer("chatml", tokenizer_utils.get_tokenizer(local_service.model))
    rows = [
        {"prompt": "word " * 60, "completion": "a", "label": True},
        {"prompt": "Q", "completion": "b", "label": True},
    ]
    replies = [parse_rated_reply(SourceRow(f"r.jsonl:{i}", row)) for i, row in enumerate(rows, 1)]
    with pytest.raises(DataError, match=r"r\.jsonl:1: no token of the completion .*max_length=30"):
        RatedReplyDataset(replies, renderer, batch_size=2, max_length=30)
    dataset = RatedReplyDataset(replies, renderer, batch_size=2, max_length=200)
    assert dataset.summary == ["2 replies, 2 good, 0 bad"]


def test_comparisons_become_two_replies_each():
    pair = Comparison([USER], [{"role": "assistant", "content": "a"}], [USER])  # pyright: ignore[reportArgumentType]
    replies = from_comparisons([LabeledComparison(pair, "B"), LabeledComparison(pair, "Tie")])
    assert [reply.is_good for reply in replies] == [True, False]
    assert replies[0].completion == pair.completion_B


def test_a_batch_of_one_kind_has_no_margin():
    batch = SingleBatch(np.array([1.0, 3.0]), np.array([True, True]), 0.0)
    metrics = compute_reply_metrics(batch, kto(batch, beta=0.5), 0.5)
    assert metrics["chosen_reward"] == pytest.approx(1.0)
    assert not {"margin", "accuracy", "rejected_reward"} & metrics.keys()


def test_settings_out_of_range_are_refused(make_config):
    with pytest.raises(ConfigurationError, match="bad_weight=0 must be greater than 0"):
        make_config(bad_weight=0)
