"""Two games as message environments: guess a number, and twenty questions about a thing."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import chz

from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset

THINGS: dict[str, frozenset[str]] = {
    "cat": frozenset({"alive", "animal", "legs", "fur", "small"}),
    "horse": frozenset({"alive", "animal", "legs", "fur", "big"}),
    "eagle": frozenset({"alive", "animal", "legs", "wings", "small"}),
    "salmon": frozenset({"alive", "animal", "water", "small"}),
    "whale": frozenset({"alive", "animal", "water", "big"}),
    "oak": frozenset({"alive", "plant", "big", "wood"}),
    "rose": frozenset({"alive", "plant", "small"}),
    "table": frozenset({"legs", "wood", "big"}),
    "pencil": frozenset({"wood", "small"}),
    "plane": frozenset({"wings", "metal", "big"}),
    "spoon": frozenset({"metal", "small"}),
    "ship": frozenset({"metal", "water", "big"}),
}
PROPERTIES = sorted(frozenset.union(*THINGS.values()))
UNREADABLE_REWARD = -1.0
"""Reward of a guess without a number, and of a reply that does not end."""
MAX_DIGITS = 20
"""Numbers with more digits are not read."""
MISUNDERSTOOD_REWARD = -0.1


class NumberGame(MessageEnv):
    """Guess a number from 0 to `largest`; after a wrong guess the game says higher or lower.

    The conversation keeps the model's replies unchanged, so all turns of a game make one datum.
    """

    def __init__(self, answer: int, largest: int, max_turns: int) -> None:
        self.answer = answer
        self.largest = largest
        self.max_turns = max_turns
        self.history: list[Message] = []
        self._num_guesses = 0

    async def initial_observation(self) -> list[Message]:
        """Return the rules, an example game, and the start of this game."""
        largest = self.largest
        self.history = _conversation(
            "Guess my number. Reply with a number only.",
            f"From 0 to {largest}.",
            str(largest // 2),
            "Lower.",
            str(largest // 4),
            f"Right. A new number, from 0 to {largest}.",
        )
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        """Compare a guess: a right one earns 1, a wrong last one up to 0.5."""
        self._num_guesses += 1
        guess = read_guess(get_text_content(message))
        if guess is None:
            return self._end(message, UNREADABLE_REWARD, well_formed=0.0)
        if guess == self.answer:
            return self._end(message, 1.0, well_formed=1.0, correct=1.0)
        if self._num_guesses >= self.max_turns:
            closeness = 1.0 - min(abs(guess - self.answer) / self.largest, 1.0)
            return self._end(message, 0.5 * closeness, well_formed=1.0)
        hint = "Higher." if guess < self.answer else "Lower."
        self.history = [*self.history, message, {"role": "user", "content": hint}]
        return MessageStepResult(0.0, False, self.history, {"format": 1.0})

    def _end(
        self, message: Message, reward: float, *, well_formed: float, correct: float = 0.0
    ) -> MessageStepResult:
        self.history = [*self.history, message]
        metrics = {"format": well_formed, "correct": correct, "guesses": float(self._num_guesses)}
        return MessageStepResult(reward, True, self.history, metrics, {"answer": self.answer})


class ThingGame(MessageEnv):
    """Find a hidden thing: the model asks about properties and may name the thing at any time."""

    def __init__(self, answer: str, max_turns: int) -> None:
        self.answer = answer
        self.max_turns = max_turns
        self.history: list[Message] = []
        self._num_questions = 0

    async def initial_observation(self) -> list[Message]:
        """Return the rules, an example game, and the start of this game."""
        rules = (
            f"I think of one of these: {', '.join(THINGS)}. Ask whether it has one of these "
            f"properties: {', '.join(PROPERTIES)}; or name it. Reply with one word."
        )
        self.history = _conversation(
            rules, "Begin.", "alive", "No.", "wood", "Yes.", "table", "Right. A new thing."
        )
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        """Answer a question, or judge a guess: the right thing earns up to 1."""
        self._num_questions += 1
        words = re.findall(r"[a-z]+", get_text_content(message).lower())
        named = next((name for name in words if name in THINGS), None)
        asked = next((name for name in words if name in PROPERTIES), None)
        self.history = [*self.history, message]
        if named is not None or self._num_questions >= self.max_turns:
            correct = float(named == self.answer)
            reward = correct * (1.0 - 0.5 * (self._num_questions - 1) / self.max_turns)
            metrics = {"correct": correct, "questions": float(self._num_questions)}
            return MessageStepResult(reward, True, self.history, metrics, {"answer": self.answer})
        if asked is None:
            reply = "I did not understand. Reply with one word."
        else:
            reply = "Yes." if asked in THINGS[self.answer] else "No."
        self.history = [*self.history, {"role": "user", "content": reply}]
        reward = MISUNDERSTOOD_REWARD if asked is None else 0.0
        return MessageStepResult(
            reward, False, self.history, {"understood": float(asked is not None)}
        )


def _conversation(rules: str, *turns: str) -> list[Message]:
    """Return the rules as a system message, then messages of user and assistant in turn."""
    messages: list[Message] = [{"role": "system", "content": rules}]
    for number, text in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": text})
    return messages


def read_guess(text: str) -> int | None:
    """Return the only number of a reply; None if it has no number, or several."""
    found = re.findall(r"-?\d+", text)
    return int(found[0]) if len(found) == 1 and len(found[0]) <= MAX_DIGITS else None


@dataclass(frozen=True)
class GameGroup(EnvGroupBuilder):
    """One game, played several times. It pickles, since the renderer is made when it is needed."""

    data: MultiturnDatasetBuilder
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new games with the same answer."""
        renderer = self.data.build_renderer()
        return [
            EnvFromMessageEnv(
                renderer,
                self._make_game(),
                failed_parse_reward=UNREADABLE_REWARD,
                context_overflow_reward=UNREADABLE_REWARD,
            )
            for _ in range(self.data.group_size)
        ]

    def logging_tags(self) -> list[str]:
        """Return the name of the game."""
        return [self.data.game]

    def _make_game(self) -> MessageEnv:
        rng = random.Random(self.number)
        if self.data.game == "guess_number":
            largest = self.data.largest
            return NumberGame(rng.randint(0, largest), largest, self.data.max_turns)
        return ThingGame(rng.choice(sorted(THINGS)), self.data.max_turns)


@chz.chz
class MultiturnDatasetBuilder(RenderedDatasetBuilder):
    """Builder of the training games and the held-out ones."""

    game: Literal["guess_number", "twenty_questions"] = "guess_number"
    num_batches: int
    max_turns: int
    largest: int = 30

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the games; the held-out ones have numbers from a million upwards."""
        first = self.seed * 10_000_000
        make = partial(GameGroup, self)
        size = self.groups_per_batch
        trained = NumberedDataset(
            make, num_batches=self.num_batches, groups_per_batch=size, first=first
        )
        held_out = NumberedDataset(
            make, num_batches=4, groups_per_batch=size, first=first + 1_000_000
        )
        return trained, held_out
