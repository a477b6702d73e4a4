"""Run the local service as a separate process: `python -m tinker_cookbook.local --model NAME`.

The key is TINKER_API_KEY, or else the content of the file `key` in the state folder, which the
first start creates.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.local.process.arguments import add_operating_arguments
from tinker_cookbook.local.process.launch import build_settings, run_service

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m tinker_cookbook.local", description=__doc__)
    parser.add_argument("--model", action="append", metavar="NAME_OR_FOLDER", dest="models")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--num-threads", type=int)
    add_operating_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run_service(
            build_settings(args), ready_file=args.ready_file, parent_pid=args.parent_pid
        )
    except TinkerCookbookError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # skip the teardown of torch, which takes a second and has nothing to save
