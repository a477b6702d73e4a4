"""Runs are found where recipes put them, and their state comes from the lock and the records."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs import lock
from tinker_cookbook.stores import FsspecStorage, LocalStorage, RunRegistry, TrainingRunStore
from tinker_cookbook.stores.run_facts import END_BYTES
from tinker_cookbook.utils.metric_names import lower_is_better

CONFIG = {
    "recipe_name": "sl_basic",
    "model_name": "org/model",
    "dataset_builder": {"file_path": "talk.jsonl"},
}
HOLDER = """
import sys, time
from pathlib import Path
from tinker_cookbook.runs import lock
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def write_run(root: Path, name: str, steps: int = 3, *, final: bool = True) -> TrainingRunStore:
    store = TrainingRunStore(LocalStorage(root), name)
    store.write_config(CONFIG)
    for step in range(steps):
        row = {"test/nll": 5.0 - step} if step % 2 == 0 else {}
        row |= {"progress": step / 4, "num_tokens": 7, "train_mean_nll": 4.0 - step}
        store.write_metrics(row, step)
    if final:
        store.write_checkpoint({"name": "final", "final": True})
    return store


def make_old(folder: Path) -> None:
    """Set the time of a folder back, so that the index may trust its entry."""
    os.utime(folder, (1_000_000_000, 1_000_000_000))


def test_runs_are_found_at_every_level(root: Path):
    for name in ("top", "sl_basic/one", "sl_basic/two", "sweep/sl_basic/three"):
        write_run(root, name)
    model = LocalStorage(root / "sl_basic" / "a_model")
    model.write("config.json", b"{}")  # the folder of a model is not a run
    found = {run.run_id for run in RunRegistry([LocalStorage(root)]).refresh()}
    assert found == {"top", "sl_basic/one", "sl_basic/two", "sweep/sl_basic/three"}


def test_a_storage_may_be_a_run_itself(root: Path):
    write_run(root.parent, "runs")
    (run,) = RunRegistry([LocalStorage(root)]).refresh()
    assert (run.run_id, run.prefix, run.facts.steps_done) == ("runs", "", 3)


def test_the_facts_of_a_run(root: Path):
    write_run(root, "sl_basic/one")
    registry = RunRegistry([LocalStorage(root)])
    (run,) = registry.get_runs()
    facts = run.facts
    assert (facts.recipe, facts.model, facts.data) == ("sl_basic", "org/model", "talk.jsonl")
    assert (run.training_type, facts.steps_done, facts.total_steps) == ("sl", 3, 4)
    assert facts.last == {"test/nll": 3.0, "train_mean_nll": 2.0}
    best = registry.get_details(run.run_id).best
    assert best is not None
    assert (best.metric, best.value, best.step, best.last) == ("test/nll", 3.0, 2, 3.0)
    files = list((root / "sl_basic" / "one").iterdir())
    assert registry.get_details(run.run_id).disk_bytes == sum(p.stat().st_size for p in files)


def test_the_best_value_is_found_in_the_middle_of_a_long_file(root: Path):
    store = write_run(root, "a/b", steps=0)
    rows = [{"step": i, "pad": "x" * 100, "test/nll": abs(i - 250) / 10} for i in range(500)]
    rows += [{"step": 500 + i, "pad": "x" * 100, "test/nll": float("nan")} for i in range(500)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert len(text) > 4 * END_BYTES
    Path(store.url("metrics.jsonl")).write_text(text)
    registry = RunRegistry([LocalStorage(root)])
    (run,) = registry.refresh()
    best = registry.get_details(run.run_id).best
    assert best is not None
    assert (best.value, best.step, best.last) == (0.0, 250, 24.9)
    assert run.facts.steps_done == 999


def test_a_row_longer_than_a_block_is_read(root: Path):
    store = write_run(root, "a/b", steps=0)
    for step in range(3):
        row = {"train_mean_nll": float(step)}
        store.write_metrics({**row, **{f"key{i}": 0.0 for i in range(3000)}}, step)
    (run,) = RunRegistry([LocalStorage(root)]).refresh()
    assert (run.facts.steps_done, run.facts.last) == (3, {"train_mean_nll": 2.0})


def test_a_run_without_its_final_checkpoint_and_without_a_process_has_failed(root: Path):
    write_run(root, "a/complete")
    write_run(root, "a/broken", final=False)
    states = {run.run_id: run.status for run in RunRegistry([LocalStorage(root)]).refresh()}
    assert states == {"a/complete": "completed", "a/broken": "failed"}


def test_a_killed_run_is_running_until_it_is_killed(root: Path):
    store = write_run(root, "a/b", final=False)
    registry = RunRegistry([LocalStorage(root)])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.url()], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        assert [run.status for run in registry.refresh()] == ["running"]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (Path(store.url()) / lock.LOCK_FILE).exists()
    assert [run.status for run in registry.refresh()] == ["failed"]
    assert [run.status for run in RunRegistry([LocalStorage(root)]).refresh()] == ["failed"]


def test_a_lock_file_whose_process_number_was_given_away_is_old(root: Path):
    store = write_run(root, "a/b", final=False)
    path = Path(store.url()) / lock.LOCK_FILE
    with lock.hold(path.parent):
        note = path.read_bytes()
        assert lock.is_in_use(path.parent)
    path.write_bytes(note)  # names this process, which does not hold it
    assert not lock.is_in_use(path.parent)
    with lock.hold(path.parent):
        pass


def test_changes_are_seen_and_the_rest_comes_from_the_index(root: Path, home: Path):
    stores = {name: write_run(root, name, final=False) for name in ("a/one", "a/two", "a/gone")}
    for name in stores:
        make_old(root / name)
    RunRegistry([LocalStorage(root)]).refresh()
    assert len(list((home / "run_index").iterdir())) == 1
    # A change that keeps the sizes and times of the files is not looked for.
    config = root / "a" / "two" / "config.json"
    config.write_text(json.dumps({**CONFIG, "recipe_name": "sl_other"}))
    stores["a/one"].write_metrics({"train_mean_nll": 0.5, "num_tokens": 1}, 3)
    LocalStorage(root).remove_dir("a/gone")
    write_run(root, "a/new")
    runs = {run.run_id: run for run in RunRegistry([LocalStorage(root)]).refresh()}
    assert runs.keys() == {"a/one", "a/two", "a/new"}
    assert runs["a/one"].facts.steps_done == 4
    assert runs["a/two"].facts.recipe == "sl_basic"
    make_now = root / "a" / "two"
    os.utime(make_now)
    runs = {run.run_id: run for run in RunRegistry([LocalStorage(root)]).refresh()}
    assert runs["a/two"].facts.recipe == "sl_other"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1, "entries": {"a/b": {}}}'])
def test_a_damaged_index_is_built_anew(root: Path, home: Path, content: bytes):
    write_run(root, "a/b")
    make_old(root / "a/b")
    RunRegistry([LocalStorage(root)]).refresh()
    (path,) = (home / "run_index").iterdir()
    path.write_bytes(content)
    assert len(RunRegistry([LocalStorage(root)]).refresh()) == 1
    assert json.loads(path.read_bytes())["entries"].keys() == {"a/b"}


def test_damaged_files_do_not_hide_a_run(root: Path):
    store = write_run(root, "a/b", final=False)
    LocalStorage(root).write("a/b/config.json", b'{"recipe_na')
    with Path(store.url("metrics.jsonl")).open("ab") as file:
        file.write(b'\xff\xfe\n{"step": 9, "trai')
    (run,) = RunRegistry([LocalStorage(root)]).refresh()
    assert (run.has_config, run.facts.recipe, run.facts.steps_done) == (False, "a", 3)


def test_runs_of_another_file_system(tmp_path: Path):
    storage = FsspecStorage("memory", f"/{tmp_path.name}")
    store = TrainingRunStore(storage, "a/b")
    store.write_config(CONFIG)
    store.write_metrics({"train_mean_nll": 1.0}, 0)
    registry = RunRegistry([storage])
    assert [(run.run_id, run.status) for run in registry.refresh()] == [("a/b", "failed")]
    storage.write(f"a/b/{lock.LOCK_FILE}", b"{}")
    assert [run.status for run in registry.refresh()] == ["running"]
    storage.remove(f"a/b/{lock.LOCK_FILE}")
    store.write_checkpoint({"name": "final", "final": True})
    assert [run.status for run in registry.refresh()] == ["completed"]


def test_an_unknown_run_names_the_nearest(root: Path):
    write_run(root, "sl_basic/one")
    registry = RunRegistry([LocalStorage(root)])
    assert registry.get_run("sl_basic/oen") is None
    assert registry.get_training_store("sl_basic/one").read_config() == CONFIG
    with pytest.raises(ConfigurationError, match=r"run_id=sl_basic/oen is not a run.*one"):
        registry.storage_for("sl_basic/oen")


def test_names_tell_which_direction_is_better():
    lower = ("test/nll", "train_mean_nll", "loss", "loss:sum", "dpo_loss", "test/bpb")
    higher = ("env/all/reward/total", "test/accuracy", "test/env/all/correct", "closs")
    assert all(map(lower_is_better, lower))
    assert not any(map(lower_is_better, higher))
