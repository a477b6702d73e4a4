"""Loggers of a run's metrics: files in the run directory, the terminal, and optionally W&B."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import re
import shlex
import sys
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
from tinker_cookbook.utils.recipe_code import write_code
from tinker_cookbook.utils.run_files import CODE_DIFF_FILE, CONFIG_FILE, METRICS_FILE

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "JsonLogger",
    "Logger",
    "MultiplexLogger",
    "PrettyPrintLogger",
    "WandbLogger",
    "configure_logging_module",
    "dump_config",
    "recording_recipe_config",
    "release_logging_module",
    "setup_logging",
]

RECIPE_SETTINGS = "recipe_settings"
"""Key of config.json: the settings that the recipe got, before it filled in the defaults."""
Metrics = dict[str, Any]
"""Numbers by name; NumPy scalars are accepted."""
_LOG_FORMAT = "%(asctime)s %(name)s:%(lineno)d [%(levelname)s] %(message)s"


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
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                f"wandb_project={project!r} needs the package wandb, which is not installed. "
                "Run `pip install wandb`, or leave wandb_project out."
            ) from error
        self._run = wandb.init(
            project=project,
            name=wandb_name,
            dir=None if log_dir is None else str(log_dir),
            config=None if config is None else dump_config(config),
        )

    def log_hparams(self, config: object) -> None:
        self._run.config.update(dump_config(config), allow_val_change=True)

    def log_metrics(self, metrics: Metrics, step: int | None = None) -> None:
        self._run.log({k: _plain(v) for k, v in metrics.items()}, step=step)

    def log_summary(self, metrics: Metrics) -> None:
        self._run.summary.update(metrics)

    def close(self) -> None:
        self._run.finish()

    def get_logger_url(self) -> str | None:
        return getattr(self._run, "url", None)


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
) -> Logger:
    """Open the loggers of a run.

    Args:
        log_dir: The run directory; created if missing.
        wandb_project: W&B project that also gets the metrics; None: W&B is not used.
        wandb_name: Name of the W&B run.
        config: Written to config.json.
        do_configure_logging_module: Whether to write Python's log to logs.log and the terminal.
        print_metrics: Whether to print each step's metrics as a table.

    Raises:
        ConfigurationError: if W&B is requested and not installed.
    """
    folder = Path(log_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    wandb = WandbLogger(wandb_project, config, folder, wandb_name) if wandb_project else None
    if do_configure_logging_module:
        configure_logging_module(str(folder / "logs.log"))
    loggers: list[Logger] = [JsonLogger(folder)]
    if print_metrics:
        loggers.append(PrettyPrintLogger())
    if wandb is not None:
        loggers.append(wandb)
    logger = MultiplexLogger(loggers)
    if config is not None:
        loggers[0].log_hparams(config)
    return logger


def configure_logging_module(path: str, level: int = logging.INFO) -> logging.Logger:
    """Write Python's log to a file, and warnings and errors to the terminal.

    A second call replaces the handlers of the first. The first line of each session in the file is
    the command line.
    """
    root = logging.getLogger()
    release_logging_module()
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(max(level, logging.WARNING))
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handlers: list[logging.Handler] = [console]
    with optional_file(path):
        file_handler = _LogFile(path, encoding="utf-8")
        file_handler.setLevel(level)
        file_handler.setFormatter(logging.Formatter(_LOG_FORMAT))
        handlers.insert(0, file_handler)
    for handler in handlers:
        handler.set_name(_HANDLER_NAME)
        root.addHandler(handler)
    root.setLevel(min(root.level or level, level))
    logging.getLogger("httpx").setLevel(logging.WARNING)
    root.info("command: %s", shlex.join(sys.orig_argv))
    return root


_HANDLER_NAME = "tinker_cookbook"


class _LogFile(logging.FileHandler):
    """An optional log file: if it cannot be written, one warning is printed and no traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._say_once(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # closing tries to write the rest once more
            self._say_once(error)

    def _say_once(self, error: OSError) -> None:
        if not getattr(self, "_has_failed", False):
            self._has_failed = True
            reason = f"{error.strerror}; the run continues"
            print(f"WARNING: {self.baseFilename} cannot be written: {reason}", file=sys.stderr)


def release_logging_module() -> None:
    """Remove the handlers that `configure_logging_module` added."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if h.get_name() == _HANDLER_NAME]:
        root.removeHandler(handler)
        handler.close()


def _plain(value: Any) -> Any:
    """Convert NumPy scalars to Python ones, and numbers that JSON cannot represent to null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
