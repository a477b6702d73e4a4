"""The task of the pipeline: short opinions, a rule that knows which are good, and an annotator.

Everything is generated. The rule is the truth, which no stage is trained on. The annotator labels
comparisons as people do: it knows what matters, and where two replies are equal in that, it prefers
the longer one. A reward model learns that weakness too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from tinker_cookbook.preference.sampled_comparisons import SampledReply
from tinker_cookbook.preference.types import Label
from tinker_cookbook.renderers.types import Message

TOPICS = """apples bees bicycles birds boats books bread bridges candles castles cats chess clocks
clouds coffee deserts dogs dreams farms fire fish forests friends gardens gold hats honey horses ice
islands kites lamps lions maps mirrors money mountains music night oceans owls paper pianos planets
rain rivers roads robots roses salt sand schools ships shoes snow spring stars stones storms summer
tea trains trees tigers towers toys winter wind windows wolves""".split()
TRAINED = [topic for number, topic in enumerate(TOPICS) if number % 4]
HELD_OUT = TOPICS[::4]
QUESTIONS = (
    "What do you think of {}?",
    "Tell me your opinion of {}.",
    "How do you feel about {}?",
    "Do you like {}?",
)
WORDS = """beautiful calm useful old bright quiet strong simple rare warm clever gentle""".split()
PLAIN = (
    "I like {topic}.",
    "I do not like {topic} much.",
    "It is a nice thing.",
    "They are {word}.",
    "That is a good question.",
    "I have no strong opinion.",
)
REASONED = (
    "I like {topic} because they are {word}.",
    "They are fine because they are {word}.",
    "I love them, since they make my day {word}.",
)
LONG = (
    "I like {topic}. They are {word}. I see them often.",
    "That is hard to say. Some are {word}, and some are {other}.",
)
MIN_DIFFERENCE_WORDS = 3
"""The annotator sees no difference in length below this."""


def build_conversation(question: str) -> list[Message]:
    """Return a question as a conversation."""
    return [{"role": "user", "content": question}]


def ask(topics: Sequence[str], questions_per_topic: int) -> list[list[Message]]:
    """Return questions about every topic, as conversations, topic after topic."""
    return [
        build_conversation(QUESTIONS[(number + shift) % len(QUESTIONS)].format(topic))
        for number, topic in enumerate(topics)
        for shift in range(questions_per_topic)
    ]


def draw_examples(count: int, seed: int) -> list[list[Message]]:
    """Return conversations for the supervised stage: plain ones, some with a reason, some long."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        kind = rng.choices((PLAIN, REASONED, LONG), (0.45, 0.35, 0.2))[0]
        topic, (word, other) = rng.choice(TRAINED), rng.sample(WORDS, 2)
        question = rng.choice(QUESTIONS).format(topic)
        reply = rng.choice(kind).format(topic=topic, word=word, other=other)
        examples.append([*build_conversation(question), {"role": "assistant", "content": reply}])
    return examples


def find_topic(prompt: list[Message]) -> str:
    """Return the topic of a question."""
    words = re.findall(r"[a-z]+", str(prompt[-1]["content"]).lower())
    return next(filter(TOPICS.__contains__, words), "")


def names_topic(prompt: list[Message], reply: str) -> bool:
    """Return whether a reply names the topic of its question."""
    return find_topic(prompt) in re.findall(r"[a-z]+", reply.lower())


def gives_reason(reply: str) -> bool:
    """Return whether a reply has a reason: words after because or since."""
    return re.search(r"\b(because|since)\s+\w+\s+\w+", reply.lower()) is not None


def is_one_sentence(reply: str) -> bool:
    """Return whether a reply is exactly one sentence."""
    return re.fullmatch(r"[^.!?]+[.!?]", reply.strip()) is not None


def rule_reward(prompt: list[Message], reply: SampledReply) -> float:
    """Return the share of three wishes that a reply fulfils: topic, reason, one whole sentence."""
    concise = reply.has_ended and is_one_sentence(reply.text)
    return (names_topic(prompt, reply.text) + gives_reason(reply.text) + concise) / 3


def annotate(prompt: list[Message], first: str, second: str) -> Label:
    """Return the better of two replies, as the annotator sees it."""
    scores = [names_topic(prompt, reply) + gives_reason(reply) for reply in (first, second)]
    if scores[0] == scores[1]:
        scores = [len(reply.split()) for reply in (first, second)]
        if abs(scores[0] - scores[1]) < MIN_DIFFERENCE_WORDS:
            return "Tie"
    return "A" if scores[0] > scores[1] else "B"
