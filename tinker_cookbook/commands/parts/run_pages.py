"""What `view`, `runs compare` and `sweep` share: find runs, and show them on a page."""

from __future__ import annotations

import argparse
import contextlib
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.byte_sizes import format_bytes

if TYPE_CHECKING:
    from tinker_cookbook.stores import RunRegistry
    from tinker_cookbook.viewer.answers import Answers

__all__ = ["add_page_arguments", "open_registry", "show_page", "write_page"]

LOOPBACK = "127.0.0.1"


def add_page_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a page."""
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write the page with its data to this file, and stop",
    )
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="port to listen on (default: a free one)"
    )
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        metavar="ADDRESS",
        help="address to listen on; another one than the default lets everyone who can reach it "
        "read the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="only print the address; open no browser"
    )


def open_registry(folder: Path | str | None) -> RunRegistry:
    """Return the runs in a folder; by default in the folder of all runs.

    Raises:
        ConfigurationError: if the folder does not exist.
    """
    from tinker_cookbook.runs.directory import runs_path
    from tinker_cookbook.stores import LocalStorage, RunRegistry, storage_from_uri

    if folder is not None and "://" in str(folder).replace(":/", "://", 1):
        return RunRegistry([storage_from_uri(str(folder).replace(":/", "://", 1))])
    chosen = Path(folder or runs_path()).expanduser()
    if folder is not None and not chosen.is_dir():
        raise ConfigurationError(f"folder={folder} does not exist; give a folder with runs.")
    return RunRegistry([LocalStorage(chosen, mkdir=False)])


def show_page(answers: Answers, args: argparse.Namespace, *, shows_all: bool) -> int:
    """Write the page to a file, or serve it until Ctrl-C.

    Args:
        answers: Answers about the runs.
        args: The values of `add_page_arguments`.
        shows_all: Whether all runs are shown at first, not only the newest.
    """
    if args.html is not None:
        write_page(answers, args.html)
        return 0
    from tinker_cookbook.viewer.server import open_server

    server = open_server(answers, host=args.host, port=args.port, shows_all=shows_all)
    address = f"http://{args.host}:{server.server_address[1]}/"
    print(f"view     {address}\nCtrl-C ends it.", flush=True)
    if not args.no_browser:
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(address)
    with server:
        server.serve_forever()
    return 0


def write_page(answers: Answers, path: Path) -> None:
    """Write the page of some runs to one file."""
    from tinker_cookbook.utils.durable_files import write_atomically
    from tinker_cookbook.viewer.page import build_saved_page, collect_data

    target = path.expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    text = build_saved_page(collect_data(answers))
    write_atomically(target, text)
    print(f"wrote    {target}  ({format_bytes(len(text.encode()))})")
