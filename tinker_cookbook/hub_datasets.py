"""Tables of the Hugging Face hub, with a one-line error if the hub cannot be reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.model_files import hub_problem

if TYPE_CHECKING:
    import datasets

__all__ = ["check_hub_table", "describe_row", "load_hub_table"]

SHOWN_CHARACTERS = 60


def load_hub_table(
    path: str, name: str | None = None, split: str = "train", *, advice: str
) -> datasets.Dataset:
    """Load one split of a data set, from a local folder, the cache, or the hub.

    Args:
        path: A folder, or a hub id.
        name: Configuration of the data set.
        split: Split of the data set.
        advice: End of the error message: what to do without this data set.

    Raises:
        ConfigurationError: if it cannot be loaded.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    check_hub_table(path, advice=advice)
    try:
        table = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        problem = " ".join(str(error.__cause__ or error).split())
        raise _error(path, problem, advice) from error
    if not isinstance(table, datasets.Dataset):
        raise _error(path, f"split={split!r} is not a single split", advice)
    return table


def check_hub_table(path: str, *, advice: str) -> None:
    """Refuse, within seconds, a data set that is neither local nor on a reachable hub.

    The hub's own client retries for a minute if the hub does not answer.

    Raises:
        ConfigurationError: if it cannot be loaded; the message ends with `advice`.
    """
    problem = None if Path(path).exists() or _is_cached(path) else hub_problem(path, "dataset")
    if problem is not None:
        raise _error(path, problem, advice)


def describe_row(row: Mapping[str, object], *keys: str) -> str:
    """Return the keys of a row and the beginning of each value under `keys`, for an error."""
    shown = [f"{key}={repr(row[key])[:SHOWN_CHARACTERS]}" for key in row if key in keys]
    return ", ".join([f"has the keys {sorted(row)}", *shown])


def _error(path: str, problem: str, advice: str) -> ConfigurationError:
    done = "read" if Path(path).exists() else "fetched"
    return ConfigurationError(f"{path} cannot be {done}: {problem.rstrip('.')}. {advice}")


def _is_cached(path: str) -> bool:
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / path.replace("/", "___").lower()).is_dir()
