"""How likely a model is to begin its reply with each of a few labels, such as A, B and Tie.

Nothing is sampled: one prefill of the prompt gives the log probabilities of all labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.renderers.train_on_what import TrainOnWhat
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.utils.sdk_compat import call, can_score_targets, service_message

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["find_label_tokens", "read_label_logprobs"]


def find_label_tokens(renderer: Renderer, labels: Sequence[str]) -> list[int]:
    """Return the first token of each label as a reply in a chat format.

    Raises:
        ConfigurationError: if two labels begin with the same token, or the format writes something
            before the reply that a prompt does not contain.
    """
    question: list[Message] = [{"role": "user", "content": "?"}]
    prompt = renderer.build_generation_prompt(question).to_ints()
    found = []
    for label in labels:
        reply: Message = {"role": "assistant", "content": label}
        example, _ = renderer.build_supervised_example(
            [*question, reply], train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE
        )
        tokens = example.to_ints()
        if tokens[: len(prompt)] != prompt or len(tokens) == len(prompt):
            raise ConfigurationError(
                f"the chat format {type(renderer).__name__} writes a reply differently from the "
                "start of a reply that it samples; a judge needs a format without thinking."
            )
        found.append(tokens[len(prompt)])
    if len(set(found)) < len(found):
        raise ConfigurationError(
            f"the labels {', '.join(labels)} begin with the tokens {found} in this chat format; "
            "they must differ."
        )
    return found


async def read_label_logprobs(
    client: tinker.SamplingClient, prompt: tinker.ModelInput, tokens: Sequence[int]
) -> np.ndarray:
    """Return the log probability of each of K tokens directly after a prompt, float64 [K].

    Raises:
        TrainingError: if the service fails.
    """
    import tinker

    try:
        if can_score_targets():
            return await _read_at_once(client, prompt, tokens)
        rows = [call(client, "compute_logprobs", _append(prompt, token)) for token in tokens]
        return np.array([row[-1] for row in await asyncio.gather(*rows)], np.float64)
    except (tinker.TinkerError, ValueError) as error:
        raise TrainingError(
            f"the service could not score a prompt: {service_message(error)}"
        ) from error


async def _read_at_once(
    client: tinker.SamplingClient, prompt: tinker.ModelInput, tokens: Sequence[int]
) -> np.ndarray:
    """Read all labels from one request."""
    import tinker

    # Row i of the targets belongs to token i + 1. Only the last row has targets, so any token may
    # follow the prompt there.
    targets = tinker.TensorData(
        data=list(tokens),
        dtype="int64",
        shape=[prompt.length, len(tokens)],
        sparse_crow_indices=[0] * prompt.length + [len(tokens)],
        sparse_col_indices=list(range(len(tokens))),
    )
    response = await call(
        client,
        "sample",
        prompt=_append(prompt, tokens[0]),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=1, temperature=0.0),
        target_prompt_logprobs=targets,
    )
    found = response.target_prompt_logprobs
    return np.asarray(found.data, np.float64).reshape(-1)[-len(tokens) :]


def _append(prompt: tinker.ModelInput, token: int) -> tinker.ModelInput:
    import tinker

    return tinker.ModelInput(chunks=[*prompt.chunks, tinker.EncodedTextChunk(tokens=[token])])
