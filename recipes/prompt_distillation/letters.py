"""The task, reply to a word with its first letter: words, solved examples, held-out test."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.distillation.prompt_distillation import build_prompt
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Message, Renderer

WORDS = """anchor apple arrow bamboo basket beetle bottle branch bridge bucket butter button
camera candle carpet carrot castle cheese cherry circle coffee copper corner cotton desert dinner
doctor dragon engine falcon family farmer feather finger flower forest garden ginger guitar hammer
harbor helmet honey island jacket jungle kettle kitchen ladder lantern lemon letter lizard magnet
marble market meadow melon mirror monkey mountain needle number ocean olive onion orange oven
painter palace pencil pepper piano picture pigeon pillow planet pocket potato prince puzzle rabbit
river robin rocket saddle salmon school shadow silver sister spider spoon station stone summer
sunset table teacher temple thunder ticket tiger tomato tunnel turtle umbrella uncle valley velvet
village violin wagon walnut water whale window winter wizard yellow zebra""".split()
NUM_TEST_WORDS = 38


def split_words(num_shots: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return the words of the examples, of training and of the test.

    Raises:
        ConfigurationError: if no word is left to train on.
    """
    words: list[str] = list(WORDS)
    random.Random(seed).shuffle(words)
    test, rest = words[:NUM_TEST_WORDS], words[NUM_TEST_WORDS:]
    if num_shots >= len(rest):
        raise ConfigurationError(
            f"num_shots={num_shots} is too many, because no word would be left for training; use "
            f"at most {len(rest) - 1}, and fewer for several words per step."
        )
    return rest[:num_shots], rest[num_shots:], test


def build_examples(words: list[str]) -> list[Message]:
    """Return the messages that only the teacher sees: words, each with its first letter."""
    messages: list[Message] = []
    for word in words:
        messages.append({"role": "user", "content": word})
        messages.append({"role": "assistant", "content": word[0].upper()})
    return messages


def is_correct(reply: str, word: str) -> bool:
    """Return whether a reply is the first letter of a word, in upper or lower case."""
    return reply.strip().strip(".").upper() == word[0].upper()


class FirstLetterEvaluator(SamplingClientEvaluator):
    """Replies to the held-out words, without examples, and once by the teacher with them."""

    def __init__(
        self, renderer: Renderer, words: list[str], examples: list[Message], model_name: str
    ) -> None:
        self._renderer = renderer
        self._words = words
        self._examples = examples
        self._model_name = model_name
        self._of_teacher: float | None = None

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the share of right replies."""
        from tinker_cookbook import service
        from tinker_cookbook.utils.sdk_compat import create_client

        if self._of_teacher is None:
            client = service.current_connection().service_client()
            teacher = await create_client(
                client.create_sampling_client, base_model=self._model_name
            )
            self._of_teacher = await self._accuracy(teacher, self._examples)
        return {
            "test/accuracy": await self._accuracy(sampling_client, []),
            "test/teacher_accuracy": self._of_teacher,
        }

    async def _accuracy(self, client: tinker.SamplingClient, messages: list[Message]) -> float:
        import tinker

        from tinker_cookbook.renderers import get_text_content

        params = tinker.SamplingParams(
            max_tokens=8, temperature=0.0, stop=self._renderer.get_stop_sequences()
        )
        waiting = [
            client.sample(build_prompt(self._renderer, messages, word), 1, params)
            for word in self._words
        ]
        right = 0
        for word, future in zip(self._words, waiting, strict=True):
            tokens = list((await future).sequences[0].tokens)
            message, _ = self._renderer.parse_response(tokens)
            right += is_correct(get_text_content(message), word)
        return right / len(self._words)


@chz.chz
class FirstLetterEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    model_name: str
    renderer_name: str
    words: list[str]
    num_shots: int
    seed: int = 0

    def __call__(self) -> FirstLetterEvaluator:
        from tinker_cookbook.renderers import load_renderer

        shots, _, _ = split_words(self.num_shots, self.seed)
        renderer = load_renderer(self.renderer_name, self.model_name)
        return FirstLetterEvaluator(renderer, self.words, build_examples(shots), self.model_name)
