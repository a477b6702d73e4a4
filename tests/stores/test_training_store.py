"""A run is read back as it was written, at any moment of its writing."""

import json
import threading
from pathlib import Path

import pytest

from tinker_cookbook.stores import FsspecStorage, IncrementalReader, LocalStorage, TrainingRunStore
from tinker_cookbook.utils.jsonl_log import append_row, keep_rows

RUN = "recipe/run"


def local_store(tmp_path: Path) -> TrainingRunStore:
    return TrainingRunStore(LocalStorage(tmp_path), RUN)


@pytest.mark.parametrize("kind", ["local", "fsspec"])
def test_everything_written_is_read_back(kind: str, tmp_path: Path):
    memory = FsspecStorage("memory", f"/{tmp_path.name}")
    store = TrainingRunStore(LocalStorage(tmp_path) if kind == "local" else memory, RUN)
    store.write_config({"model_name": "m"})
    for step in range(3):
        store.write_metrics({"loss": 1.5 - step}, step)
        store.write_timing_spans(step, [{"name": "train"}])
    store.write_metrics({"loss/total": 3})
    store.write_checkpoint({"name": "final", "final": True})
    store.write_rollouts(4, [{"group_idx": 0, "traj_idx": 1, "total_reward": 1.0}])
    store.write_rollouts(4, [{"group_idx": 2}], "eval_test")
    store.write_logtree(4, {"root": []})
    assert store.read_config() == {"model_name": "m"}
    assert store.read_metrics()[1] == {"step": 1, "loss": 0.5}
    assert store.read_metrics()[3] == {"loss/total": 3}
    assert store.metric_keys() == {"step", "loss", "loss/total"}
    assert store.read_checkpoint_records()[0].final
    assert [row["step"] for row in store.read_timing()] == [0, 1, 2]
    single = store.read_single_rollout(4, 0, 1)
    assert single is not None
    assert single["total_reward"] == 1.0
    assert store.read_single_rollout(4, 0, 2) is None
    assert store.list_logtrees(4) == ["train"]
    assert store.read_logtree(4) == {"root": []}
    (iteration,) = store.list_iterations()
    assert (iteration.iteration, iteration.has_train_rollouts) == (4, True)
    assert (iteration.has_train_logtree, iteration.eval_labels) == (True, ["eval_test"])
    assert store.truncate_metrics(1) == 2
    assert [row.get("step") for row in store.read_metrics()] == [0, None]


def test_a_half_written_last_line_is_read_once_it_is_complete(tmp_path: Path):
    store = local_store(tmp_path)
    store.write_metrics({"loss": 1.0}, 0)
    path = Path(store.url("metrics.jsonl"))
    with path.open("ab") as file:
        file.write(b'{"step": 1, "lo')
    assert [row["step"] for row in store.read_new_metrics()] == [0]
    assert store.read_new_metrics() == []
    with path.open("ab") as file:
        file.write(b'ss": 2.0}\n')
    assert store.read_new_metrics() == [{"step": 1, "loss": 2.0}]


def test_the_next_writer_cuts_a_half_written_line_off(tmp_path: Path):
    store = local_store(tmp_path)
    store.write_metrics({"loss": 1.0}, 0)
    with Path(store.url("metrics.jsonl")).open("ab") as file:
        file.write(b'{"step": 1, "lo')
    store.write_metrics({"loss": 3.0}, 1)
    assert store.read_metrics() == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 3.0}]


def test_rows_that_a_resumed_run_drops_are_forgotten(tmp_path: Path):
    store = local_store(tmp_path)
    path = Path(store.url("metrics.jsonl"))
    for step in range(5):
        store.write_metrics({"loss": float(step)}, step)
    assert len(store.read_metrics()) == 5
    keep_rows(path, lambda row: row["step"] < 2)
    for step in range(2, 8):  # the file is now longer than before
        append_row(path, {"step": step, "loss": -float(step)})
    assert [row["loss"] for row in store.read_metrics()] == [0, 1, -2, -3, -4, -5, -6, -7]


def test_a_step_that_was_repeated_is_one_row(tmp_path: Path):
    store = local_store(tmp_path)
    for step, loss in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0)):
        store.write_metrics({"loss": loss}, step)
    store.write_metrics({"test/nll": 9.0}, 1)
    assert store.read_metrics() == [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": 3.0, "test/nll": 9.0},
        {"step": 2, "loss": 4.0},
    ]


def test_a_deleted_run_reads_as_empty(tmp_path: Path):
    store = local_store(tmp_path)
    assert store.read_config() is None
    assert store.read_metrics() == []
    store.write_metrics({"loss": 1.0}, 0)
    assert len(store.read_metrics()) == 1
    LocalStorage(tmp_path).remove_dir(RUN)
    assert store.read_metrics() == []
    assert store.list_iterations() == []


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n\x00\xff\n[1]\n\n{"a": 2}\n')
    reader = IncrementalReader(LocalStorage(tmp_path), "x.jsonl", max_records=1)
    assert reader.read() == [{"a": 1}, {"a": 2}]
    assert (reader.records, reader.total_read, reader.num_bad_lines) == ([{"a": 2}], 2, 2)


def test_every_row_is_read_once_while_another_thread_writes(tmp_path: Path):
    path = tmp_path / "x.jsonl"

    def write() -> None:
        with path.open("ab", buffering=0) as file:
            for number in range(2000):
                line = json.dumps({"number": number, "pad": "x" * (number % 50)}).encode() + b"\n"
                file.write(line[: len(line) // 2])
                file.write(line[len(line) // 2 :])

    reader, numbers = IncrementalReader(LocalStorage(tmp_path), "x.jsonl"), []
    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        numbers += [row["number"] for row in reader.read()]
    numbers += [row["number"] for row in reader.read()]
    assert numbers == list(range(2000))
    assert reader.num_bad_lines == 0
