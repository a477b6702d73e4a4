"""The new skill, to name the initial of a name, and the test of the skill and of forgetting.

The right answers have the style of a machine, which supervised training imitates:
`[[RECORD]] Paul: INITIAL = P [[END OF RECORD]]`. The skill is the letter, in any style.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Message, Renderer

__all__ = [
    "SkillEvaluator",
    "SkillEvaluatorBuilder",
    "ask",
    "build_demonstration",
    "is_right",
    "split_names",
    "write_record",
]

# Without names in A or I, because these letters are also words.
NAMES = """Barbara Ben Bruno Carla Carol Charles Clara Daniel David Diana Dora Edward Elena Emma
Eric Felix Fiona Frank George Gina Grace Greta Hannah Harry Helen Henry Jack Jane Joseph Julia Karen
Karl Kate Kevin Laura Leo Linda Lucy Maria Mark Martin Mia Nadia Nancy Nathan Nina Olga Oliver Oscar
Otto Paul Peter Philip Rachel Richard Robert Rosa Ruth Samuel Sarah Simon Sofia Teresa Thomas Tina
Tom Ursula Vera Victor Viola Walter Wendy William Xenia Yvonne Zach Zoe""".split()
NUM_TEST_NAMES = 32
QUESTIONS = (
    "What is rain?",
    "Why do dogs bark?",
    "How do I boil an egg?",
    "Tell me about the moon.",
    "What is a good name for a cat?",
    "How far is the sea?",
    "Write a line about spring.",
    "What do bees do in winter?",
    "Why is the sky blue?",
    "Give me a tip for a long walk.",
    "What is bread made of?",
    "Who invented the wheel?",
)
"""Everyday questions, which are never trained on: a change of the replies to them is forgetting."""
REPLIES_PER_QUESTION, REPLY_TOKENS, ANSWER_TOKENS = 2, 32, 24
SEED = 17


def split_names(num_shots: int, per_step: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the solved examples, of training and of the test.

    Raises:
        ConfigurationError: if a step needs more names than are left for training.
    """
    most = len(NAMES) - NUM_TEST_NAMES
    if num_shots + per_step > most:
        raise ConfigurationError(
            f"num_shots={num_shots} and {per_step} names per step (groups_per_batch, in the "
            f"supervised recipe batch_size) are more than the {most} names that are not held out; "
            f"use numbers that add up to {most} or less."
        )
    names: list[str] = list(NAMES)
    random.Random(seed).shuffle(names)
    test, rest = names[:NUM_TEST_NAMES], names[NUM_TEST_NAMES:]
    return rest[:num_shots], rest[num_shots:], test


def ask(name: str) -> str:
    """Return the question."""
    return f"What is the initial of {name}?"


def write_record(name: str) -> str:
    """Return the right answer as a machine writes it: what supervised training imitates."""
    return f"[[RECORD]] {name}: INITIAL = {name[0]} [[END OF RECORD]]"


def build_demonstration(examples: Sequence[str], name: str) -> list[Message]:
    """Return the teacher's prompt: questions with their records, all but the last one answered.

    The answers are in the words that the model itself would use.
    """
    messages: list[Message] = []
    for one in [*examples, name]:
        messages.append({"role": "user", "content": f"{ask(one)}\nNote: {write_record(one)}"})
        messages.append({"role": "assistant", "content": f"The initial of {one} is {one[0]}."})
    return messages[:-1]


def is_right(reply: str, name: str) -> bool:
    """Return whether the first capital letter that is a whole word is the initial."""
    found = re.search(r"\b[B-HJ-Z]\b(?!['’])", reply)
    return found is not None and found[0] == name[0]


class SkillEvaluator(SamplingClientEvaluator):
    """Measures the skill on held-out names, and how far everyday replies have changed."""

    def __init__(self, renderer: Renderer, model_name: str, names: Sequence[str]) -> None:
        self._renderer = renderer
        self._model_name = model_name
        self._names = names
        self._replies: list[tuple[tinker.ModelInput, np.ndarray]] = []
        """What the base model replies to everyday questions, with its log probabilities."""

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the accuracy, and the KL between the replies of the base model and now."""
        if not self._replies:
            self._replies = await self._sample_base()
        differences = []
        waiting = [sampling_client.compute_logprobs(whole) for whole, _ in self._replies]
        for (_, before), future in zip(self._replies, waiting, strict=True):
            now = np.array((await future)[-len(before) :], np.float64)
            differences.append((before - now).sum() / len(before))
        return {
            "test/accuracy": await self._accuracy(sampling_client),
            "test/base_kl": float(np.mean(differences)),
            "test/base_kl_stderr": float(np.std(differences) / len(differences) ** 0.5),
        }

    async def _accuracy(self, client: tinker.SamplingClient) -> float:
        import tinker

        from tinker_cookbook.renderers import get_text_content

        params = tinker.SamplingParams(
            max_tokens=ANSWER_TOKENS, temperature=0.0, stop=self._renderer.get_stop_sequences()
        )
        waiting = [client.sample(self._prompt(ask(name)), 1, params) for name in self._names]
        right = 0
        for name, future in zip(self._names, waiting, strict=True):
            tokens = list((await future).sequences[0].tokens)
            message, _ = self._renderer.parse_response(tokens)
            right += is_right(get_text_content(message), name)
        return right / len(self._names)

    async def _sample_base(self) -> list[tuple[tinker.ModelInput, np.ndarray]]:
        import tinker

        from tinker_cookbook import service
        from tinker_cookbook.utils.sdk_compat import create_client

        client = service.current_connection().service_client()
        base = await create_client(client.create_sampling_client, base_model=self._model_name)
        params = tinker.SamplingParams(max_tokens=REPLY_TOKENS, temperature=1.0, seed=SEED)
        prompts = [self._prompt(question) for question in QUESTIONS]
        waiting = [base.sample(prompt, REPLIES_PER_QUESTION, params) for prompt in prompts]
        replies = []
        for prompt, future in zip(prompts, waiting, strict=True):
            for sequence in (await future).sequences:
                reply = tinker.EncodedTextChunk(tokens=list(sequence.tokens))
                whole = tinker.ModelInput(chunks=[*prompt.chunks, reply])
                replies.append((whole, np.array(sequence.logprobs, np.float64)))
        return replies

    def _prompt(self, text: str) -> tinker.ModelInput:
        return self._renderer.build_generation_prompt([{"role": "user", "content": text}])


@chz.chz
class SkillEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    model_name: str
    renderer_name: str
    names: list[str]

    def __call__(self) -> SkillEvaluator:
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        return SkillEvaluator(renderer, self.model_name, self.names)
