"""Options that both ways to start a service share. This module imports nothing of the service."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_operating_arguments"]


def add_operating_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for operating a service: hosts, folders, memory, logs."""
    parser.add_argument(
        "--base-format",
        metavar="FORMAT",
        help="how base weights are stored: full, or quantised to int8 or int4 to save memory "
        "(default: $TINKER_COOKBOOK_BASE_FORMAT, or full)",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        dest="allowed_hosts",
        metavar="NAME",
        help="host name that clients may use, such as the name of a proxy; repeatable",
    )
    parser.add_argument(
        "--assets-dir",
        type=Path,
        metavar="DIR",
        help="folder with images that clients may point at instead of sending them (default: none)",
    )
    parser.add_argument(
        "--models-dir",
        action="append",
        type=Path,
        dest="model_dirs",
        metavar="DIR",
        help="folder in which clients may use any model folder; repeatable",
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        metavar="GIB",
        help="maximum memory of the service (default: the free memory of the machine or container)",
    )
    parser.add_argument(
        "--spill-after",
        type=float,
        metavar="SECONDS",
        help="move runs and samplers that were unused for this time to the state folder "
        "(default: 600)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of the log (default: %(default)s)",
    )
    parser.add_argument(
        "--log-mib",
        type=float,
        default=64.0,
        metavar="MIB",
        help="maximum size of the log files; the oldest lines are removed first "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--keep-days",
        type=float,
        default=90.0,
        metavar="DAYS",
        help="remove sessions, runs without checkpoints and logs after this time "
        "(default: %(default)g)",
    )
