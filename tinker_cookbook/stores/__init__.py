"""Read and write runs, also while others write them: folders, metrics, checkpoints, rollouts.

`RunRegistry` finds the runs below a folder; `TrainingRunStore` reads and writes the files of one
run; `EvalStore` those of evaluations; `storage` holds the places where these files can
be.

The train loops write through `training_store`, which is in a lower layer than the registry; so the
names here are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_cookbook.stores._incremental import IncrementalReader
    from tinker_cookbook.stores.eval_store import EvalStore, RunMetadata
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
    "EvalStore",
    "FsspecStorage",
    "IncrementalReader",
    "LocalStorage",
    "RunInfo",
    "RunMetadata",
    "RunRegistry",
    "Storage",
    "StorageStat",
    "TrainingRunStore",
    "storage_from_uri",
    "storage_join",
]

_MODULES = {
    "_incremental": ("IncrementalReader",),
    "eval_store": ("EvalStore", "RunMetadata"),
    "registry": ("RunInfo", "RunRegistry"),
    "storage": (
        *("AsyncStorage", "FsspecStorage", "LocalStorage", "Storage", "StorageStat"),
        *("storage_from_uri", "storage_join"),
    ),
    "training_store": ("TrainingRunStore",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
