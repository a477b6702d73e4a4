"""Questions that need a tool, and the rewards of the answers."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import chz

from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message, ToolCall
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset
from tinker_cookbook.tool_use import Tool, build_agent_tool_env

from .corpus import Person, make_village
from .tools import SearchIndex, calculator

Tasks = Literal["calculator", "search", "mixed", "chained"]
SYSTEM = "Use a tool to find the answer. Then reply with the answer only."
WRONG_BUT_USED_TOOL = 0.2
HELD_OUT_PEOPLE = 5
"""Questions about every fifth person are asked in evaluations only."""


@dataclass(frozen=True)
class Question:
    """A question, its answer (a word or a number), and the tool calls that find it."""

    text: str
    answer: str
    calls: tuple[tuple[str, str, str], ...] = ()
    """Name, argument and result of each tool call; only solved examples show them."""


def make_question(tasks: Tasks, rng: random.Random, people: Sequence[Person]) -> Question:
    """Draw a question."""
    if tasks == "mixed":
        tasks = rng.choice(("calculator", "search"))
    if tasks == "calculator":
        return sum_question(rng)
    if tasks == "search":
        return person_question(rng, rng.choice(people))
    return together_question(rng, people)


def sum_question(rng: random.Random) -> Question:
    """Draw a calculation that is too hard to guess."""
    first, second = rng.randint(100, 999), rng.randint(100, 999)
    sign, answer = rng.choice((("+", first + second), ("*", first * second)))
    call = ("calculator", f"{first} {sign} {second}", str(answer))
    return Question(f"What is {first} {sign} {second}?", str(answer), (call,))


def person_question(rng: random.Random, person: Person) -> Question:
    """Draw a question whose answer is only in the documents."""
    call = ("search", person.name, person.sentence())
    asked, answer = rng.choice(
        (
            (f"In which town does {person.name} live?", person.town),
            (f"What is the trade of {person.name}?", person.trade),
            (f"How many {person.animal} does {person.name} keep?", str(person.count)),
        )
    )
    return Question(asked, answer, (call,))


def together_question(rng: random.Random, people: Sequence[Person]) -> Question:
    """Draw a question that needs two searches and a sum."""
    one, other = rng.sample(list(people), 2)
    text = f"How many animals do {one.name} and {other.name} keep together?"
    total = str(one.count + other.count)
    calls = [("search", person.name, person.sentence()) for person in (one, other)]
    calls.append(("calculator", f"{one.count} + {other.count}", total))
    return Question(text, total, tuple(calls))


def solved_example(question: Question) -> list[Message]:
    """Return a question with its calls, their results and the answer, as a conversation."""
    messages: list[Message] = [{"role": "user", "content": question.text}]
    for name, argument, result in question.calls:
        key = "expression" if name == "calculator" else "query"
        body = ToolCall.FunctionBody(name=name, arguments=json.dumps({key: argument}))
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [ToolCall(function=body)]},
            {"role": "tool", "content": result, "name": name},
        ]
    return [*messages, {"role": "assistant", "content": question.answer}]


async def grade(
    question: Question, num_given: int, messages: list[Message]
) -> tuple[float, dict[str, float]]:
    """Return the reward: 1 if the last message is the right answer, 0.2 if a tool call worked.

    Args:
        question: The question.
        num_given: Number of first messages that the model did not write: examples, question.
        messages: The conversation.
    """
    said = messages[num_given:]
    results = [get_text_content(message) for message in said if message["role"] == "tool"]
    worked = any('"error"' not in result for result in results)
    last = said[-1] if said else None
    text = get_text_content(last) if last is not None and last["role"] == "assistant" else ""
    correct = is_right(text, question.answer)
    reward = 1.0 if correct else WRONG_BUT_USED_TOOL * worked
    return reward, {"correct": float(correct), "used_tool": float(worked)}


def is_right(text: str, answer: str) -> bool:
    """Return whether a short reply has the answer, and does not have other numbers."""
    words = re.findall(r"[\w.]+", text.replace(",", "").lower())
    words = [word.rstrip(".") for word in words]
    numbers = set(filter(str.isdigit, words))
    return answer.lower() in words and len(words) <= 20 and numbers <= {answer}


@functools.cache
def village() -> tuple[Person, ...]:
    """Return the people; they are made once."""
    return tuple(make_village())


def people_for(use: Literal["training", "evaluation"]) -> list[Person]:
    """Return the people of the training questions, or those of the evaluation."""
    held_out = use == "evaluation"
    return [p for i, p in enumerate(village()) if (i % HELD_OUT_PEOPLE == 0) == held_out]


@functools.cache
def search_index() -> SearchIndex:
    """Return the index of all documents; it is made once."""
    return SearchIndex([person.sentence() for person in village()])


@dataclass(frozen=True)
class QuestionGroup(EnvGroupBuilder):
    """One question several times. It pickles, since tools and renderer are made when needed."""

    data: ToolUseDatasetBuilder
    held_out: bool
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new environments with the same question."""
        data = self.data
        rng = random.Random(f"{data.seed}/{self.held_out}/{self.number}")
        people = people_for("evaluation" if self.held_out else "training")
        question = make_question(data.tasks, rng, people)
        given: list[Message] = [{"role": "system", "content": SYSTEM}]
        for _ in range(data.num_examples):
            given += [m for kind in data.kinds() for m in solved_example(self._example(kind))]
        given.append({"role": "user", "content": question.text})
        renderer = data.build_renderer()
        return [
            build_agent_tool_env(
                renderer,
                data.tools(),
                given,
                # The grader does not see the system message, so one message less was given.
                partial(grade, question, len(given) - 1),
                max_turns=data.max_turns,
                failed_parse_reward=0.0,
            )
            for _ in range(data.group_size)
        ]

    def logging_tags(self) -> list[str]:
        """Return the kind of task."""
        return [self.data.tasks]

    def _example(self, kind: Tasks) -> Question:
        """Return the same example for every question, so that prompts share a prefix."""
        return make_question(kind, random.Random("example"), people_for("training"))


@chz.chz
class ToolUseDatasetBuilder(RenderedDatasetBuilder):
    """Builder of training questions, and of held-out ones about other people and numbers."""

    num_batches: int
    tasks: Tasks = "search"
    max_turns: int = 3
    num_examples: int = 0
    test_problems: int = 0

    def kinds(self) -> tuple[Tasks, ...]:
        """Return the tasks of the solved examples."""
        return ("calculator", "search") if self.tasks == "mixed" else (self.tasks,)

    def tools(self) -> list[Tool]:
        """Return the tools that the model may call."""
        if self.tasks == "calculator":
            return [calculator]
        if self.tasks == "search":
            return [search_index().search]
        return [calculator, search_index().search]

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training questions and the held-out ones."""
        self.tools()  # fails here if a package is missing
        trained = NumberedDataset(
            partial(QuestionGroup, self, False),
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
        )
        if not self.test_problems:
            return trained, None
        data = chz.replace(self, group_size=2)
        held_out = NumberedDataset(
            partial(QuestionGroup, data, True), num_batches=1, groups_per_batch=self.test_problems
        )
        return trained, held_out
