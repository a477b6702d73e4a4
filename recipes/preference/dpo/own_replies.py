"""Pairs of the model's own replies: better and worse ones to the same request.

A request asks for a number of words about a topic. The reply that comes nearest to the number and
the one furthest from it are a pair, then the second nearest and the second furthest, and so on.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.preference_datasets import (
    ComparisonBuilderFromJsonl,
    ComparisonDatasetBuilder,
)
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.utils.durable_files import write_atomically

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

TOPICS = """apples bees bicycles birds boats books bread bridges candles castles cats chess clocks
clouds coffee deserts dogs dreams farms fire fish forests friends gardens gold hats honey horses ice
islands kites lamps lions maps mirrors money mountains music night oceans owls paper pianos planets
rain rivers roads robots roses salt sand schools ships shoes snow spring stars stones storms summer
tea trains trees tigers towers toys winter wind windows wolves""".split()
WORD_COUNTS = range(3, 9)
MAX_REPLY_TOKENS = 32
PAIRS_FILE = "pairs.jsonl"
HELD_OUT_FILE = "held_out_pairs.jsonl"
MIN_DIFFERENCE = 0.3
"""Smallest difference of the grades of a pair."""
TRAINED_TOPICS = [topic for number, topic in enumerate(TOPICS) if number % 5]
HELD_OUT_TOPICS = TOPICS[::5]


def count_reward(reply: str, num_words: int) -> float:
    """Return 1 for exactly `num_words` words, falling to 0 at none or twice as many."""
    found = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", reply))
    return max(0.0, 1.0 - abs(found - num_words) / num_words)


def draw_requests(topics: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
    """Return questions, each with the number of words that it asks for."""
    rng = random.Random(seed)
    numbers = [(rng.choice(topics), rng.choice(WORD_COUNTS)) for _ in range(count)]
    return [(f"Write exactly {words} words about {topic}.", words) for topic, words in numbers]


def sample_replies(
    client: tinker.SamplingClient, renderer: Renderer, questions: list[str], count: int, seed: int
) -> list[list[tuple[str, bool]]]:
    """Sample `count` replies to each question; each with whether it ended by itself."""
    import tinker

    from tinker_cookbook.renderers import get_text_content

    waiting = [
        client.sample(
            renderer.build_generation_prompt([{"role": "user", "content": question}]),
            count,
            tinker.SamplingParams(
                max_tokens=MAX_REPLY_TOKENS,
                temperature=1.0,
                stop=renderer.get_stop_sequences(),
                seed=seed * 1_000_003 + number,
            ),
        )
        for number, question in enumerate(questions)
    ]
    replies = []
    for future in waiting:
        found = []
        for sequence in future.result().sequences:
            message, _ = renderer.parse_response(list(sequence.tokens))
            found.append((get_text_content(message).strip(), sequence.stop_reason == "stop"))
        replies.append(found)
    return replies


def score(reply: tuple[str, bool], num_words: int) -> float:
    """Return the grade of a reply; one that was cut off by the token limit loses a tenth."""
    text, has_ended = reply
    return count_reward(text, num_words) - (0.0 if has_ended else 0.1)


@chz.chz
class OwnReplyComparisons(ComparisonDatasetBuilder):
    """Pairs of replies of the base model.

    They are kept in the run directory, so that a resumed run trains on the same pairs.
    """

    model_name: str
    renderer_name: str
    log_path: str
    num_prompts: int
    samples_per_prompt: int
    pairs_per_prompt: int
    test_size: int
    seed: int = 0

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the training pairs and the held-out ones, which are about other topics."""
        trained, held_out = (Path(self.log_path) / name for name in (PAIRS_FILE, HELD_OUT_FILE))
        if not (trained.exists() and held_out.exists()):
            for path, rows in zip((trained, held_out), self._make_pairs(), strict=True):
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        builder = ComparisonBuilderFromJsonl(
            train_path=str(trained), test_path=str(held_out) if self.test_size else None
        )
        return builder.get_labeled_comparisons()

    def _make_pairs(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        from tinker_cookbook import service
        from tinker_cookbook.renderers import load_renderer
        from tinker_cookbook.utils.sdk_compat import wait_for_client

        connection = service.current_connection()
        num_requests = self.num_prompts + self.test_size
        print(f"pairs    sampling {num_requests} x {self.samples_per_prompt} replies", flush=True)
        client = connection.service_client()
        sampler = wait_for_client(client.create_sampling_client(base_model=self.model_name))
        renderer = load_renderer(self.renderer_name, self.model_name)
        requests = draw_requests(TRAINED_TOPICS, self.num_prompts, self.seed)
        requests += draw_requests(HELD_OUT_TOPICS, self.test_size, self.seed + 1)
        questions = [question for question, _ in requests]
        replies = sample_replies(sampler, renderer, questions, self.samples_per_prompt, self.seed)
        found = [
            pair_replies(question, num_words, samples)
            for (question, num_words), samples in zip(requests, replies, strict=True)
        ]
        trained = [
            row for rows in found[: self.num_prompts] for row in rows[: self.pairs_per_prompt]
        ]
        return trained, [row for rows in found[self.num_prompts :] for row in rows[:1]]


def pair_replies(
    question: str, num_words: int, replies: Sequence[tuple[str, bool]]
) -> list[dict[str, str]]:
    """Return rows of the best and the worst reply, the second best and the second worst, ..."""
    ranked = sorted(replies, key=lambda reply: score(reply, num_words))
    rows = []
    for worst, best in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        difference = score(best, num_words) - score(worst, num_words)
        if difference >= MIN_DIFFERENCE and best[0]:
            row = {"prompt": question, "chosen": best[0], "rejected": worst[0] or "..."}
            rows.append(row)
    return rows


def check_can_count(config_log_path: str) -> None:
    """Refuse to count pairs that are sampled only when the run starts.

    Raises:
        ConfigurationError: if the run directory has no pairs yet.
    """
    if not (Path(config_log_path) / PAIRS_FILE).exists():
        raise ConfigurationError(
            "dry_run=true cannot count pairs that the model has not sampled yet; give data=FILE, "
            "or the log_path of a run that has made its pairs."
        )
