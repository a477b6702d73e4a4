"""The skills of this folder: what is shown, what is asked, and when a reply is right.

`places`: where each of 16 things is. The given answers are in a foreign wording; the test asks
about the same things in other words. `initials`: reply to a name with its initial; the names of the
test are neither trained on nor shown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message

__all__ = ["SKILLS", "Example", "Question", "Skill", "build_skill", "is_right"]

NAMES = """Adam Alice Anna Arthur Barbara Ben Bruno Carla Carol Charles Clara Daniel David Diana
Dora Edward Elena Emma Eric Felix Fiona Frank George Gina Grace Greta Hannah Harry Helen Henry Ida
Irene Isaac Ivan Jack Jane Joseph Julia Karen Karl Kate Kevin Laura Leo Linda Lucy Maria Mark Martin
Mia Nadia Nancy Nathan Nina Olga Oliver Oscar Otto Paul Peter Philip Rachel Richard Robert Rosa Ruth
Samuel Sarah Simon Sofia Teresa Thomas Tina Tom Ursula Vera Victor Viola Walter Wendy William Xenia
Yvonne Zach Zoe""".split()
NUM_TEST_NAMES = 28
SHOWN_PLACES = {
    "iron gate": "courtyard",
    "paper fan": "drawer",
    "white horse": "meadow",
    "wooden spoon": "basket",
    "gold coin": "fountain",
    "straw hat": "closet",
    "glass bead": "pocket",
    "stone cross": "garden",
}
"""Facts with which the teacher's prompt shows how a note is used."""
PLACES = {
    "red lamp": "kitchen",
    "old map": "cellar",
    "silver key": "attic",
    "blue kite": "barn",
    "long ladder": "office",
    "green bag": "garage",
    "small drum": "library",
    "clay pot": "tower",
    "wool scarf": "chapel",
    "spare rope": "bakery",
    "garden hose": "stable",
    "tin whistle": "harbor",
    "black umbrella": "school",
    "sewing box": "museum",
    "ship model": "theater",
    "chess set": "bedroom",
}
"""The facts to learn."""
FOREIGN = "{thing} -- {place}, quoth the ledger, f. 7 recto"
OWN = "The {thing} is in the {place}."
ASKED = "Where is the {thing}?"
TESTED = ("Do you know where the {thing} is?", "Tell me the place of the {thing}.")


@dataclass(frozen=True)
class Example:
    """Something to train on."""

    question: str
    """What the student sees."""
    answer: str
    """The given answer: supervised training copies it, and the teacher reads it."""
    teacher_messages: tuple[Message, ...]
    """The teacher's prompt."""


@dataclass(frozen=True)
class Question:
    """A question of the test, and the word that a right reply gives."""

    text: str
    key: str


@dataclass(frozen=True)
class Skill:
    """What is trained on, and what is tested."""

    examples: list[Example]
    test: list[Question]


def build_skill(name: str, num_shots: int, seed: int, *, own_wording: bool = False) -> Skill:
    """Return a skill by name.

    Args:
        name: One of `SKILLS`.
        num_shots: Solved examples in the teacher's prompt.
        seed: Decides which names are shown, trained on and tested.
        own_wording: Whether the given answers of `places` are worded as the model would do it.

    Raises:
        ConfigurationError: if the skill is unknown.
    """
    if name == "places":
        return _places(num_shots, OWN if own_wording else FOREIGN)
    if name == "initials":
        return _initials(num_shots, seed)
    raise ConfigurationError(f"skill={name} is unknown; use one of {', '.join(SKILLS)}.")


SKILLS = ("places", "initials")


def is_right(reply: str, key: str) -> bool:
    """Return whether a reply gives the key: as one of its words, or for one letter, alone."""
    if len(key) == 1:
        return reply.strip().strip(".") == key
    return key in reply.lower()


def _places(num_shots: int, wording: str) -> Skill:
    shown = list(SHOWN_PLACES.items())[:num_shots]
    earlier = [
        message
        for thing, place in shown
        for message in _turn(_noted(thing, place, wording), _write(OWN, thing, place))
    ]
    examples = [
        Example(
            _write(ASKED, thing),
            _write(wording, thing, place),
            (*earlier, {"role": "user", "content": _noted(thing, place, wording)}),
        )
        for thing, place in PLACES.items()
    ]
    test = [Question(_write(text, t), place) for text in TESTED for t, place in PLACES.items()]
    return Skill(examples, test)


def _initials(num_shots: int, seed: int) -> Skill:
    names: list[str] = list(NAMES)
    random.Random(seed).shuffle(names)
    test, rest = names[:NUM_TEST_NAMES], names[NUM_TEST_NAMES:]
    earlier = [message for name in rest[:num_shots] for message in _turn(name, name[0])]
    examples = [
        Example(name, name[0], (*earlier, {"role": "user", "content": name}))
        for name in rest[num_shots:]
    ]
    return Skill(examples, [Question(name, name[0]) for name in test])


def _turn(question: str, answer: str) -> Sequence[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _noted(thing: str, place: str, wording: str) -> str:
    return f"({_write(wording, thing, place)})\n{_write(ASKED, thing)}"


def _write(text: str, thing: str, place: str = "") -> str:
    return text.format(thing=thing, place=place)
