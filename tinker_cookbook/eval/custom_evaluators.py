"""Your own evaluator, as an example: questions, and a function that grades the replies.

    python -m tinker_cookbook.eval.custom_evaluators

`CustomEvaluator` can also be used without changes, in the `evaluator_builders` of a train loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypedDict

from tinker_cookbook.completers import TinkerMessageCompleter
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.renderers.content import get_text_content

if TYPE_CHECKING:
    import tinker

__all__ = ["QA_DATASET", "CustomEvaluator", "grader_fn", "main"]

MAX_TOKENS = 64


class Question(TypedDict):
    """A question and its answer."""

    input: str
    output: str


QA_DATASET: list[Question] = [
    {"input": "What is the capital of France?", "output": "Paris"},
    {"input": "What is the capital of Germany?", "output": "Berlin"},
    {"input": "What is the capital of Italy?", "output": "Rome"},
]


def grader_fn(response: str, target: str) -> bool:
    """Return whether the reply contains the answer, in any case."""
    return target.lower() in response.lower()


class CustomEvaluator(SamplingClientEvaluator):
    """Asks every question once, greedily; the metric is `accuracy`."""

    def __init__(
        self,
        dataset: Sequence[Question],
        grader_fn: Callable[[str, str], bool],
        model_name: str,
        renderer_name: str,
    ) -> None:
        """Load the chat format.

        Args:
            dataset: Questions with the keys `input` and `output`.
            grader_fn: Takes a reply and the `output`; returns whether the reply is correct.
            model_name: The model, for its tokenizer.
            renderer_name: The chat format.
        """
        from tinker_cookbook.renderers import load_renderer

        self._dataset = dataset
        self._grader_fn = grader_fn
        self._renderer = load_renderer(renderer_name, model_name)

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the share of correct replies."""
        ask = TinkerMessageCompleter(
            sampling_client, self._renderer, max_tokens=MAX_TOKENS, temperature=0.0
        )
        replies = await asyncio.gather(
            *(ask([{"role": "user", "content": row["input"]}]) for row in self._dataset)
        )
        correct = [
            self._grader_fn(get_text_content(reply), row["output"])
            for reply, row in zip(replies, self._dataset, strict=True)
        ]
        return {"accuracy": sum(correct) / len(correct)}


async def main() -> None:
    """Evaluate the default model on `QA_DATASET`, and print the metric."""
    from tinker_cookbook import service
    from tinker_cookbook.model_info import get_recommended_renderer_name
    from tinker_cookbook.utils.sdk_compat import create_client

    with service.connect(None, None) as connection:
        client = await asyncio.to_thread(connection.service_client)
        model = connection.model_name
        sampler = await create_client(client.create_sampling_client, base_model=model)
        renderer_name = get_recommended_renderer_name(model)
        evaluator = CustomEvaluator(QA_DATASET, grader_fn, model, renderer_name)
        print(await evaluator(sampler))


if __name__ == "__main__":
    asyncio.run(main())
