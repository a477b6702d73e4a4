"""Render a chat: messages become tokens, and each token gets a training weight.

    python examples/render_chat.py [--model NAME_OR_FOLDER] [--renderer NAME]

It prints each piece of text with its weight: 0 for context, 1 for text that the model learns.
"""

import argparse
from itertools import groupby

from tinker_cookbook import cli_utils, model_info
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.renderers import Message, TrainOnWhat, get_renderer
from tinker_cookbook.tokenizer_utils import get_tokenizer

MESSAGES: list[Message] = [
    {"role": "system", "content": "You are a lighthouse keeper."},
    {"role": "user", "content": "How is the sea?"},
    {"role": "assistant", "content": "Calm as a plate. Glass is steady."},
    {"role": "user", "content": "Any ships?"},
    {"role": "assistant", "content": "Two, hull down. Glass is rising."},
]


def main(model: str, renderer_name: str | None) -> None:
    """Print the conversation piece by piece, then the prompt for sampling."""
    tokenizer = get_tokenizer(model)
    name = renderer_name or model_info.get_recommended_renderer_name(model)
    renderer = get_renderer(name, tokenizer)

    model_input, weights = renderer.build_supervised_example(
        MESSAGES, train_on_what=TrainOnWhat.ALL_ASSISTANT_MESSAGES
    )
    tokens = model_input.to_ints()
    print(f"{name}: {len(tokens)} tokens, {int(weights.sum())} trained\n")
    for weight, pairs in groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1]):
        print(f"weight {weight:.0f}  {tokenizer.decode([token for token, _ in pairs])!r}")

    prompt = renderer.build_generation_prompt(MESSAGES[:-1])
    print(
        f"\nprompt of {prompt.length} tokens, ends in {tokenizer.decode(prompt.to_ints())[-40:]!r}"
    )
    print(f"sampling stops at {renderer.get_stop_sequences()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--renderer", help="chat format; default: the recommended one of the model")
    arguments = parser.parse_args()
    with cli_utils.errors_in_one_line():
        main(arguments.model, arguments.renderer)
