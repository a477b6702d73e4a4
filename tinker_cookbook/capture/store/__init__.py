"""Where recorded calls are kept: a file of JSON lines, or an SQLite database."""

from tinker_cookbook.capture.store.database import CallDatabase
from tinker_cookbook.capture.store.files import CallLog
from tinker_cookbook.capture.store.reading import CallStore, open_calls, read_calls

__all__ = ["CallDatabase", "CallLog", "CallStore", "open_calls", "read_calls"]
