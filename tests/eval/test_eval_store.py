"""Many evaluations in one folder."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.eval.benchmarks.scripted import Capitals, ScriptedClient, chatml
from tinker_cookbook.eval import BenchmarkConfig, EvalStore, run_benchmark
from tinker_cookbook.exceptions import ConfigurationError


def test_an_evaluation_is_recorded_with_its_scores(tmp_path: Path) -> None:
    store = EvalStore(tmp_path)
    assert store.list_runs() == []
    name = store.create_run("scripted", ["capitals"], config={"temperature": 0.6})
    client = ScriptedClient(lambda prompt, call: ["Paris"])
    config = BenchmarkConfig(save_dir=store.run_dir(name), weights="w")
    asyncio.run(run_benchmark(Capitals(), client, chatml(), config))  # pyright: ignore[reportArgumentType]
    assert store.list_benchmarks(name) == ["capitals"]
    assert store.finalize_run(name).scores == {"capitals": pytest.approx(1 / 3)}
    (found,) = store.list_runs()
    assert (found.run_id, found.model_name, found.config) == (
        name,
        "scripted",
        {"temperature": 0.6},
    )
    assert len(store.read_trajectories(name, "capitals", incorrect_only=True)) == 2
    single = store.read_single_trajectory(name, "capitals", 0)
    assert single is not None
    assert single.example_id == "France"
    store.delete_run(name)
    assert store.list_runs() == []


def test_results_of_another_place_are_copied(tmp_path: Path) -> None:
    store = EvalStore(tmp_path)
    one = store.create_run("a", ["capitals"], run_id="one")
    client = ScriptedClient(lambda prompt, call: ["Rome"])
    config = BenchmarkConfig(save_dir=store.run_dir(one), weights="w")
    result = asyncio.run(run_benchmark(Capitals(), client, chatml(), config))  # pyright: ignore[reportArgumentType]
    two = store.create_run("a", ["capitals"], run_id="two")
    for each in store.read_trajectories(one, "capitals"):
        store.write_trajectory(two, "capitals", each)
    store.write_summary(two, {"capitals": result})
    assert store.read_trajectories(two, "capitals") == store.read_trajectories(one, "capitals")
    assert store.read_result(two, "capitals") == result
    assert store.read_summary(two) == store.read_summary(one)


@pytest.mark.parametrize("run_id", ["../up", "", "a/b"])
def test_ids_that_are_not_file_names_are_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(ConfigurationError, match="not a file name"):
        EvalStore(tmp_path).run_dir(run_id)


def test_unknown_and_taken_ids_are_told(tmp_path: Path) -> None:
    store = EvalStore(tmp_path)
    store.create_run("a", [], run_id="one")
    with pytest.raises(ConfigurationError, match="exists already"):
        store.create_run("a", [], run_id="one")
    with pytest.raises(ConfigurationError, match="run_id=two is unknown"):
        store.read_run("two")
