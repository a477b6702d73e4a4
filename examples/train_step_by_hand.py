"""Build a datum by hand and train on it with plain calls of the SDK.

    python examples/train_step_by_hand.py [--model NAME_OR_FOLDER] [--steps N] [--base-url URL]

A datum has the tokens that the model reads, the token that should follow each of them, and a weight
for each: 0 for the prompt, 1 for the answer. The loss falls because every step has the same datum.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook import cli_utils, service
from tinker_cookbook.tokenizer_utils import get_tokenizer

if TYPE_CHECKING:
    import tinker  # imported in the functions that use it, since that takes a second

PROMPT = "The keeper looked at the glass and said:"
ANSWER = " steady, wind in the west."


def build_datum(prompt_tokens: list[int], answer_tokens: list[int]) -> tinker.Datum:
    """Build a datum; the targets are the tokens shifted by one, so the last is only a target."""
    import tinker

    tokens = np.array(prompt_tokens + answer_tokens)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(prompt_tokens) :] = 1.0
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData.from_numpy(tokens[1:]),
            "weights": tinker.TensorData.from_numpy(weights[1:]),
        },
    )


def main(model: str | None, num_steps: int, base_url: str | None) -> list[float]:
    """Train a few steps; return the loss per answer token before each step."""
    import tinker

    losses = []
    with service.connect(base_url, model) as connection:
        print(connection.describe())
        tokenizer = get_tokenizer(connection.model_name)
        answer_tokens = tokenizer.encode(ANSWER, add_special_tokens=False)
        datum = build_datum(tokenizer.encode(PROMPT, add_special_tokens=False), answer_tokens)

        service_client = connection.service_client()
        client = service_client.create_lora_training_client(
            connection.model_name, rank=8, seed=0
        ).result()
        for step in range(num_steps):
            # Both requests are sent before the first result is awaited.
            gradient = client.forward_backward([datum], "cross_entropy")
            update = client.optim_step(tinker.AdamParams(learning_rate=1e-3))
            losses.append(gradient.result().metrics["loss:sum"] / len(answer_tokens))
            update.result()
            print(f"step {step}: loss per token {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="base model; default: the service's model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--base-url", help="URL of a Tinker service; default: as for recipes")
    arguments = parser.parse_args()
    with cli_utils.errors_in_one_line():
        main(arguments.model, arguments.steps, arguments.base_url)
