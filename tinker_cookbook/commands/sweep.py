"""Run a recipe with several values of its settings, on one service, and compare the results.

    tinker-cookbook sweep sl_basic learning_rate=1e-4,3e-4,1e-3 seed=0,1 max_steps=20
    tinker-cookbook sweep sl_basic learning_rate=1e-5..1e-2 --random 8 --parallel 2

Commas separate values, of which every combination is run; with --random N, N combinations are
drawn, and `low..high` is a range. The same command again continues: complete runs are skipped,
interrupted ones are resumed. It ends with a table and a page with the curves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.commands.parts.sweep_plan import SweepPlan

__all__ = ["add_arguments", "run"]

SWEEPS = "sweeps"
PLAN_FILE, PAGE_FILE = "sweep.json", "sweep.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or the file of one")
    parser.add_argument("settings", nargs="+", metavar="KEY=A,B,C", help="settings of the recipe")
    parser.add_argument(
        "--random", type=int, metavar="N", help="run N random combinations (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random combinations (default: %(default)s)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="K",
        help="number of runs at a time; they share the model (default: %(default)s)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder of the sweep (default: in ~/tinker-runs)"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="metric to compare (default: the held-out metric)"
    )
    parser.add_argument(
        "--best", choices=("min", "max"), help="which values are better (default: by the name)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the runs")


def run(args: argparse.Namespace) -> int:
    """Run the sweep; the status is 1 if a run failed."""
    from tinker_cookbook.commands.parts.sweep_plan import plan_sweep
    from tinker_cookbook.commands.parts.sweep_runs import find_module
    from tinker_cookbook.runs.directory import runs_path

    if args.parallel < 1:
        raise ConfigurationError(f"parallel={args.parallel} must be 1 or greater.")
    find_module(args.recipe)
    plan = plan_sweep(args.recipe, args.settings, num_random=args.random, seed=args.seed)
    folder = args.folder or Path(runs_path()) / SWEEPS / plan.default_name
    folder = folder.expanduser().resolve()
    print(f"sweep    {folder}\nruns     {len(plan.runs)}, {args.parallel} at a time", flush=True)
    if args.dry_run:
        print(*(f"  {' '.join(plan.words(each))}" for each in plan.runs), sep="\n")
        return 0
    return _run_plan(plan, folder, args)


def _run_plan(plan: SweepPlan, folder: Path, args: argparse.Namespace) -> int:
    from tinker_cookbook import service
    from tinker_cookbook.commands.parts.run_pages import write_page
    from tinker_cookbook.commands.parts.sweep_runs import describe_results, run_all
    from tinker_cookbook.runs import lock
    from tinker_cookbook.stores import LocalStorage, RunRegistry
    from tinker_cookbook.utils.durable_files import write_atomically
    from tinker_cookbook.viewer.answers import Answers

    if "base_url" in plan.axes or ("model_name" in plan.axes and _is_started_here(plan)):
        raise ConfigurationError(
            "the runs of a sweep share one service with one model; to compare models, start "
            "`tinker-cookbook serve` with all of them and set TINKER_BASE_URL."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with lock.hold(folder):
        about = {"recipe": plan.recipe, "fixed": plan.fixed, "axes": plan.axes}
        runs = [{"name": each.name, "settings": each.settings} for each in plan.runs]
        write_atomically(folder / PLAN_FILE, json.dumps({**about, "runs": runs}, indent=1) + "\n")
        registry = RunRegistry([LocalStorage(folder)])
        done = {each.run_id for each in registry.refresh() if each.status == "completed"}
        finished = []
        if any(each.name not in done for each in plan.runs):
            with service.connect(
                plan.fixed.get("base_url"), plan.fixed.get("model_name")
            ) as opened:
                print(opened.describe(), flush=True)
                finished = run_all(
                    plan,
                    folder,
                    opened,
                    num_parallel=args.parallel,
                    is_complete=lambda name: name in done,
                )
        lines = describe_results(registry, plan, metric=args.metric, direction=args.best)
        print("", *lines, "", sep="\n")
        write_page(Answers(registry), folder / PAGE_FILE)
    return int(any(each.status for each in finished))


def _is_started_here(plan: SweepPlan) -> bool:
    from tinker_cookbook import service

    return service.choose_service(plan.fixed.get("base_url")).kind == "local"
