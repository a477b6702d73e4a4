"""Read runs back, also while they are written: their folders, metrics, checkpoints and rollouts.

`RunRegistry` finds the runs below a folder; `TrainingRunStore` reads and writes the files of one
run; `storage` holds the places where these files can be.
"""

from tinker_cookbook.stores._incremental import IncrementalReader
from tinker_cookbook.stores.registry import RunInfo, RunRegistry
from tinker_cookbook.stores.storage import (
    AsyncStorage,
    FsspecStorage,
    LocalStorage,
    Storage,
    StorageStat,
    storage_from_uri,
    storage_join,
)
from tinker_cookbook.stores.training_store import TrainingRunStore

__all__ = [
    "AsyncStorage",
    "FsspecStorage",
    "IncrementalReader",
    "LocalStorage",
    "RunInfo",
    "RunRegistry",
    "Storage",
    "StorageStat",
    "TrainingRunStore",
    "storage_from_uri",
    "storage_join",
]
