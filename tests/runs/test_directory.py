"""Old run directories: resumed, refused with the difference, asked about, or cleared."""

import json
from pathlib import Path

import chz
import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.directory import (
    config_differences,
    default_log_path,
    delete_run,
    describe_interruption,
    open_log_dir,
    prepare_log_dir,
    runs_path,
    truncate_metrics,
)
from tinker_cookbook.utils.jsonl_log import append_row, read_rows
from tinker_cookbook.utils.ml_log import JsonLogger


@chz.chz
class Data:
    file_path: str = "a.jsonl"
    log_path: str = "somewhere"


@chz.chz
class Config:
    learning_rate: float = 1e-4
    save_every: int = 20
    log_path: str = "run"
    data: Data = chz.field(default_factory=Data)


def make_run(folder: Path, config: Config) -> None:
    JsonLogger(folder).log_hparams(config)
    append_row(folder / "metrics.jsonl", {"step": 0})
    append_row(folder / "checkpoints.jsonl", {"name": "000001"})


def test_a_new_folder_is_made(tmp_path: Path):
    prepare_log_dir(tmp_path / "a" / "b", "ask", Config())
    assert (tmp_path / "a" / "b").is_dir()


def test_the_end_of_the_input_leaves_the_run_as_it_is(tmp_path: Path, monkeypatch):
    make_run(tmp_path, Config())

    def end(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", end)
    with pytest.raises(ConfigurationError, match="is kept, as you asked"):
        prepare_log_dir(tmp_path, "ask", Config(learning_rate=1.0))
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_run_of_another_kind_is_told_in_few_lines(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({f"key_{i:02}": i for i in range(40)}))
    with pytest.raises(ConfigurationError) as refused:
        prepare_log_dir(tmp_path, "ask", Config())
    lines = str(refused.value).splitlines()
    assert lines[-2] == "  ... and 30 more: it is a different kind of run"
    assert len(lines) == 15


def test_the_same_settings_go_on(tmp_path: Path):
    make_run(tmp_path, Config())
    prepare_log_dir(tmp_path, "ask", Config(save_every=3, log_path="elsewhere"))
    assert (tmp_path / "metrics.jsonl").exists()


def test_other_settings_are_refused_with_the_difference(tmp_path: Path):
    make_run(tmp_path, Config())
    other = Config(learning_rate=2e-4, data=Data(file_path="b.jsonl", log_path="moved"))
    assert config_differences(tmp_path, other) == [
        "data.file_path: a.jsonl -> b.jsonl",
        "learning_rate: 0.0001 -> 0.0002",
    ]
    with pytest.raises(ConfigurationError, match=r"learning_rate: 0\.0001 -> 0\.0002"):
        prepare_log_dir(tmp_path, "ask", other)
    prepare_log_dir(tmp_path, "resume", other)
    assert (tmp_path / "metrics.jsonl").exists()


def test_raise_refuses_even_the_same_settings(tmp_path: Path):
    make_run(tmp_path, Config())
    with pytest.raises(ConfigurationError, match="already holds a run"):
        prepare_log_dir(tmp_path, "raise", Config())


def test_delete_takes_the_run_and_nothing_else(tmp_path: Path):
    folder = tmp_path / "run"
    make_run(folder, Config())
    (folder / "iteration_000003").mkdir()
    (folder / "transcripts.html").write_text("")
    (folder / "metrics.jsonl.pre_resume_000001").write_text("")
    (folder / "notes.txt").write_text("mine")
    delete_run(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    prepare_log_dir(folder, "delete", Config())
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(("answers", "kept"), [(["nonsense", "resume"], True), (["delete"], False)])
def test_on_a_terminal_the_user_is_asked(tmp_path: Path, monkeypatch, answers: list[str], kept):
    make_run(tmp_path, Config())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: answers.pop(0))
    prepare_log_dir(tmp_path, "ask", Config(learning_rate=1.0))
    assert (tmp_path / "metrics.jsonl").exists() is kept
    assert not answers


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([], "interrupted; nothing is saved yet: the same command starts over"),
        ([{"name": "best_000004", "sampler_path": "tinker://s"}], "nothing is saved yet"),
        (
            [{"name": "000002", "state_path": "tinker://a"}, {"name": "best_000004"}],
            "interrupted; the same command resumes from checkpoint 000002",
        ),
        ([{"name": "final", "state_path": "tinker://a", "final": True}], "the run is complete"),
    ],
)
def test_what_an_interruption_means(tmp_path: Path, records: list[dict], line: str):
    with open_log_dir(tmp_path / "run", "ask") as folder:
        for record in records:
            append_row(folder / "checkpoints.jsonl", record)
        assert line in describe_interruption()


def test_a_failed_start_leaves_no_folder_and_an_old_run_stays(tmp_path: Path):
    def fail(folder: Path, *, steps: int) -> None:
        with open_log_dir(folder, "ask", Config()):
            JsonLogger(folder).log_hparams(Config())
            for step in range(steps):
                append_row(folder / "metrics.jsonl", {"step": step})
            raise ConfigurationError("no")

    with pytest.raises(ConfigurationError, match="no"):
        fail(tmp_path / "a" / "b", steps=0)
    assert list(tmp_path.iterdir()) == []
    for steps in (1, 0):  # the second time it holds a run
        with pytest.raises(ConfigurationError, match="no"):
            fail(tmp_path / "run", steps=steps)
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {
            "config.json",
            "metrics.jsonl",
        }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="no"):
        fail(tmp_path / "mine", steps=0)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_user_may_leave(tmp_path: Path, monkeypatch):
    make_run(tmp_path, Config())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "exit")
    with pytest.raises(ConfigurationError, match="is kept, as you asked"):
        prepare_log_dir(tmp_path, "ask", Config(learning_rate=1.0))


def test_a_file_as_log_path_is_refused(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        prepare_log_dir(path, "ask", Config())
    with pytest.raises(ConfigurationError, match="cannot be created"):
        prepare_log_dir(path / "below", "ask", Config())


def test_metrics_are_cut_at_the_step_a_run_resumes_at(tmp_path: Path):
    for step in range(5):
        append_row(tmp_path / "metrics.jsonl", {"step": step, "x": step / 3})
    old = (tmp_path / "metrics.jsonl").read_bytes()
    assert truncate_metrics(tmp_path, 3) == 2
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "metrics.jsonl.pre_resume_000003").read_bytes() == old
    assert truncate_metrics(tmp_path, 3) == 0


def test_samples_of_repeated_steps_are_dropped(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    rows = [{"prompt": "of a loop of one's own"}, *({"step": step} for step in (0, 3, 4))]
    for row in rows:
        append_row(path, row)
    truncate_metrics(tmp_path, 4)
    assert read_rows(path) == rows[:3]
    truncate_metrics(tmp_path, 0)
    assert read_rows(path) == rows[:1]


def test_the_default_folder_depends_on_the_settings_alone(monkeypatch):
    monkeypatch.setenv("TINKER_COOKBOOK_RUNS_DIR", "/runs")
    first = default_log_path("r", "My Data", config=Config())
    assert first.startswith("/runs/r/my-data-")
    assert first == default_log_path("r", "My Data", config=Config(save_every=1))
    assert first != default_log_path("r", "My Data", config=Config(learning_rate=1.0))
    assert runs_path("a", "b") == "/runs/a/b"
    monkeypatch.delenv("TINKER_COOKBOOK_RUNS_DIR")
    assert runs_path("a") == str(Path("~/tinker-runs/a").expanduser())


def test_a_damaged_config_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        prepare_log_dir(tmp_path, "ask", Config())
