"""The tokens and the cost of a run: by step, of other models, and after it was resumed."""

import asyncio
import json
import threading
from pathlib import Path

import chz
import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch
from tinker_cookbook.runs.open_run import RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.runs.token_meter import TokenMeter, count_tokens
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.cost_estimation import TokenUsage
from tinker_cookbook.utils.jsonl_log import read_rows

PROMPT = [5, 6, 7, 8]
NUM_SAMPLES, MAX_TOKENS = 3, 2
PRICES = {
    "prefill_usd_per_million": 1e6,
    "cached_prefill_usd_per_million": 1e5,
    "sample_usd_per_million": 2e6,
    "train_usd_per_million": 4e6,
}
"""A dollar per prompt token, and so on."""


def write_prices(folder: Path, *names: str) -> str:
    path = folder / "prices.json"
    path.write_text(json.dumps([{"model_name": name, **PRICES} for name in names]))
    return str(path)


def test_each_step_has_its_own_tokens():
    meter = TokenMeter("own", None)
    meter.add(None, "own", TokenUsage(sampled=1))
    meter.add(1, "own", TokenUsage(trained=20))  # submitted ahead
    meter.add(0, "own", TokenUsage(trained=10))
    first, second = meter.take_metrics(0), meter.take_metrics(1)
    assert (first["tokens/sampled"], first["tokens/trained"]) == (1, 10)
    assert (second["tokens/sampled"], second["tokens/trained"]) == (0, 20)
    assert second["tokens/cumulative/trained"] == 30
    assert not any(name.startswith("cost") for name in second)


def test_another_model_is_counted_apart_and_paid_at_its_price(tmp_path: Path):
    meter = TokenMeter("own", write_prices(tmp_path, "own", "teacher"))
    meter.add(0, "own", TokenUsage(trained=10))
    meter.add(0, "teacher", TokenUsage(prefill_uncached=7))
    row = meter.take_metrics(0)
    assert row["tokens/prefill_uncached"] == 0
    assert row["tokens/other_models/prefill_uncached"] == 7
    assert row["cost/step_usd"] == row["cost/cumulative_usd"] == 10 * 4 + 7
    resumed = TokenMeter("own", write_prices(tmp_path, "own", "teacher"))
    resumed.resume(row)
    resumed.add(1, "own", TokenUsage(trained=1))
    row = resumed.take_metrics(1)
    assert (row["cost/step_usd"], row["cost/cumulative_usd"]) == (4, 51)
    assert row["tokens/cumulative/trained"] == 11


def test_a_model_without_a_price_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    meter = TokenMeter("own", write_prices(tmp_path, "other"))
    assert "has no prices of own" in caplog.text
    assert "cost/step_usd" not in meter.take_metrics(0)


def test_the_sdk_is_restored_after_the_last_run():
    first, second = TokenMeter("a", None), TokenMeter("b", None)
    original = tinker.SamplingClient.sample
    with count_tokens(first):
        assert tinker.SamplingClient.sample is not original
        with count_tokens(second):
            pass
    assert tinker.SamplingClient.sample is original


async def train(config: SharedOptions) -> RunResult:
    """One step on a batch, with samples, scores, and a request of another thread."""
    async with open_run(config, "my_recipe") as run:
        await run.begin(total_steps=1)
        with trace.trace_iteration(0) as window:
            client = run.training_client.save_weights_and_get_sampling_client()
            sampler = await client if hasattr(client, "__await__") else client
            prompt = tinker.ModelInput.from_ints(PROMPT)
            params = tinker.SamplingParams(max_tokens=MAX_TOKENS, seed=1)
            await sampler.sample(prompt, NUM_SAMPLES, params)
            thread = threading.Thread(target=lambda: sampler.compute_logprobs(prompt).result())
            thread.start()
            await asyncio.to_thread(thread.join)
            await run.training_client.forward(batch(), "cross_entropy")
            gradient = run.training_client.forward_backward(batch(), "cross_entropy")
            update = run.training_client.optim_step(run.adam_params(0))
            await gradient
            await update
        await run.finish_step(0, {}, window)
        return await run.finish({"batch": 1})


def test_a_run_writes_what_its_requests_cost(
    tmp_path: Path, local_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    config = SharedOptions(
        model_name=local_service.model,
        log_path=str(tmp_path / "run"),
        lora_rank=2,
        prices=write_prices(tmp_path, local_service.model),
    )
    asyncio.run(train(chz.replace(config)))
    [row] = read_rows(tmp_path / "run" / "metrics.jsonl")
    trained = sum(datum.model_input.length for datum in batch())
    assert row["tokens/sampled"] <= NUM_SAMPLES * MAX_TOKENS
    assert row["tokens/sampled"] >= NUM_SAMPLES
    assert row["tokens/prefill_cached"] == (NUM_SAMPLES - 1) * len(PROMPT)
    assert row["tokens/prefill_uncached"] == 2 * len(PROMPT) + trained
    assert row["tokens/trained"] == trained
    assert row["cost/cumulative_usd"] == pytest.approx(
        2 * row["tokens/sampled"]
        + 0.1 * row["tokens/prefill_cached"]
        + row["tokens/prefill_uncached"]
        + 4 * trained
    )
