"""Two generated tasks, for teachers that are made here: count words, and name the first letter."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.problems import Problem, problem_data

TOPICS = """apples bees bicycles birds boats books bread bridges candles castles cats chess clocks
clouds coffee deserts dogs dreams farms fire fish forests friends gardens gold hats honey horses ice
islands kites lamps lions maps mirrors money mountains music night oceans owls paper pianos planets
rain rivers roads robots roses salt sand schools ships shoes snow spring stars stones storms summer
tea trains trees tigers towers toys winter wind windows wolves""".split()
WORD_COUNTS = range(3, 9)
WORDS = """anchor arrow bamboo basket beetle bottle branch bucket butter button camera carpet
carrot cheese cherry circle copper corner cotton dinner doctor dragon engine falcon family farmer
feather finger flower garden ginger guitar hammer harbor helmet island jacket jungle kettle kitchen
ladder lantern lemon letter lizard magnet marble market meadow melon monkey needle number olive
onion orange oven painter palace pencil pepper picture pigeon pillow pocket potato prince puzzle
rabbit rocket saddle salmon shadow silver sister spider spoon station sunset table teacher temple
thunder ticket tomato tunnel turtle umbrella uncle valley velvet village violin wagon walnut water
whale wizard yellow zebra""".split()
HELD_OUT = 5
"""Every fifth topic and word is held out."""
NUM_HELD_OUT_PROBLEMS = 64


def choose(items: Sequence[str], split: str) -> list[str]:
    """Return the items of a split, "train" or "test"."""
    return [item for i, item in enumerate(items) if (i % HELD_OUT == 0) == (split == "test")]


def count_problems(split: str) -> list[Problem]:
    """Return every training topic with every number of words, or some held-out ones."""
    pairs = [(topic, count) for topic in choose(TOPICS, split) for count in WORD_COUNTS]
    random.Random(split).shuffle(pairs)
    if split == "test":
        pairs = pairs[:NUM_HELD_OUT_PROBLEMS]
    return [Problem(f"Write exactly {n} words about {topic}.", str(n)) for topic, n in pairs]


def count_grade(reply: str, problem: Problem) -> float:
    """Return 1 for the wanted number of words, falling to 0 at none or twice as many."""
    wanted = int(problem.answer)
    found = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", reply))
    return max(0.0, 1.0 - abs(found - wanted) / wanted)


def letter_problems(split: str) -> list[Problem]:
    """Return one question per word of the split."""
    questions = [(f"Which letter begins the word {word}?", word) for word in choose(WORDS, split)]
    return [Problem(question, word[0].upper()) for question, word in questions]


def letter_grade(reply: str, problem: Problem) -> float:
    """Return 1 for the first letter alone, else 0."""
    return float(reply.strip().strip(".").upper() == problem.answer)


CountData = problem_data(count_problems, count_grade, name="word_count")
LetterData = problem_data(letter_problems, letter_grade, name="first_letter")

ADJECTIVES = ("calm", "bright", "old", "useful", "quiet", "lovely", "common", "rare")


def count_examples() -> list[list[Message]]:
    """Return a conversation for each training problem of the word-count task."""
    return [
        _conversation(str(problem.question), _describe(problem))
        for problem in count_problems("train")
    ]


def letter_examples() -> list[list[Message]]:
    """Return a conversation for each training problem of the first-letter task."""
    return [
        _conversation(str(problem.question), problem.answer) for problem in letter_problems("train")
    ]


def _describe(problem: Problem) -> str:
    """Return a sentence with the wanted number of words, such as "Cats are calm rare old."."""
    question, count = str(problem.question), int(problem.answer)
    topic = question.removesuffix(".").split()[-1]
    adjectives = random.Random(question).sample(ADJECTIVES, count - 2)
    return " ".join([topic.capitalize(), "are", *adjectives]) + "."


def _conversation(question: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
