"""Run the local service until it is stopped; every Tinker program can use it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.process.arguments import add_operating_arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        metavar="NAME_OR_FOLDER",
        help="model to serve; repeat the option for several (default: the small default model)",
    )
    parser.add_argument(
        "--plan",
        metavar="NAME_OR_FOLDER",
        help="print the memory that a model needs and its expected speed on this machine, and exit",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        help="port to listen on; 0 chooses a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s); an address that other machines can "
        "reach requires TINKER_API_KEY to be set",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="folder of checkpoints, index, key and logs (default: service in ~/.tinker-cookbook, "
        "or in $TINKER_COOKBOOK_HOME)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="torch device (default: the fastest available)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of the base weights (default: chosen for this machine)",
    )
    parser.add_argument(
        "--num-threads", type=int, metavar="N", help="threads for torch (default: all cores)"
    )
    add_operating_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    from tinker_cookbook.service.embedded import check_local_extra

    check_local_extra()
    if args.plan is not None:
        return _print_plan(args)
    from tinker_cookbook.local.process.launch import (
        build_settings,
        check_arguments,
        run_service,
    )
    from tinker_cookbook.local.process.models import check_model
    from tinker_cookbook.model_files import DEFAULT_MODEL, resolve_model_folder

    check_arguments(args)  # before anything is downloaded
    _check_device(args.device)
    # download missing weights, with progress, before the service starts
    for model in args.models or [DEFAULT_MODEL]:
        check_model(resolve_model_folder(model))
    return run_service(build_settings(args), verbose=True)


def _check_device(name: str | None) -> None:
    """Refuse a device that torch does not have on this machine.

    Raises:
        ConfigurationError: naming the device.
    """
    if name is None or name == "cpu":
        return  # nothing to check, so torch is not imported
    from tinker_cookbook.local.engine.model.devices import choose_device
    from tinker_cookbook.local.errors import UserError

    try:
        choose_device(name)
    except UserError as error:
        raise ConfigurationError(f"{error}; leave out --device, or use --device cpu") from error


def _print_plan(args: argparse.Namespace) -> int:
    from tinker_cookbook.local.plan import build_plan, describe_plan
    from tinker_cookbook.model_files import resolve_model_folder
    from tinker_cookbook.unembedding import choose_train_unembed

    folder = resolve_model_folder(args.plan, weights=False)
    unembed = choose_train_unembed(str(folder))  # what recipes train
    plan = build_plan(
        args.plan,
        folder,
        dtype=args.dtype,
        base_format=args.base_format,
        train_unembed=unembed,
    )
    print(describe_plan(plan))
    return 0
