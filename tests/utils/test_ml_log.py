"""Loggers: files of a run, the console, Python's log, W&B only when asked for."""

import functools
import importlib.util
import json
import logging
from enum import Enum
from pathlib import Path

import chz
import numpy as np
import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils import ml_log


class Colour(Enum):
    RED = "red"


@chz.chz
class Inner:
    x: float = 0.5


@chz.chz
class Outer:
    inner: Inner = chz.field(default_factory=Inner)
    items: tuple[int, ...] = (1, 2)


class Plain:
    pass


def test_dump_config_is_json_and_the_same_in_every_process():
    dumped = ml_log.dump_config(
        {
            "chz": Outer(),
            "enum": Colour.RED,
            "path": Path("a/b"),
            "function": test_dump_config_is_json_and_the_same_in_every_process,
            "partial": functools.partial(int, base=2),
            "object": Plain(),
            "nan": float("nan"),
        }
    )
    json.dumps(dumped, allow_nan=False)
    assert dumped["chz"] == {"inner": {"x": 0.5}, "items": [1, 2]}
    assert dumped["enum"] == "red"
    assert dumped["path"] == "a/b"
    assert dumped["function"].endswith(
        "test_ml_log.test_dump_config_is_json_and_the_same_in_every_process"
    )
    assert dumped["partial"]["keywords"] == {"base": 2}
    assert "0x" not in dumped["object"]


def test_json_logger_writes_the_files_of_a_run(tmp_path: Path):
    logger = ml_log.JsonLogger(tmp_path / "run")
    logger.log_hparams(Outer())
    logger.log_metrics({"loss": np.float32(0.5), "bad": float("nan"), "n": 3}, step=7)
    logger.log_summary({"best": 1.0})
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 7, "loss": 0.5, "bad": None, "n": 3}, {"best": 1.0}]
    assert next(iter(rows[0])) == "step"
    config = (tmp_path / "run" / "config.json").read_text()
    assert json.loads(config) == {"inner": {"x": 0.5}, "items": [1, 2]}
    assert '\n  "inner"' in config
    assert (tmp_path / "run" / "code.diff").exists()


def test_setup_logging_writes_logs_and_prints_a_table(tmp_path: Path, capsys):
    logger = ml_log.setup_logging(str(tmp_path), config=Outer())
    try:
        logging.getLogger("some.module").info("hello")
        logging.getLogger("some.module").warning("careful")
        logger.log_metrics({"loss": 1.25, "n": 2}, step=3)
    finally:
        ml_log.release_logging_module()
    text = (tmp_path / "logs.log").read_text()
    assert "command: " in text.splitlines()[0]
    assert "hello" in text
    captured = capsys.readouterr()
    assert "Step 3" in captured.out
    assert "1.250000" in captured.out
    assert "careful" in captured.err
    assert "hello" not in captured.err


def test_logging_again_replaces_the_handlers(tmp_path: Path):
    before = len(logging.getLogger().handlers)
    ml_log.configure_logging_module(str(tmp_path / "a.log"))
    ml_log.configure_logging_module(str(tmp_path / "b.log"))
    assert len(logging.getLogger().handlers) == before + 2
    ml_log.release_logging_module()
    assert len(logging.getLogger().handlers) == before


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_asked_for_but_missing_names_the_package(tmp_path: Path):
    try:
        with pytest.raises(ConfigurationError, match="pip install wandb"):
            ml_log.setup_logging(str(tmp_path), wandb_project="p")
    finally:
        ml_log.release_logging_module()


def test_wandb_offline(tmp_path: Path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = ml_log.WandbLogger("project", Outer(), tmp_path, "name")
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.close()
    assert list(tmp_path.rglob("*.wandb"))


PACKAGES = {
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_logger_whose_package_is_missing_is_refused_with_the_command(name: str, tmp_path: Path):
    module, package = PACKAGES[name]
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    with pytest.raises(ConfigurationError, match=f"pip install {package}"):
        ml_log.setup_logging(str(tmp_path), loggers=name)
    assert not (tmp_path / "logs.log").exists()


def test_an_unknown_logger_is_refused_and_none_is_opened_unasked(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="Did you mean 'tensorboard'"):
        ml_log.setup_logging(str(tmp_path), loggers="tensorbord")
    assert ml_log.parse_loggers("mlflow, trackio,mlflow") == ["mlflow", "trackio"]
    assert ml_log.parse_loggers(None) == []
    logger = ml_log.setup_logging(str(tmp_path), do_configure_logging_module=False)
    assert isinstance(logger, ml_log.MultiplexLogger)
    assert [type(each).__name__ for each in logger.loggers] == ["JsonLogger", "PrettyPrintLogger"]
    assert logger.store is not None
    logger.log_metrics({"loss": np.float32(0.5)}, 3)
    assert logger.store.read_metrics() == [{"step": 3, "loss": 0.5}]


def log_two_steps(logger: ml_log.Logger) -> None:
    logger.log_metrics({"loss": 1.0, "text": "a", "test/nll": float("nan")}, step=0)
    logger.log_metrics({"loss": np.float64(0.5)}, step=1)
    logger.close()


def test_tensorboard_writes_event_files(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    logger = ml_log.setup_logging(
        str(tmp_path), config=Outer(), loggers="tensorboard", do_configure_logging_module=False
    )
    log_two_steps(logger)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_mlflow_stores_metrics_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    log_two_steps(ml_log.MlflowLogger("project", Outer(), "name"))
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "name"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 0.5]
    assert run.data.metrics == {"loss": 0.5}


def test_trackio_stores_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    log_two_steps(ml_log.TrackioLogger("project", Outer(), None, "name"))
    assert list(tmp_path.rglob("*project*"))
