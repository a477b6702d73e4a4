"""Columns are read without parsing rows, and curves keep their extremes when they are reduced."""

import json
from pathlib import Path

import numpy as np
import pytest

from tinker_cookbook.stores import LocalStorage, TrainingRunStore
from tinker_cookbook.viewer.columns import MetricColumns
from tinker_cookbook.viewer.thinning import thin_curve


def test_a_short_curve_is_returned_whole():
    curve = thin_curve(np.array([3, 5, 9]), np.array([1.0, 2.0, 0.12345678]), 2)
    assert curve["x"] == curve["mean_x"] == [3, 5, 9]
    assert curve["y"] == curve["mean_y"] == [1.0, 2.0, 0.123457], "six digits"
    assert curve["count"] == [1, 1, 1]


def test_a_long_curve_keeps_every_peak_and_its_ends():
    generator = np.random.default_rng(0)
    steps, values = np.arange(10_000), generator.normal(size=10_000)
    values[4_321], values[7_777] = 50.0, -50.0
    curve = thin_curve(steps, values, 100)
    assert len(curve["x"]) <= 202
    points = dict(zip(curve["x"], curve["y"], strict=True))
    assert points[4_321] == 50.0
    assert points[7_777] == -50.0
    assert curve["x"][0] == 0
    assert curve["x"][-1] == 9_999
    assert curve["x"] == sorted(set(curve["x"]))
    assert sum(curve["count"]) == curve["total"] == 10_000
    means = np.average(curve["mean_y"], weights=curve["count"])
    assert means == pytest.approx(values.mean(), abs=1e-4)
    for part in range(100):  # the extremes of each part are those of its points
        inside = values[100 * part : 100 * (part + 1)]
        shown = [points[x] for x in curve["x"] if 100 * part <= x < 100 * (part + 1)]
        assert max(shown) == pytest.approx(inside.max(), rel=1e-5)
        assert min(shown) == pytest.approx(inside.min(), rel=1e-5)


def test_parts_without_points_are_left_out():
    steps = np.array([0, 1, 2, 3, 1_000_000])
    curve = thin_curve(steps, np.arange(5.0), 2)
    assert curve["x"] == [0, 3, 1_000_000]
    assert curve["count"] == [4, 1]


@pytest.fixture
def store(tmp_path: Path) -> TrainingRunStore:
    return TrainingRunStore(LocalStorage(tmp_path), "run")


def columns(tmp_path: Path) -> MetricColumns:
    return MetricColumns(LocalStorage(tmp_path), "run")


def test_columns_agree_with_the_rows(tmp_path: Path, store: TrainingRunStore):
    rows = [{"a": step / 3, "a/b": -1e-9 * step, "text": '"a": 7', "c": None} for step in range(50)]
    for step, row in enumerate(rows):
        store.write_metrics(row | ({"rare": 1} if step == 40 else {}), step)
    store.write_metrics({"a": 99.0})  # a summary has no step
    found = columns(tmp_path).read(["a", "a/b", "rare", "c", "text", "missing"])
    assert sorted(found) == ["a", "a/b", "rare"]
    assert found["a"].values.tolist() == pytest.approx([row["a"] for row in rows])
    assert found["a/b"].values.tolist() == pytest.approx([row["a/b"] for row in rows])
    assert found["rare"].steps.tolist() == [40]
    assert columns(tmp_path).keys() == ["a", "a/b", "rare"]


def test_only_new_rows_are_read_and_the_newest_value_of_a_step_counts(
    tmp_path: Path, store: TrainingRunStore
):
    opened = columns(tmp_path)
    assert opened.read(["a"]) == {}
    store.write_metrics({"a": 1.0}, 0)
    store.write_metrics({"a": 2.0}, 1)
    assert opened.read(["a"])["a"].values.tolist() == [1.0, 2.0]
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "a": 3')  # half a row
    assert opened.read(["a"])["a"].steps.tolist() == [0, 1]
    with path.open("a") as file:
        file.write('.5, "b": 1}\n{"step": 1, "a": 7.0}\n')
    assert opened.read(["a"])["a"].values.tolist() == [1.0, 7.0, 3.5]
    assert opened.read(["b", "a"])["b"].steps.tolist() == [2]
    store.truncate_metrics(1)  # a resumed run drops rows
    assert opened.read(["a"])["a"].values.tolist() == [1.0]
    assert opened.keys() == ["a"]


def test_other_axes_are_running_sums(tmp_path: Path, store: TrainingRunStore):
    for step in range(3):
        store.write_metrics({"time/step": 2.0, "num_tokens": 10}, step)
    found = columns(tmp_path).read(["axis/seconds", "axis/tokens"])
    assert found["axis/seconds"].values.tolist() == [2.0, 4.0, 6.0]
    assert found["axis/tokens"].values.tolist() == [10.0, 20.0, 30.0]


def test_names_are_found_throughout_a_large_file(tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": n, "a": n, "filler": "x" * 200} | ({"late": 1} if n > 4000 else {})
        for n in range(5000)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert columns(tmp_path).keys() == ["a", "late"]
