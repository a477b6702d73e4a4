"""Two runs side by side in one asyncio program, sharing one base model.

    python examples/asyncio_training.py [--model NAME_OR_FOLDER] [--steps N] [--base-url URL]

Each run awaits only its own results, so the service can interleave them. At the end both score both
sentences: each run has learnt its own sentence.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from tinker_cookbook import cli_utils, service
from tinker_cookbook.tokenizer_utils import get_tokenizer

if TYPE_CHECKING:
    import tinker  # imported in the functions that use it, since that takes a second

SENTENCES = ("The harbour was full of grey ships.", "Seven cats slept on the warm stove.")


async def train_run(
    client: tinker.TrainingClient, datum: tinker.Datum, num_steps: int
) -> tinker.SamplingClient:
    """Overfit one run on one datum and return a sampler of the result."""
    import tinker

    for _ in range(num_steps):
        gradient = client.forward_backward([datum], "cross_entropy")
        update = client.optim_step(tinker.AdamParams(learning_rate=2e-3))
        await gradient
        await update
    return await client.save_weights_and_get_sampling_client()


async def main(model: str | None, num_steps: int, base_url: str | None) -> list[list[float]]:
    """Train both runs; return mean logprobs with one row per run and one column per sentence."""
    import numpy as np
    import tinker

    from tinker_cookbook.supervised import datum_from_model_input_weights

    with service.connect(base_url, model) as connection:
        print(connection.describe())
        tokenizer = get_tokenizer(connection.model_name)
        inputs = [tinker.ModelInput.from_ints(tokenizer.encode(text)) for text in SENTENCES]
        datums = [datum_from_model_input_weights(i, np.ones(i.length, np.float32)) for i in inputs]

        service_client = connection.service_client()
        created = [
            service_client.create_lora_training_client(connection.model_name, rank=8)
            for _ in SENTENCES
        ]
        clients = [await client for client in created]
        samplers = await asyncio.gather(
            *(train_run(c, datum, num_steps) for c, datum in zip(clients, datums, strict=True))
        )
        scores = [sampler.compute_logprobs(i) for sampler in samplers for i in inputs]
        logprobs = [await score for score in scores]
    means = [float(np.mean([x for x in row if x is not None])) for row in logprobs]
    table = [means[:2], means[2:]]
    for index, row in enumerate(table):
        print(f"run {index}: mean logprob of sentence 0 {row[0]:.2f}, of sentence 1 {row[1]:.2f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="base model; default: the service's model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--base-url", help="URL of a Tinker service; default: as for recipes")
    arguments = parser.parse_args()
    with cli_utils.errors_in_one_line():
        asyncio.run(main(arguments.model, arguments.steps, arguments.base_url))
