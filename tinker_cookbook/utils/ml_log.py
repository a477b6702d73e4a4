"""Loggers of a run's metrics: files in the run directory, the terminal, and optional trackers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.stores.storage import LocalStorage
from tinker_cookbook.stores.training_store import TrainingRunStore
from tinker_cookbook.utils.code_state import code_state
from tinker_cookbook.utils.disk_errors import optional_file
from tinker_cookbook.utils.nearest_name import did_you_mean
from tinker_cookbook.utils.python_log import configure_logging_module, release_logging_module
from tinker_cookbook.utils.recipe_code import write_code
from tinker_cookbook.utils.run_files import CODE_DIFF_FILE, CONFIG_FILE, METRICS_FILE

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "JsonLogger",
    "Logger",
    "MlflowLogger",
    "MultiplexLogger",
    "PrettyPrintLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "configure_logging_module",
    "dump_config",
    "parse_loggers",
    "recording_recipe_config",
    "release_logging_module",
    "setup_logging",
]

RECIPE_SETTINGS = "recipe_settings"
"""Key of config.json: the settings that the recipe got, before it filled in the defaults."""
TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")
"""Names of the loggers that a run uses only if it is asked to."""
_MLFLOW_NAME = re.compile(r"[^\w\-. :/]")
Metrics = dict[str, Any]
"""Numbers by name; NumPy scalars are accepted."""


_recipe_config: object = None


@contextlib.contextmanager
def recording_recipe_config(config: object) -> Iterator[None]:
    """Record a recipe's own settings in every config.json that is written in the block."""
    global _recipe_config
    before, _recipe_config = _recipe_config, config
    try:
        yield
    finally:
        _recipe_config = before


def dump_config(config: object) -> Any:
    """Convert a config to values that JSON can represent.

    chz objects and dataclasses become objects of their fields; functions and classes become their
    import path; anything else unknown becomes its `repr`.
    """
    import chz

    if config is None or isinstance(config, bool | int | str):
        return config
    if isinstance(config, float):
        return config if math.isfinite(config) else repr(config)
    if isinstance(config, Enum):
        return dump_config(config.value)
    if isinstance(config, Mapping):
        return {str(key): dump_config(value) for key, value in config.items()}
    if isinstance(config, list | tuple | set | frozenset):
        return [dump_config(item) for item in config]
    if chz.is_chz(config) and not isinstance(config, type):
        fields = {name: getattr(config, name) for name in chz.chz_fields(config)}
        return {key: dump_config(value) for key, value in fields.items()}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: dump_config(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if callable(config) and hasattr(config, "__qualname__"):
        # Methods of built-in types have no module.
        return f"{getattr(config, '__module__', None) or 'builtins'}.{config.__qualname__}"
    if isinstance(config, functools.partial):
        call = {"args": config.args, "keywords": config.keywords}
        return dump_config({"partial": config.func, **call})
    if isinstance(config, Path):
        return str(config)
    # Without memory addresses, which would make every start look like a different config.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(config))


class Logger(ABC):
    """Records the configuration once and the metrics of every step."""

    @abstractmethod
    def log_hparams(self, config: object) -> None:
        """Record the configuration of the run."""

    @abstractmethod
    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        """Record the metrics of one step."""

    def enable_event_steps(self) -> None:  # noqa: B027
        """Prepare for `log_metrics_event`; call this before the first metrics."""

    def log_metrics_event(
        self,
        metrics: Metrics,
        step: int,
        step_metric: str,
        metric_axes: Mapping[str, str] | None = None,
    ) -> None:
        """Record metrics whose steps are not those of the run, or come in another order.

        Args:
            metrics: The metrics.
            step: Their step.
            step_metric: The metric that holds the step, such as `eval/step`.
            metric_axes: The step metrics of single metrics, if they differ.
        """
        del metric_axes  # only for loggers that draw
        self.log_metrics({**metrics, step_metric: step})

    def log_summary(self, metrics: Metrics) -> None:
        """Record metrics of the whole run."""
        self.log_metrics(metrics)

    def log_long_text(self, key: str, text: str) -> None:
        """Record text that is too long for a metric."""
        logging.getLogger(__name__).info("%s:\n%s", key, text)

    def sync(self) -> None:  # noqa: B027
        """Write buffered data."""

    def close(self) -> None:  # noqa: B027
        """Close the logger; nothing may be logged afterwards."""

    def get_logger_url(self) -> str | None:
        """Return the web page of the run; None if the logger has none."""
        return None

    @property
    def store(self) -> TrainingRunStore | None:
        """The files of the run; None if the logger writes none."""
        return None


class JsonLogger(Logger):
    """Writes config.json, code.json, code.diff and metrics.jsonl into a run directory.

    Args:
        log_dir: The run directory; created if it is missing.
        store: Writes the files; by default, into `log_dir`.
    """

    def __init__(self, log_dir: str | Path, store: TrainingRunStore | None = None) -> None:
        self.log_dir = Path(log_dir).expanduser()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._store = store or TrainingRunStore(LocalStorage(self.log_dir))

    @property
    def store(self) -> TrainingRunStore:
        """The files of the run."""
        return self._store

    def log_hparams(self, config: object) -> None:
        dumped = dump_config(config)
        if _recipe_config is not None and isinstance(dumped, dict):
            dumped |= {RECIPE_SETTINGS: dump_config(_recipe_config)}
        self._store.write_config(dumped)
        with optional_file(self.log_dir / CODE_DIFF_FILE):
            self._store.write_code_diff(code_state())
        write_code(self.log_dir)

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        self._store.write_metrics({k: _plain(v) for k, v in metrics.items()}, step)


class PrettyPrintLogger(Logger):
    """Prints the metrics of each step as an aligned table."""

    def log_hparams(self, config: object) -> None:
        print(json.dumps(dump_config(config), indent=2, ensure_ascii=False))

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        shown = {k: v for k, v in sorted(metrics.items()) if not k.endswith((":total", ":count"))}
        width = max(map(len, shown), default=0)
        print("Summary" if step is None else f"Step {step}")
        for key, value in shown.items():
            print(f"  {key:<{width}}  {f'{value:.6f}' if isinstance(value, float) else value}")


class WandbLogger(Logger):
    """Sends the metrics to Weights & Biases."""

    def __init__(
        self,
        project: str | None = None,
        config: object = None,
        log_dir: str | Path | None = None,
        wandb_name: str | None = None,
    ) -> None:
        wandb = _import("wandb", "wandb", f"wandb_project={project!r}")
        self._has_event_steps = False
        self._event_metrics: set[str] = set()
        self._run = wandb.init(
            project=project,
            name=wandb_name,
            dir=None if log_dir is None else str(log_dir),
            config=None if config is None else dump_config(config),
        )

    def log_hparams(self, config: object) -> None:
        self._run.config.update(dump_config(config), allow_val_change=True)

    def enable_event_steps(self) -> None:
        """Draw metrics over `step`, because W&B's own steps may not go back."""
        self._has_event_steps = True
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        plain = {k: _plain(v) for k, v in metrics.items()}
        if self._has_event_steps:
            self._run.log(plain if step is None else {**plain, "step": step})
        else:
            self._run.log(plain, step=step)

    def log_metrics_event(
        self,
        metrics: Metrics,
        step: int,
        step_metric: str,
        metric_axes: Mapping[str, str] | None = None,
    ) -> None:
        axes = dict.fromkeys(metrics, step_metric) | dict(metric_axes or {})
        for name, axis in axes.items():
            if name not in self._event_metrics:
                self._event_metrics.add(name)
                self._run.define_metric(axis)
                self._run.define_metric(name, step_metric=axis)
        self._run.log({**{k: _plain(v) for k, v in metrics.items()}, step_metric: step})

    def log_summary(self, metrics: Metrics) -> None:
        self._run.summary.update(metrics)

    def close(self) -> None:
        self._run.finish()

    def get_logger_url(self) -> str | None:
        return getattr(self._run, "url", None)


class TrackioLogger(Logger):
    """Writes the metrics to trackio, a local tracker with the interface of W&B."""

    def __init__(
        self,
        project: str | None = None,
        config: object = None,
        log_dir: str | Path | None = None,
        trackio_name: str | None = None,
    ) -> None:
        del log_dir  # trackio has one database for all runs
        self._trackio = _import("trackio", "trackio", "loggers=trackio")
        self._run = self._trackio.init(
            project=project or "tinker-cookbook",
            name=trackio_name,
            config=None if config is None else dump_config(config),
        )

    def log_hparams(self, config: object) -> None:
        self._run.config.update(dump_config(config))

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        self._trackio.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


class TensorBoardLogger(Logger):
    """Writes the metrics as event files into the folder `tensorboard` of the run directory."""

    def __init__(self, log_dir: str | Path) -> None:
        package = _import("tensorboardX", "tensorboardX", "loggers=tensorboard")
        self._writer = package.SummaryWriter(str(Path(log_dir).expanduser() / "tensorboard"))

    def log_hparams(self, config: object) -> None:
        text = json.dumps(dump_config(config), indent=2, ensure_ascii=False)
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text("config", indented)

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        for key, value in _numbers(metrics).items():
            self._writer.add_scalar(key, value, step)

    def log_long_text(self, key: str, text: str) -> None:
        self._writer.add_text(key, text)

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MlflowLogger(Logger):
    """Sends the metrics to MLflow; `MLFLOW_TRACKING_URI` names the server or folder."""

    def __init__(
        self, project: str | None = None, config: object = None, run_name: str | None = None
    ) -> None:
        mlflow = _import("mlflow", "mlflow-skinny", "loggers=mlflow")
        self._client = mlflow.MlflowClient()
        name = project or "tinker-cookbook"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment, run_name=run_name).info.run_id
        if config is not None:
            self.log_hparams(config)

    def log_hparams(self, config: object) -> None:
        self._client.log_dict(self._run_id, dump_config(config), CONFIG_FILE)

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        for key, value in _numbers(metrics).items():
            self._client.log_metric(self._run_id, _MLFLOW_NAME.sub("_", key), value, step=step)

    def log_long_text(self, key: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{_MLFLOW_NAME.sub('_', key)}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class MultiplexLogger(Logger):
    """Forwards everything to several loggers."""

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers

    def log_hparams(self, config: object) -> None:
        for logger in self.loggers:
            logger.log_hparams(config)

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def enable_event_steps(self) -> None:
        for logger in self.loggers:
            logger.enable_event_steps()

    def log_metrics_event(
        self,
        metrics: Metrics,
        step: int,
        step_metric: str,
        metric_axes: Mapping[str, str] | None = None,
    ) -> None:
        for logger in self.loggers:
            logger.log_metrics_event(metrics, step, step_metric, metric_axes)

    def log_summary(self, metrics: Metrics) -> None:
        for logger in self.loggers:
            logger.log_summary(metrics)

    def log_long_text(self, key: str, text: str) -> None:
        for logger in self.loggers:
            logger.log_long_text(key, text)

    def sync(self) -> None:
        for logger in self.loggers:
            logger.sync()

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def get_logger_url(self) -> str | None:
        return next(filter(None, (logger.get_logger_url() for logger in self.loggers)), None)

    @property
    def store(self) -> TrainingRunStore | None:
        return next((found for logger in self.loggers if (found := logger.store)), None)


def setup_logging(
    log_dir: str,
    wandb_project: str | None = None,
    wandb_name: str | None = None,
    config: object = None,
    do_configure_logging_module: bool = True,
    *,
    print_metrics: bool = True,
    loggers: str | None = None,
) -> Logger:
    """Open the loggers of a run.

    Args:
        log_dir: The run directory; created if missing.
        wandb_project: W&B project that also gets the metrics; None: W&B is not used.
        wandb_name: Name of the W&B run.
        config: Written to config.json.
        do_configure_logging_module: Whether to write Python's log to logs.log and the terminal.
        print_metrics: Whether to print each step's metrics as a table.
        loggers: Other loggers, separated by commas: `wandb`, `trackio`, `tensorboard`, `mlflow`.
            Their project and run are named by the two settings of W&B; by default by the recipe
            and the run directory.

    Raises:
        ConfigurationError: if a logger is unknown, or its package is not installed.
    """
    folder = Path(log_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    names = parse_loggers(loggers)
    if wandb_project and "wandb" not in names:
        names = ["wandb", *names]
    project = wandb_project or getattr(config, "recipe_name", None)
    run_name = wandb_name or (None if wandb_project else folder.name)
    trackers = [_open_tracker(name, folder, config, project, run_name) for name in names]
    if do_configure_logging_module:
        configure_logging_module(str(folder / "logs.log"))
    opened: list[Logger] = [JsonLogger(folder)]
    if print_metrics:
        opened.append(PrettyPrintLogger())
    if config is not None:
        opened[0].log_hparams(config)
    return MultiplexLogger([*opened, *trackers])


def parse_loggers(text: str | None) -> list[str]:
    """Return the names in a setting `loggers`, without repetitions.

    Raises:
        ConfigurationError: if a name is unknown.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise ConfigurationError(
                f"loggers={text} contains {name}, which is unknown.{did_you_mean(name, TRACKERS)} "
                f"Use {', '.join(TRACKERS)}, separated by commas; metrics.jsonl is always written."
            )
    return list(dict.fromkeys(names))


def _open_tracker(
    name: str, folder: Path, config: object, project: str | None, run_name: str | None
) -> Logger:
    if name == "wandb":
        return WandbLogger(project, config, folder, run_name)
    if name == "trackio":
        return TrackioLogger(project, config, folder, run_name)
    if name == "mlflow":
        return MlflowLogger(project, config, run_name)
    opened = TensorBoardLogger(folder)
    if config is not None:
        opened.log_hparams(config)
    return opened


def _import(module: str, package: str, asked: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigurationError: if it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        setting = asked.partition("=")[0]
        raise ConfigurationError(
            f"{asked} needs the package {package}, which is not installed. "
            f"Run `pip install {package}`, or leave {setting} out."
        ) from error


def _numbers(metrics: Metrics) -> dict[str, float]:
    """Return the metrics that are finite numbers."""
    plain = {key: _plain(value) for key, value in metrics.items()}
    return {key: float(v) for key, v in plain.items() if isinstance(v, int | float)}


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python ones, and numbers that JSON cannot represent to null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
