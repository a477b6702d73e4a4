"""Python's log of a run: a file in the run directory, and warnings on the terminal."""

from __future__ import annotations

import logging
import shlex
import sys

from tinker_cookbook.utils.disk_errors import optional_file

__all__ = ["configure_logging_module", "release_logging_module"]

_LOG_FORMAT = "%(asctime)s %(name)s:%(lineno)d [%(levelname)s] %(message)s"


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
