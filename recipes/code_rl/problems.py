"""Small programming problems, generated with their tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NUM_CASES = 5
HELD_OUT_SHARE = 3
"""One problem of this many is held out."""
NUMBERS = range(2, 12)
WORDS = "river stone apple window garden letter yellow summer pepper kettle banana mirror".split()


@dataclass(frozen=True)
class Problem:
    """A task in words, and calls with their results as tests."""

    kind: str
    task: str
    """What the function must return."""
    parameters: str
    cases: tuple[tuple[tuple, Any], ...]
    """Arguments and the expected value of each test; JSON can hold both."""

    def question(self) -> str:
        """Return the message of the user."""
        return f"Write a Python function solve({self.parameters}) that returns {self.task}."


@dataclass(frozen=True)
class Family:
    """Problems that differ in one number `k`."""

    kind: str
    task: str
    parameters: str
    solution: Callable[..., Any]
    """Takes the arguments, then k."""


FAMILIES = (
    Family("arithmetic", "a plus b plus {k}", "a, b", lambda a, b, k: a + b + k),
    Family("arithmetic", "a minus b minus {k}", "a, b", lambda a, b, k: a - b - k),
    Family("arithmetic", "a times b plus {k}", "a, b", lambda a, b, k: a * b + k),
    Family("arithmetic", "{k} times a minus b", "a, b", lambda a, b, k: k * a - b),
    Family("arithmetic", "the larger of a and {k}", "a", lambda a, k: max(a, k)),
    Family("arithmetic", "the rest of a divided by {k}", "a", lambda a, k: a % k),
    Family("list", "the sum of the list xs, plus {k}", "xs", lambda xs, k: sum(xs) + k),
    Family("list", "the largest number of the list xs, times {k}", "xs", lambda xs, k: max(xs) * k),
    Family("list", "how many numbers of the list xs are above {k}", "xs",
           lambda xs, k: sum(x > k for x in xs)),
    Family("list", "the list of the numbers of xs times {k}", "xs",
           lambda xs, k: [x * k for x in xs]),
    Family("string", "the string s repeated {k} times", "s", lambda s, k: s * k),
    Family("string", "the first {k} letters of the string s", "s", lambda s, k: s[:k]),
    Family("string", "the length of the string s plus {k}", "s", lambda s, k: len(s) + k),
)  # fmt: skip


def all_problems() -> list[Problem]:
    """Return every problem once, with the families mixed."""
    problems = list(_generate())
    random.Random("problems").shuffle(problems)
    return problems


def split_problems() -> tuple[list[Problem], list[Problem]]:
    """Return the training problems and the held-out ones."""
    problems = all_problems()
    held_out = problems[::HELD_OUT_SHARE]
    return [p for i, p in enumerate(problems) if i % HELD_OUT_SHARE], held_out


def _generate() -> Iterator[Problem]:
    for family in FAMILIES:
        for k in NUMBERS:
            task = family.task.format(k=k)
            rng = random.Random(task)
            names = family.parameters.split(", ")
            arguments = [tuple(_argument(name, rng) for name in names) for _ in range(NUM_CASES)]
            cases = tuple((given, family.solution(*given, k)) for given in arguments)
            yield Problem(family.kind, task, family.parameters, cases)


def _argument(name: str, rng: random.Random) -> Any:
    if name == "xs":
        return [rng.randint(-20, 20) for _ in range(rng.randint(1, 6))]
    if name == "s":
        return rng.choice(WORDS)
    return rng.randint(-50, 50)
