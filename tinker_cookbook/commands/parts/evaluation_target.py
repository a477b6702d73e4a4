"""What `eval` evaluates: a checkpoint, a model, a folder with a model, or an endpoint."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.sampler_target import open_sampler
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.eval.endpoint import EndpointClient
    from tinker_cookbook.renderers import Renderer

__all__ = ["EvaluationTarget", "add_endpoint_arguments", "open_target"]


@dataclass(frozen=True)
class EvaluationTarget:
    """A model that is ready to be evaluated."""

    client: tinker.SamplingClient | EndpointClient
    renderer: Renderer
    name: str
    """Path of the checkpoint, name or folder of the model, or model and address."""
    model_with_files: str | None
    """Model whose files on this machine tell its context window; None for an endpoint."""


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an endpoint."""
    from tinker_cookbook.eval.endpoint import API_KEY_VARIABLE

    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="address of an OpenAI-compatible endpoint, such as http://HOST:PORT/v1; --model "
        "names the model there",
    )
    parser.add_argument(
        "--api-key-env",
        default=API_KEY_VARIABLE,
        metavar="VARIABLE",
        help="environment variable with the endpoint's key (default: %(default)s)",
    )


@contextlib.contextmanager
def open_target(args: argparse.Namespace) -> Iterator[EvaluationTarget]:
    """Open the endpoint, or connect to a service and open the checkpoint or model there.

    Raises:
        ConfigurationError: if it does not exist or cannot be sampled, or options do not fit.
    """
    if args.endpoint is not None:
        yield _open_endpoint(args)
        return
    words = argparse.Namespace(**vars(args))
    folder = Path(args.target or "").expanduser()
    if args.target and (folder / "config.json").is_file():
        words.target = str(folder.resolve())
        # A service that runs elsewhere does not see this folder.
        words.base_url = args.base_url or "local"
    with open_sampler(words) as opened:
        yield EvaluationTarget(
            opened.client, opened.renderer, opened.target, opened.client.get_base_model()
        )


def _open_endpoint(args: argparse.Namespace) -> EvaluationTarget:
    from tinker_cookbook.eval.endpoint import EndpointClient, endpoint_format

    if args.target is not None:
        raise ConfigurationError(
            f"PATH={args.target} and --endpoint={args.endpoint} are two models; give one of them. "
            "--model names the model of an endpoint, and --compare a second model."
        )
    if args.renderer is not None or args.base_url is not None:
        raise ConfigurationError(
            "--renderer and --base-url do not apply to --endpoint, which has its own chat format."
        )
    if args.model is None:
        raise ConfigurationError(
            f"--endpoint={args.endpoint} needs --model NAME; GET {args.endpoint}/models lists them."
        )
    client = EndpointClient(args.endpoint, args.model, args.api_key_env, args.timeout)
    print(f"endpoint {args.endpoint}\nmodel    {args.model}", flush=True)
    return EvaluationTarget(client, endpoint_format(), client.weights_name, None)
