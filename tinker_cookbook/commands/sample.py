"""Sample from a checkpoint that a run has saved, or from a base model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.sampler_target import (
    OpenSampler,
    add_sampler_arguments,
    open_sampler,
)
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers.types import ContentPart, Message

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_sampler_arguments(parser, max_tokens=100)
    parser.add_argument(
        "--prompt",
        default="How is the weather out there?",
        metavar="TEXT",
        help="user message (default: %(default)s)",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image before the prompt, for vision models; repeat the option for several images",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="N",
        help="number of answers (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the answers."""
    if args.num_samples < 1:
        raise ConfigurationError(f"num_samples={args.num_samples} is too small; use 1 or more.")
    with open_sampler(args) as opened:
        for answer in _sample(opened, args):
            print(f"\n> {args.prompt}\n{answer}")
    return 0


def _question(args: argparse.Namespace) -> Message:
    if not args.image:
        return {"role": "user", "content": args.prompt}
    parts: list[ContentPart] = [{"type": "image", "image": path} for path in args.image]
    return {"role": "user", "content": [*parts, {"type": "text", "text": args.prompt}]}


def _check_reads_images(opened: OpenSampler) -> None:
    """Refuse `--image` if the renderer cannot write images; name one that can.

    Raises:
        ConfigurationError: if the renderer cannot write images.
    """
    if opened.renderer.writes_images:
        return
    from tinker_cookbook.renderers import find_image_renderer_names

    used, model = opened.renderer._renderer_name, opened.renderer._model_name
    reads_images = opened.renderer._has_image_processor
    names = find_image_renderer_names(model) if model and reads_images else []
    if names:
        others = f" (also {', '.join(names[1:])})" if names[1:] else ""
        raise ConfigurationError(
            f"renderer={used} cannot write images. For {model} use --renderer {names[0]}{others}."
        )
    if reads_images:
        raise ConfigurationError(
            f"model={model} reads images, but no renderer writes them in its format; leave out "
            "--image."
        )
    raise ConfigurationError(
        f"model={model} does not read images; leave out --image, or name a vision model."
    )


def _sample(opened: OpenSampler, args: argparse.Namespace) -> list[str]:
    import tinker

    from tinker_cookbook.renderers import get_text_content
    from tinker_cookbook.utils.sdk_compat import service_message

    if args.image:
        _check_reads_images(opened)
    renderer = opened.renderer
    params = tinker.SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stop=renderer.get_stop_sequences(),
    )
    prompt = renderer.build_generation_prompt([_question(args)])
    try:
        result = opened.client.sample(prompt, args.num_samples, params).result()
    except (tinker.TinkerError, ValueError) as error:
        raise ConfigurationError(
            f"{opened.target} cannot be sampled: {service_message(error)}"
        ) from error
    messages = [renderer.parse_response(sequence.tokens)[0] for sequence in result.sequences]
    return [get_text_content(message) for message in messages]
