"""`data=`: a file, a folder, a glob, or several of these with weights.

chat.jsonl    folder    'chats/*.parquet'    a.jsonl,b.parquet    a.jsonl:0.7,b.parquet:0.3
"""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.supervised.sources.containers import (
    DATA_SUFFIXES,
    TEXT_SUFFIXES,
    data_suffix,
)

__all__ = ["MAX_FILES", "DataPart", "data_name", "parse_data"]

MAX_FILES = 500
"""Maximum number of files: all stay open during a run, and a process can open about a thousand."""

_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")
_SPLIT = re.compile(r"(train|test|valid|validation|eval|dev)(?![a-z])", re.IGNORECASE)
# Files that Hugging Face `save_to_disk` writes next to the rows.
_NO_DATA = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class DataPart:
    """One of the places that `data=` names."""

    path: str
    weight: float | None
    files: tuple[Path, ...]
    """Its files in sorted order; one if the place is a file."""


def parse_data(data: str) -> list[DataPart]:
    """Read `data=` and find its files.

    Raises:
        ConfigurationError: weights that cannot be used.
        DataFormatError: a folder or glob without data files, or with too many.
    """
    parts = [_part(text, data) for text in _split(data)]
    weights = [part.weight for part in parts]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise ConfigurationError(
            f"data={data} has a weight at some places only; give one to every place "
            "(a.jsonl:0.7,b.jsonl:0.3), or to none."
        )
    return parts


def data_name(data: str) -> str:
    """Return a short name for `data=`, as part of a run's name."""
    names = []
    for text in _split(data):
        name = Path(_split_weight(text)[0]).name.partition(".")[0]
        names.append(re.sub(r"[^\w-]+", "_", name).strip("_") or "data")
    return "+".join(names)[:60]


def _split(data: str) -> list[str]:
    """Commas separate places, unless a file of the whole name exists."""
    if Path(data).expanduser().exists():
        return [data]
    texts = [text.strip() for text in data.split(",")]
    if not all(texts):
        raise ConfigurationError(
            f"data={data!r} names no file between two commas or at its end; use "
            "data=a.jsonl,b.parquet."
        )
    return texts


def _split_weight(text: str) -> tuple[str, float | None]:
    match = _WEIGHT.fullmatch(text)
    if match is None or Path(text).expanduser().exists():
        return text, None
    return match["path"], float(match["weight"])


def _part(text: str, data: str) -> DataPart:
    path, weight = _split_weight(text)
    if weight is not None and not (weight > 0 and math.isfinite(weight)):
        raise ConfigurationError(
            f"weight={weight:g} of {path} in data={data} is not above 0; give its share of the "
            "rows, as 0.7 or 70."
        )
    files = _files(path)
    if len(files) > MAX_FILES:
        raise DataFormatError(
            f"{path} has {len(files):,} data files, which all stay open during a run; join them "
            f"into at most {MAX_FILES}."
        )
    return DataPart(path, weight, tuple(files))


def _files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_of_folder(place)
    if place.exists() or not glob.has_magic(path):
        return [place]  # a missing file is refused when it is opened
    found = sorted(map(Path, glob.glob(str(place), recursive=True)))
    files = [file for file in found if file.is_file()]
    if not files:
        raise DataFormatError(f"{path} matches no file; see what `ls {path}` shows.")
    return files


def _files_of_folder(folder: Path) -> list[Path]:
    """Return the data files in a folder and its subfolders; text files only if there are no
    others."""
    everything = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    for suffixes in (DATA_SUFFIXES, TEXT_SUFFIXES):
        files = [p for p in everything if data_suffix(p) in suffixes and p.name not in _NO_DATA]
        if files:
            _refuse_several_splits(files, folder)
            return files
    listed = ", ".join(path.name for path in everything[:5]) or "nothing"
    raise DataFormatError(
        f"{folder} is a folder without data files (it has {listed}); they end with "
        f"{', '.join((*DATA_SUFFIXES, *TEXT_SUFFIXES))}, also with .gz or .zst behind."
    )


def _refuse_several_splits(files: list[Path], folder: Path) -> None:
    """Refuse a folder with several splits: training must not include the test rows."""
    found: dict[str, Path] = {}
    for path in files:
        for name in path.relative_to(folder).parts:
            if match := _SPLIT.match(name):
                found.setdefault(match.group(1).lower(), path)
    if "train" in found and len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found.values())
        raise DataFormatError(
            f"{folder} has files of several splits ({names}); name one with a glob, as "
            f"'{folder}/**/train*'."
        )
