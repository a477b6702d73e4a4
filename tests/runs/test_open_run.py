"""A loop on `open_run`: complete, complete before, failed and resumed, with changed data."""

import asyncio
from pathlib import Path

import chz
import pytest

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.checkpoints import load_checkpoints_file
from tinker_cookbook.runs.open_run import RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.jsonl_log import read_rows

STEPS = 4


class Failure(Exception):
    pass


async def train(config: SharedOptions, *, data: str = "a", fail_at: int | None = None) -> RunResult:
    """The loop of the module's docstring."""
    async with open_run(config, "my_recipe") as run:
        if not await run.begin(total_steps=STEPS, data_fingerprint=data):
            return run.result()
        for step in range(run.start_step, run.total_steps):
            if step == fail_at:
                raise Failure
            with trace.trace_iteration(step) as window:
                gradient = run.training_client.forward_backward(batch(), "cross_entropy")
                update = run.training_client.optim_step(run.adam_params(step))
                saving = run.submit_checkpoint({"batch": step + 1}, steps_done=step + 1)
                metrics = (await gradient).metrics
                await update
            await run.finish_step(step, {**metrics, "num_tokens": 8}, window, saving)
        return await run.finish({"batch": run.total_steps}, {"test/x": 1.0})


@pytest.fixture
def config(tmp_path: Path, local_service: ServiceProcess, monkeypatch) -> SharedOptions:
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    return SharedOptions(
        model_name=local_service.model,
        log_path=str(tmp_path / "run"),
        lora_rank=2,
        learning_rate=1e-2,
        save_every=2,
    )


def losses(config: SharedOptions) -> list[float]:
    rows = read_rows(Path(config.log_path or "") / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row["time/step"] > 0 and row["time/tokens_per_second"] > 0 for row in rows)
    return [row["loss:sum"] for row in rows]


def test_a_loop_trains_saves_and_does_nothing_the_second_time(
    config: SharedOptions, capsys: pytest.CaptureFixture[str]
):
    first = asyncio.run(train(config))
    assert losses(config) == sorted(losses(config), reverse=True)
    assert first.metrics == {"test/x": 1.0}
    assert first.best_sampler_path == first.sampler_path
    records = load_checkpoints_file(first.log_path)
    assert [(record.name, record.batch) for record in records] == [("000002", 2), ("final", 4)]
    shown = capsys.readouterr().out
    assert f"run      {config.log_path}" in shown
    assert "saved    " in shown
    again = asyncio.run(train(config))
    assert (again.sampler_path, again.metrics) == (first.sampler_path, {})
    assert "already complete" in capsys.readouterr().out


def test_a_failed_loop_resumes_and_repeats_an_unbroken_one(config: SharedOptions, tmp_path: Path):
    asyncio.run(train(config))
    other = chz.replace(config, log_path=str(tmp_path / "broken"))
    with pytest.raises(Failure):
        asyncio.run(train(other, fail_at=3))
    asyncio.run(train(other))
    assert losses(other) == losses(config)


def test_other_data_is_refused_unless_asked_for(config: SharedOptions):
    with pytest.raises(Failure):
        asyncio.run(train(config, fail_at=3))
    with pytest.raises(ConfigurationError, match=r"data has changed .*\(a -> b\)"):
        asyncio.run(train(config, data="b"))
    asyncio.run(train(chz.replace(config, behavior_if_log_dir_exists="resume"), data="b"))
    assert load_checkpoints_file(config.log_path or "")[-1].extra["data_fingerprint"] == "b"


def test_a_start_without_a_model_on_the_service_leaves_no_files(config: SharedOptions):
    with pytest.raises(ConfigurationError, match="is not offered"):
        asyncio.run(train(chz.replace(config, model_name="nobody/nothing")))
    assert not Path(config.log_path or "").exists()
