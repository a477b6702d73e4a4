"""List the runs of this machine, show one, or compare several.

A RUN is the path of a run below the folder of runs, a part of that path that fits only one run, or
the folder of a run anywhere. `list` is the default action.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.run_pages import add_page_arguments, open_registry
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.stores import RunInfo, RunRegistry

__all__ = ["add_arguments", "run"]

SHOWN_RUNS = 20
STATES = ("running", "completed", "failed")
NAMED_RUNS = 5
"""Number of runs that an error about an ambiguous name lists."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    _add_common(parser, default=None)
    _add_list_options(parser)
    parser.set_defaults(action="list")
    actions = parser.add_subparsers(metavar="ACTION")
    shared: dict[str, str] = {"default": argparse.SUPPRESS}
    listing = actions.add_parser("list", help="list the newest runs")
    showing = actions.add_parser("show", help="settings, metrics and checkpoints of a run")
    showing.add_argument("run", metavar="RUN")
    comparing = actions.add_parser("diff", help="settings, code and metrics that differ")
    comparing.add_argument("old", metavar="A", help="a RUN")
    comparing.add_argument("new", metavar="B", help="another RUN")
    paging = actions.add_parser("compare", help="a page with the curves and settings of runs")
    paging.add_argument("runs", nargs="+", metavar="RUN")
    add_page_arguments(paging)
    parsers = {"list": listing, "show": showing, "diff": comparing, "compare": paging}
    for name, action in parsers.items():
        _add_common(action, **shared)
        action.set_defaults(action=name)
    _add_list_options(listing, **shared)
    for action in (showing, comparing):
        action.add_argument(
            "--metric",
            metavar="START",
            help="report all metrics that start with this text (default: all except times)",
        )


def run(args: argparse.Namespace) -> int:
    """Print what was asked for."""
    registry = open_registry(args.folder)
    if args.action == "compare":
        return _compare(registry, args)
    report = {"list": _list, "show": _show, "diff": _diff}[args.action](registry, args)
    registry.save()
    if args.json:
        print(json.dumps(report[0], indent=1))
    else:
        print("\n".join(report[1]))
    return 0


def _add_common(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=default,
        metavar="DIR",
        help="folder to search for runs (default: the folder of all runs)",
    )
    parser.add_argument(
        "--json", action="store_true", default=default or False, help="print JSON for programs"
    )


def _add_list_options(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--limit",
        type=int,
        default=default or SHOWN_RUNS,
        metavar="N",
        help=f"maximum number of newest runs; 0: all (default: {SHOWN_RUNS})",
    )
    parser.add_argument("--state", choices=STATES, default=default, help="only runs in this state")
    parser.add_argument("--recipe", default=default, metavar="NAME", help="only runs of a recipe")


Report = tuple[object, list[str]]
"""An object for programs, and lines for people."""


def _list(registry: RunRegistry, args: argparse.Namespace) -> Report:
    from tinker_cookbook.commands.parts import run_reports

    if args.limit < 0:
        raise ConfigurationError(f"limit={args.limit} must be 0 or greater; 0 lists all runs.")
    runs = [run for run in registry.refresh() if _is_asked_for(run, args)]
    shown = runs[: args.limit or None]
    rows = [run_reports.list_row(registry, run) for run in shown]
    if not rows:
        where = registry.primary_storage.url()
        return rows, [f"No run in {where} is in this list; recipes write their runs there."]
    lines = run_reports.describe_list(rows)
    if len(shown) < len(runs):
        lines.append(f"... and {len(runs) - len(shown)} older runs; --limit 0 lists all")
    return rows, lines


def _is_asked_for(run: RunInfo, args: argparse.Namespace) -> bool:
    return args.state in (None, run.status) and args.recipe in (None, run.facts.recipe)


def _show(registry: RunRegistry, args: argparse.Namespace) -> Report:
    from tinker_cookbook.commands.parts import run_reports

    owner, found = _find(registry, args.run)
    report = run_reports.run_object(owner, found, args.metric)
    return report, run_reports.describe_run(report)


def _diff(registry: RunRegistry, args: argparse.Namespace) -> Report:
    from tinker_cookbook.commands.parts import run_reports

    found = [_find(registry, name) for name in (args.old, args.new)]
    stores = [owner.get_training_store(run.run_id) for owner, run in found]
    names = [store.url() for store in stores]
    report = run_reports.compare_runs(stores[0], stores[1], args.metric)
    report = {"runs": names, **report}
    return report, run_reports.describe_comparison(names, report)


def _compare(registry: RunRegistry, args: argparse.Namespace) -> int:
    """Show a page with the runs that were named, wherever they are."""
    from tinker_cookbook.commands.parts.run_pages import show_page
    from tinker_cookbook.stores import RunRegistry
    from tinker_cookbook.viewer.answers import Answers

    found = [_find(registry, name) for name in args.runs]
    storages = {owner.primary_storage.url(): owner.primary_storage for owner, _ in found}
    wanted = {owner.get_training_store(run.run_id).url() for owner, run in found}
    joined = RunRegistry(list(storages.values()))
    # A run may be in two of the storages: in a folder of runs, and named by its own folder.
    by_url = {joined.get_training_store(run.run_id).url(): run.run_id for run in joined.refresh()}
    only = [run for url, run in by_url.items() if url in wanted]
    return show_page(Answers(joined, only), args, shows_all=True)


def _find(registry: RunRegistry, name: str) -> tuple[RunRegistry, RunInfo]:
    """Find a run by its path, a part of it, or its folder."""
    runs = registry.get_runs()
    exact = [run for run in runs if run.run_id == name.strip("/")]
    found = exact or [run for run in runs if name in run.run_id]
    if not exact and Path(name).expanduser().is_dir():
        registry = open_registry(Path(name))
        found = registry.get_runs()
    if len(found) == 1:
        return registry, found[0]
    if not found:
        where = registry.primary_storage.url()
        raise ConfigurationError(
            f"RUN={name} is not in {where}; `tinker-cookbook runs` lists the runs, and a folder "
            "is accepted too."
        )
    names = ", ".join(run.run_id for run in found[:NAMED_RUNS])
    more = ", ..." if len(found) > NAMED_RUNS else ""
    raise ConfigurationError(
        f"RUN={name} fits {len(found)} runs ({names}{more}); give one of them."
    )
