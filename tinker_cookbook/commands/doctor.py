"""Check this machine: what recipes will use, what is missing, and how to add it.

Ends with status 1 if a recipe could not run. The last check trains a tiny model for one step
through a local service. Keys are never printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from tinker_cookbook.utils.terminal_text import escape_controls

if TYPE_CHECKING:
    from tinker_cookbook.commands.parts.machine_checks import Check

__all__ = ["add_arguments", "run"]

EXIT_MISSING = 1
NAME_WIDTH = 11
MARKS = {"ok": "ok", "note": "note", "missing": "MISSING"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--no-self-test", action="store_true", help="do not start a local service")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    """Print each check when it is done; return 1 if a recipe could not run."""
    checks = []
    for check in _checks(args):
        checks.append(check)
        if not args.json:
            print(_describe(check), flush=True)
    missing = [check for check in checks if check.state == "missing"]
    if args.json:
        print(json.dumps({"checks": [asdict(c) for c in checks], "ready": not missing}, indent=1))
    else:
        names = ", ".join(check.name for check in missing)
        print(f"\nA recipe cannot run: {names}." if missing else "\nRecipes can run.")
    return EXIT_MISSING if missing else 0


def _checks(args: argparse.Namespace) -> Iterator[Check]:
    from tinker_cookbook.commands.parts.machine_checks import check_machine, check_self_test

    has_local = False
    for check in check_machine():
        has_local = has_local or check.name == "compiler"
        yield check
    if has_local and not args.no_self_test:
        yield check_self_test()


def _describe(check: Check) -> str:
    line = f"{check.name:<{NAME_WIDTH}}{MARKS[check.state]:<9}{escape_controls(check.text)}"
    if check.fix is None:
        return line
    return f"{line}\n{'':<{NAME_WIDTH + 9}}-> {check.fix}"
