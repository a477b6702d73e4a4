"""The weights that `sample` and `chat` sample from, and the chat format that fits them."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs import interrupts

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer
    from tinker_cookbook.service import Connection

__all__ = ["OpenSampler", "add_sampler_arguments", "open_sampler"]

SCHEME = "tinker://"
STARTS_A_SERVICE = (
    "starting that service, which takes most of the time; to skip this the next time, keep "
    "`tinker-cookbook serve` running in another terminal and set the variables that it prints"
)
_CHECKPOINT = re.compile(r"tinker://([^/\s]+)/(weights|sampler_weights)/[^/\s]+")


@dataclass(frozen=True)
class OpenSampler:
    """A model or checkpoint that is ready to sample."""

    connection: Connection
    client: tinker.SamplingClient
    renderer: Renderer
    target: str
    """Path of the checkpoint, or name of the model."""


def add_sampler_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Declare the options that say what to sample from and how."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="PATH",
        help="tinker://RUN/sampler_weights/NAME, or the name or folder of a model",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="base model of PATH, if the service does not know it"
    )
    parser.add_argument(
        "--renderer",
        metavar="NAME",
        help="chat format (default: the run's, or the recommended one of the model)",
    )
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="address of a Tinker service (default: the one that recipes choose)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="maximum tokens per answer (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )


@contextlib.contextmanager
def open_sampler(args: argparse.Namespace) -> Iterator[OpenSampler]:
    """Connect to a service, print which one, and open the checkpoint or model.

    Raises:
        ConfigurationError: if it does not exist, the service cannot sample it, or an option is
            out of range.
    """
    if args.max_tokens < 1:
        raise ConfigurationError(f"max_tokens={args.max_tokens} is too small; use 1 or more.")
    if not 0 <= args.temperature < math.inf:
        raise ConfigurationError(
            f"temperature={args.temperature} is out of range; use 0 (greedy) or more."
        )
    from tinker_cookbook import renderers, service

    if args.renderer is not None:
        renderers.check_renderer_name(args.renderer)
    checkpoint, model = _split_target(args.target, args.model)
    with service.connect(args.base_url, model, checkpoint=checkpoint) as connection:
        print(connection.describe(), flush=True)
        if connection.kind == "local":
            print(STARTS_A_SERVICE, flush=True)
        opened = _open(connection, checkpoint, args.renderer)
        interrupts.mark_begun()
        yield opened


def _split_target(target: str | None, model: str | None) -> tuple[str | None, str | None]:
    """Return the checkpoint, if the target names one, and the model to ask the service for."""
    if not (target or "").startswith(SCHEME):
        return None, target or model
    if not _CHECKPOINT.fullmatch(target or ""):
        raise ConfigurationError(
            f"PATH={target} is not a checkpoint that can be sampled; use "
            "tinker://RUN/sampler_weights/NAME, as the end of a run prints it."
        )
    return target, model


def _open(connection: Connection, checkpoint: str | None, renderer: str | None) -> OpenSampler:
    import tinker

    from tinker_cookbook import checkpoint_utils, model_info
    from tinker_cookbook.renderers import load_renderer
    from tinker_cookbook.utils.sdk_compat import service_message, wait_for_client

    client = connection.service_client()
    target = checkpoint or connection.model_name
    try:
        created = client.create_sampling_client(
            model_path=checkpoint, base_model=None if checkpoint else connection.model_name
        )
        _load_tokenizer(connection.model_name)
        sampler = wait_for_client(created)
        base_model = sampler.get_base_model()
    except (tinker.TinkerError, ValueError) as error:
        raise ConfigurationError(f"{target} cannot be sampled: {service_message(error)}") from error
    if renderer is None and checkpoint:
        renderer = checkpoint_utils.get_renderer_name_from_checkpoint(client, checkpoint)
    name = renderer or model_info.get_recommended_renderer_name(base_model)
    return OpenSampler(connection, sampler, load_renderer(name, base_model), target)


def _load_tokenizer(model_name: str) -> None:
    """Load the tokenizer while the service loads the model; the renderer then finds it loaded."""
    from tinker_cookbook import tokenizer_utils

    with contextlib.suppress(ConfigurationError):  # the renderer reports a clearer error
        tokenizer_utils.get_tokenizer(model_name)
