"""A benchmark as an evaluator of both train loops."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.eval.benchmarks.scripted import ScriptedClient, chatml
from tests.rl.token_task import TokenDatasetBuilder
from tinker_cookbook.eval import BenchmarkEvaluator, BenchmarkEvaluatorBuilder
from tinker_cookbook.exceptions import BenchmarkNotFoundError
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.supervised import train as supervised_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig


@pytest.fixture
def builder(local_service: ServiceProcess, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    return BenchmarkEvaluatorBuilder(
        benchmark_name="arithmetic",
        model_name=local_service.model,
        renderer_name="chatml",
        max_examples=2,
        max_tokens=4,
        save_dir=str(tmp_path / "replies"),
    )


def scores(log_path: Path) -> list[float]:
    rows = [json.loads(line) for line in (log_path / "metrics.jsonl").read_text().splitlines()]
    return [row["eval/arithmetic/score"] for row in rows if "eval/arithmetic/score" in row]


def test_the_supervised_loop_runs_it(builder, tmp_path: Path, local_service) -> None:
    data = tmp_path / "chats.jsonl"
    message = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}
    data.write_text(4 * (json.dumps({"messages": message}) + "\n"))
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=local_service.model,
        renderer_name="chatml",
        max_length=64,
        batch_size=2,
    )
    config = supervised_train.Config(
        log_path=str(tmp_path / "run"),
        model_name=local_service.model,
        dataset_builder=FromConversationFileBuilder(common_config=common, file_path=str(data)),
        evaluator_builders=[builder],
        eval_every=1,
        save_every=0,
    )
    asyncio.run(supervised_train.main(config))
    assert len(scores(tmp_path / "run")) >= 2
    stored = sorted((tmp_path / "replies").rglob("trajectories.jsonl"))
    assert stored[0].parent.parent.name == "000000"
    assert len(stored[0].read_text().splitlines()) == 2


def test_the_reinforcement_loop_runs_it(builder, tmp_path: Path, local_service) -> None:
    config = rl_train.Config(
        log_path=str(tmp_path / "run"),
        model_name=local_service.model,
        base_url=local_service.base_url,
        dataset_builder=TokenDatasetBuilder(num_batches=2),
        max_tokens=4,
        learning_rate=1e-3,
        lora_rank=2,
        evaluator_builders=[builder],
        eval_every=1,
        save_every=0,
    )
    asyncio.run(rl_train.main(config))
    assert len(scores(tmp_path / "run")) >= 2


def test_a_failed_evaluation_does_not_end_the_training(caplog) -> None:
    client = ScriptedClient(lambda prompt, call: ValueError("the service is away"))
    evaluator = BenchmarkEvaluator("arithmetic", chatml(), max_examples=1)
    evaluator.config.max_attempts = 1
    assert asyncio.run(evaluator(client)) == {}  # pyright: ignore[reportArgumentType]
    assert "the service is away" in caplog.text


def test_an_unknown_benchmark_is_refused_at_the_start(builder) -> None:
    with pytest.raises(BenchmarkNotFoundError, match="Did you mean 'arithmetic'"):
        BenchmarkEvaluator("arithmetics", chatml())
