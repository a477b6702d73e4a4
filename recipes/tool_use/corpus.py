"""An invented village: facts about its people, as documents for the search."""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_NAMES = """Ada Bela Cora Dov Ede Falk Gero Hanna Ines Jory Kira Lew Mira Nils Odo Petra Quirin
Runa Sven Tilda Ugo Vera Wim Xenia Yara Zeno""".split()
LAST_NAMES = "Amsel Birk Corden Distel Erle Falter Ginster Holm Iltis Juchten Kiesel Linde".split()
TOWNS = "Brookfield Eastham Fairport Greenhill Lakewood Millbrook Oakdale Stonebridge".split()
TRADES = "baker carpenter doctor farmer gardener miller painter teacher".split()
ANIMALS = "bees cats cows ducks geese goats horses sheep".split()


@dataclass(frozen=True)
class Person:
    """A person of the village, with all facts that questions ask for."""

    name: str
    town: str
    trade: str
    animal: str
    count: int

    def sentence(self) -> str:
        """Return the document about this person."""
        return f"{self.name} is a {self.trade} in {self.town} and keeps {self.count} {self.animal}."


def make_village(num_people: int = 120) -> list[Person]:
    """Make the people: always the same, with different names."""
    rng = random.Random("village")
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    return [
        Person(
            name,
            town=rng.choice(TOWNS),
            trade=rng.choice(TRADES),
            animal=rng.choice(ANIMALS),
            count=rng.randint(2, 99),
        )
        for name in rng.sample(names, num_people)
    ]
