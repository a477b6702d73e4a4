"""Stored evaluations for the page: those of an `EvalStore` and of `tinker-cookbook eval`."""

from __future__ import annotations

import json

from tinker_cookbook.stores.registry import RunRegistry
from tinker_cookbook.stores.storage import Storage, storage_join
from tinker_cookbook.utils.jsonl_log import Row

__all__ = ["read_evaluations"]

FOLDER, SUMMARY_FILE, METADATA_FILE = "eval", "summary.json", "metadata.json"
SHOWN = ("score", "num_examples", "num_correct", "num_errors", "num_truncated", "standard_error")


def read_evaluations(registry: RunRegistry) -> list[Row]:
    """Return one row for each benchmark of each evaluation: its name, model, and numbers."""
    storage = registry.primary_storage
    places = [storage_join(FOLDER, name) for name in storage.list_dir(FOLDER)]
    places += [
        storage_join(prefix, "runs", name)
        for prefix in registry.eval_prefixes
        for name in storage.list_dir(storage_join(prefix, "runs"))
    ]
    return [row for place in places for row in _rows(storage, place)]


def _rows(storage: Storage, place: str) -> list[Row]:
    metadata = _read_object(storage, storage_join(place, METADATA_FILE))
    found = []
    for benchmark, result in _read_object(storage, storage_join(place, SUMMARY_FILE)).items():
        if not isinstance(result, dict):
            continue
        numbers = {key: result[key] for key in SHOWN if isinstance(result.get(key), int | float)}
        name = place.rpartition("/")[2]
        model = metadata.get("model_name")
        found.append({"name": name, "model": model, "benchmark": benchmark, "numbers": numbers})
    return found


def _read_object(storage: Storage, path: str) -> Row:
    try:
        value = json.loads(storage.read(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
