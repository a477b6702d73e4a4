"""Benchmarks against the real service: equal samples, resuming after a kill, and likelihoods."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, train_step
from tinker_cookbook.eval import BenchmarkEvaluator
from tinker_cookbook.eval.benchmarks import (
    REGISTRY,
    BenchmarkConfig,
    load_trajectories,
    run_benchmark,
)
from tinker_cookbook.eval.benchmarks._likelihood import split_tokens
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import Renderer, load_renderer

PROGRAM = """
import asyncio, sys
import tinker
from tinker_cookbook.eval.benchmarks import BenchmarkConfig, run_benchmark
from tinker_cookbook.renderers import load_renderer
url, key, model, folder = sys.argv[1:]
created = tinker.ServiceClient(base_url=url, api_key=key).create_sampling_client(base_model=model)
client = created.result() if hasattr(created, "result") else created
config = BenchmarkConfig(
    max_examples=12, max_tokens=16, num_samples=2, temperature=1.0, concurrency=1, save_dir=folder
)
asyncio.run(run_benchmark("arithmetic", client, load_renderer("chatml", model), config))
"""


@pytest.fixture
def renderer(local_service: ServiceProcess) -> Renderer:
    return load_renderer("chatml", local_service.model)


@pytest.fixture
def client(service_client, local_service: ServiceProcess):
    created = service_client.create_sampling_client(base_model=local_service.model)
    return created.result() if hasattr(created, "result") else created


def start(service: ServiceProcess, folder: Path) -> subprocess.Popen[bytes]:
    words = (service.base_url, service.api_key, service.model, str(folder))
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], env=dict(os.environ))


def replies(folder: Path) -> list[tuple[str, int, str, float]]:
    found = load_trajectories(str(folder), "arithmetic")
    return [(each.example_id, each.sample, each.reply, each.reward) for each in found]


def test_an_evaluation_that_was_killed_ends_as_an_unbroken_one(
    tmp_path: Path, local_service: ServiceProcess
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    first = start(local_service, broken)
    stored = broken / "arithmetic" / "trajectories.jsonl"
    while not stored.exists() or stored.read_bytes().count(b"\n") < 6:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    first.kill()
    first.wait()
    kept = stored.read_bytes().count(b"\n")
    assert kept < 24
    assert start(local_service, broken).wait(60) == 0
    assert start(local_service, whole).wait(60) == 0
    assert len(replies(whole)) == 24
    assert replies(broken) == replies(whole)
    texts = [reply for _, _, reply, _ in replies(whole)]
    assert len(set(texts)) > 12, "the samples of an example differ"
    lines = stored.read_bytes().splitlines()
    assert len(lines) == 24, "no example is stored twice"


@pytest.mark.anyio
async def test_other_weights_are_told_from_the_stored_ones(
    tmp_path: Path, service_client, local_service: ServiceProcess, renderer: Renderer, client
) -> None:
    run = service_client.create_lora_training_client(base_model=local_service.model, rank=2)
    run = await asyncio.to_thread(run.result)
    train_step(run, batch())
    path = run.save_weights_for_sampler("one").result().path
    trained = service_client.create_sampling_client(model_path=path)
    trained = await asyncio.to_thread(trained.result) if hasattr(trained, "result") else trained
    config = BenchmarkConfig(max_examples=2, max_tokens=4, save_dir=str(tmp_path))
    await run_benchmark("arithmetic", client, renderer, config)
    with pytest.raises(ConfigurationError, match=f"weights: .* there, '{path}' now"):
        await run_benchmark("arithmetic", trained, renderer, config)


@pytest.mark.anyio
async def test_the_likelihood_of_an_ending_is_that_of_its_tokens(
    tmp_path: Path, client, renderer: Renderer
) -> None:
    import tinker

    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "What is it?", "choices": ["a dog", "a fox runs"], "label": 1}\n')
    config = BenchmarkConfig(save_dir=str(tmp_path / "e"), data={"truthfulqa": str(data)})
    result = await run_benchmark("truthfulqa", client, renderer, config)
    (found,) = load_trajectories(str(tmp_path / "e"), "truthfulqa")
    for turn in found.turns[1:]:
        tokens, count = split_tokens(renderer, "Q: What is it?\nA:", f" {turn.content}")
        whole = await client.compute_logprobs(tinker.ModelInput.from_ints(tokens))
        assert turn.metadata["logprob"] == pytest.approx(sum(whole[-count:]), abs=1e-3)
    assert result.metrics["acc"] == result.score
    assert await REGISTRY["truthfulqa"].grade("", found.logs, config)


@pytest.mark.anyio
async def test_an_evaluator_returns_metrics_and_numbers_its_folders(
    tmp_path: Path, client, renderer: Renderer
) -> None:
    evaluator = BenchmarkEvaluator(
        "arithmetic", renderer, max_examples=2, max_tokens=4, save_dir=str(tmp_path)
    )
    first = await evaluator(client)
    second = await evaluator(client)
    assert first["eval/arithmetic/num_examples"] == 2.0
    assert first["eval/arithmetic/num_truncated"] == second["eval/arithmetic/num_truncated"]
    assert set(first) >= {"eval/arithmetic/score", "eval/arithmetic/standard_error"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000", "000001"]
