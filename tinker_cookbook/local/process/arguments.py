"""Options that both ways of starting a service share. Imports nothing of the service."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_operating_arguments"]


def add_operating_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options about the service's surroundings."""
    parser.add_argument(
        "--allowed-host",
        action="append",
        dest="allowed_hosts",
        metavar="NAME",
        help="a further name clients may use for the service, that of a proxy for example; repeat",
    )
    parser.add_argument(
        "--assets-dir",
        type=Path,
        metavar="DIR",
        help="folder of images that clients may point at instead of sending them (default: none)",
    )
    parser.add_argument(
        "--models-dir",
        action="append",
        type=Path,
        dest="model_dirs",
        metavar="DIR",
        help="folder under which clients may name any model folder; repeat",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="memory the service may hold (default: what the machine or container has free)",
    )
    parser.add_argument(
        "--spill-after",
        type=float,
        metavar="SECONDS",
        help="move runs and samplers unused for so long to the state folder (default: 600)",
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--log-mib",
        type=float,
        default=64.0,
        metavar="MIB",
        help="size of the log files; the oldest lines go first (default: %(default)g)",
    )
    parser.add_argument(
        "--keep-days",
        type=float,
        default=90.0,
        metavar="DAYS",
        help="forget sessions, runs without checkpoints and old logs after so long "
        "(default: %(default)g)",
    )
