"""Store a PEFT adapter as a checkpoint of the local service, to sample or to train further.

The adapter gets two paths: one continues training (load_checkpoint_path=...), the other samples.
Its rank, its scale and the adapted modules do not change. Services of this machine that use the
state folder need not be restarted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the adapter, as PEFT saves it")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="base model, as the service names it (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--name", default="imported", help="name of the checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--renderer", metavar="NAME", help="chat format that the adapter was trained with"
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        help="state folder of the service (default: the one of the services that recipes start)",
    )


def run(args: argparse.Namespace) -> int:
    """Import, and print the paths."""
    from tinker_cookbook import renderers
    from tinker_cookbook.commands.parts.adapter_import import import_adapter
    from tinker_cookbook.model_files import cookbook_home

    if args.renderer is not None:
        renderers.check_renderer_name(args.renderer)
    state_dir = args.state_dir or cookbook_home().resolve() / "service"
    found = import_adapter(
        args.folder, state_dir, model=args.model, name=args.name, renderer=args.renderer
    )
    print(f"adapter  rank {found.rank}, alpha {found.alpha:g}: {', '.join(found.modules)}")
    print(f"model    {found.model}")
    print(f"state    {found.state_path}  (to train it further: load_checkpoint_path=...)")
    print(f"weights  {found.sampler_path}  (tinker-cookbook chat PATH)")
    return 0
