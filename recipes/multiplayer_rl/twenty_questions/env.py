"""Twenty questions: a model knows a word, and the policy asks until it names the word."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import chz

from tinker_cookbook.completers import MessageCompleter, TinkerMessageCompleter
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, Logs, RLDataset, RLDatasetBuilder

__all__ = [
    "TwentyQuestionsDataset",
    "TwentyQuestionsDatasetBuilder",
    "TwentyQuestionsEnv",
    "TwentyQuestionsEnvGroupBuilder",
]

MAX_QUESTIONS = 20
ANSWER_TOKENS = 8
RULES = (
    "I think of a thing. Ask me questions that can be answered with yes or no, one at a time. When "
    "you know the thing, write 'Guess: ' and its name, a single word, on a line of its own. You "
    f"have {MAX_QUESTIONS} turns."
)
ANSWERER_RULES = (
    "You play twenty questions. The secret word is {answer}. Answer the question about it with "
    "'yes' or 'no' and nothing else."
)
GUESS = re.compile(r"^\s*guess:\s*(.+?)[\s.!]*$", re.IGNORECASE | re.MULTILINE)
WORDS = """anchor apple arrow axe badger ball balloon banana barrel basket bear bed bee bell belt
bicycle boat book boot bottle bowl box branch bread brick bridge broom brush bucket bus butter
button cake camel camera candle canoe car carpet carrot castle cat chain chair cheese cherry clock
cloud coat coin comb cow crab cross crown cup curtain desk dog dolphin door drum duck eagle ear egg
elbow elephant engine envelope eye feather fence finger fire fish flag flower flute foot fork fox
frog fruit garden gate glass glove goat grass guitar hammer hand hat hat hawk helmet hen hill hook
horse house ice island jacket jar kettle key kite kitten knee knife ladder lake lamp leaf lemon
lion lock map mask melon mirror monkey moon mountain mouse mouth nail needle nest net nose nut oven
owl ox paint pan paper parrot pear pearl pen pencil pepper piano pig pillow pin pipe plane plate
plough pocket pond potato rabbit rain ring river road rocket roof root rope rose ruler sail salt
saw scissors seal shell ship shirt shoe snail snake snow soap sock spade spider spoon star stone
stove swan sword table tail tent tiger toe tomato tooth towel tower toy train tree truck trumpet
turtle umbrella violin wagon wall watch whale wheel whistle window wing wolf wood worm""".split()


class _Game(MessageEnv):
    def __init__(self, answerer: MessageCompleter, answer: str) -> None:
        self.answerer = answerer
        self.answer = answer
        self.history: list[Message] = []
        self._num_turns = 0

    async def initial_observation(self) -> list[Message]:
        self.history = [{"role": "system", "content": RULES}, {"role": "user", "content": "Begin."}]
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        self._num_turns += 1
        text = get_text_content(message)
        guess = GUESS.search(text)
        correct = guess is not None and guess[1].strip().lower() == self.answer.lower()
        metrics = {"correct": float(correct), "questions": float(self._num_turns)}
        logs: Logs = {"answer": self.answer}
        self.history = [*self.history, message]
        if correct or self._num_turns >= MAX_QUESTIONS:
            return MessageStepResult(float(correct), True, self.history, metrics, logs)
        # The answerer sees one question at a time; its answer does not depend on earlier ones.
        rules = ANSWERER_RULES.format(answer=self.answer)
        asked: list[Message] = [
            {"role": "system", "content": rules},
            {"role": "user", "content": text},
        ]
        said = get_text_content(await self.answerer(asked))
        self.history = [*self.history, {"role": "user", "content": said}]
        return MessageStepResult(0.0, False, self.history)


class TwentyQuestionsEnv(EnvFromMessageEnv):
    """One game; naming the word earns 1."""

    def __init__(self, answerer: MessageCompleter, answer: str, renderer: Renderer) -> None:
        super().__init__(renderer, _Game(answerer, answer))


@dataclass(frozen=True)
class TwentyQuestionsEnvGroupBuilder(EnvGroupBuilder):
    """One word, asked for several times."""

    answerer: MessageCompleter
    answer: str
    renderer: Renderer
    num_envs: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new games."""
        return [
            TwentyQuestionsEnv(self.answerer, self.answer, self.renderer)
            for _ in range(self.num_envs)
        ]

    def logging_tags(self) -> list[str]:
        """Return the name of the game."""
        return ["twenty_questions"]


@dataclass(frozen=True)
class TwentyQuestionsDataset(RLDataset):
    """Words in batches."""

    answerer: MessageCompleter
    answers: Sequence[str]
    renderer: Renderer
    batch_size: int
    group_size: int

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self.batch_size
        return [
            TwentyQuestionsEnvGroupBuilder(self.answerer, answer, self.renderer, self.group_size)
            for answer in self.answers[start : start + self.batch_size]
        ]

    def __len__(self) -> int:
        return len(self.answers) // self.batch_size


@chz.chz
class TwentyQuestionsDatasetBuilder(RLDatasetBuilder):
    """Builder of games about a list of words; a fifth of them is held out."""

    batch_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    group_size: int
    base_url: str | None = None
    num_epochs: int = 1
    test_group_size: int = 32
    answerer_base_model: str | None = None
    """Base model that answers; None: the base model of the training."""

    async def __call__(self) -> tuple[RLDataset, RLDataset]:
        """Return the training games and the held-out ones."""
        from tinker_cookbook.renderers import load_renderer

        words = sorted(set(WORDS))
        random.Random(0).shuffle(words)
        cut = len(words) // 5
        answerer = self._answerer()
        renderer = load_renderer(self.renderer_name, self.model_name_for_tokenizer)
        trained = words[cut:] * self.num_epochs
        return (
            TwentyQuestionsDataset(answerer, trained, renderer, self.batch_size, self.group_size),
            TwentyQuestionsDataset(answerer, words[:cut], renderer, cut, self.test_group_size),
        )

    def _answerer(self) -> MessageCompleter:
        from tinker_cookbook import model_info, service
        from tinker_cookbook.renderers import load_renderer
        from tinker_cookbook.utils.sdk_futures import wait_for_client

        model = self.answerer_base_model or self.model_name_for_tokenizer
        name = self.renderer_name
        if self.answerer_base_model is not None:
            name = model_info.get_recommended_renderer_name(model)
        connection = (
            service.connect(self.base_url) if self.base_url else service.current_connection()
        )
        client = wait_for_client(
            connection.service_client().create_sampling_client(base_model=model)
        )
        return TinkerMessageCompleter(client, load_renderer(name, model), ANSWER_TOKENS)
