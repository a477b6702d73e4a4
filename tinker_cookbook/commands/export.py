"""Write a checkpoint as a model folder that other tools load."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.byte_sizes import format_bytes

if TYPE_CHECKING:
    from tinker_cookbook.service import Connection

__all__ = ["add_arguments", "run"]

FORMS = ("adapter", "merged")
DTYPES = ("bfloat16", "float16", "float32")
MAX_KL = 0.01
"""Nats per token. Rounding weights to bfloat16 costs about 0.0003."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", metavar="PATH", help="tinker://RUN/sampler_weights/NAME")
    parser.add_argument("folder", metavar="FOLDER", help="folder to create")
    parser.add_argument(
        "--as",
        dest="form",
        choices=FORMS,
        default="merged",
        help="merged: a full model; adapter: a PEFT adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="number format of a merged model (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="base model; default: the one that the service names"
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="Tinker service that has the checkpoint; default: as the recipes choose",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the result with the service on sampled tokens; exit with 1 above --max-kl",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        default=MAX_KL,
        metavar="NATS",
        help="largest KL divergence that --check accepts, per token (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, and compare if asked."""
    from tinker_cookbook import service

    if not args.checkpoint.startswith("tinker://"):
        raise ConfigurationError(
            f"PATH={args.checkpoint} must begin with tinker://, e.g. "
            "tinker://RUN/sampler_weights/final."
        )
    with service.connect(args.base_url) as connection:
        model = args.model or connection.model_of(args.checkpoint)
        _export(args, connection, model)
        print(f"{args.form:<8} {args.folder}")
        num_bytes = sum(path.stat().st_size for path in Path(args.folder).iterdir())
        print(f"size     {format_bytes(num_bytes)}")
        return _check(args, connection, model) if args.check else 0


def _export(args: argparse.Namespace, connection: Connection, model: str) -> None:
    from tinker_cookbook.weights import build_hf_model, build_lora_adapter, download

    with tempfile.TemporaryDirectory(prefix="tinker-export-") as scratch:
        adapter = download(
            tinker_path=args.checkpoint,
            output_dir=str(Path(scratch) / "adapter"),
            base_url=connection.base_url,
        )
        if args.form == "adapter":
            build_lora_adapter(base_model=model, adapter_path=adapter, output_path=args.folder)
        else:
            build_hf_model(
                base_model=model, adapter_path=adapter, output_path=args.folder, dtype=args.dtype
            )


def _check(args: argparse.Namespace, connection: Connection, model: str) -> int:
    from tinker_cookbook.model_files import resolve_model_folder
    from tinker_cookbook.utils.sdk_compat import wait_for_client
    from tinker_cookbook.weights.verify import compare_with_service

    sampler = args.checkpoint.replace("/weights/", "/sampler_weights/")
    client = wait_for_client(connection.service_client().create_sampling_client(model_path=sampler))
    found = compare_with_service(client, args.folder, resolve_model_folder(model))
    verdict = "ok" if found.kl <= args.max_kl else f"above {args.max_kl}"
    print(
        f"check    KL(service, export) = {found.kl:.2e} nats per token, {verdict}; largest "
        f"difference {found.max_difference:.2e} nats ({found.num_tokens} tokens)"
    )
    return 0 if found.kl <= args.max_kl else 1
