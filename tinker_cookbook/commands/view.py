"""Show runs in a browser: curves, settings, samples, rollouts, evaluations and times.

The page is served on this machine until Ctrl-C, or written to one HTML file that works without a server.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinker_cookbook.commands.parts.run_pages import add_page_arguments, open_registry, show_page

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="folder to search for runs, or one run (default: the folder of all runs)",
    )
    add_page_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve or write the page."""
    from tinker_cookbook.viewer.answers import Answers

    return show_page(Answers(open_registry(args.folder)), args, shows_all=False)
