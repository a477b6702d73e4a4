"""Preference learning: DPO on pairs of the model's own replies, or on a file of pairs.

    python -m recipes.dpo                                     # the default model, on this machine
    python -m recipes.dpo data=pairs.jsonl test_size=100      # your own pairs
    python -m recipes.dpo loss=simpo dpo_beta=2.0 loss_config.gamma=0.5

Without `data=`, the model is asked to write about a topic in a given number of words, several
times for each request. The reply that comes nearest to the number and the one furthest from it are
a pair. Topics of held-out requests are not trained on.

A row of such a file is {"prompt": ..., "chosen": ..., "rejected": ...}, with texts or lists of
messages, or two whole conversations as chosen and rejected. The same command again resumes a
stopped run.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from tinker_cookbook import recipe
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.preference import train_dpo
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
MIN_DIFFERENCE = 0.3
"""Smallest difference of the grades of a pair."""


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
    """Pairs of replies of the base model: the best and the worst of several to one request.

    They are kept in the run directory, so that a resumed run trains on the same pairs.
    """

    model_name: str
    renderer_name: str
    log_path: str
    num_prompts: int
    samples_per_prompt: int
    test_size: int
    seed: int = 0

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the training pairs and the held-out ones."""
        path = Path(self.log_path) / PAIRS_FILE
        if not path.exists():
            rows = self._make_pairs()
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        builder = ComparisonBuilderFromJsonl(train_path=str(path), test_size=self.test_size)
        return builder.get_labeled_comparisons()

    def _make_pairs(self) -> list[dict[str, str]]:
        from tinker_cookbook import service
        from tinker_cookbook.renderers import load_renderer
        from tinker_cookbook.utils.sdk_compat import wait_for_client

        print(
            f"pairs    sampling {self.num_prompts} x {self.samples_per_prompt} replies", flush=True
        )
        client = service.current_connection().service_client()
        sampler = wait_for_client(client.create_sampling_client(base_model=self.model_name))
        renderer = load_renderer(self.renderer_name, self.model_name)
        trained = [topic for number, topic in enumerate(TOPICS) if number % 5]
        requests = draw_requests(trained, self.num_prompts, self.seed)
        questions = [question for question, _ in requests]
        replies = sample_replies(sampler, renderer, questions, self.samples_per_prompt, self.seed)
        rows = []
        for (question, num_words), found in zip(requests, replies, strict=True):
            ranked = sorted(found, key=lambda reply: score(reply, num_words))
            worst, best = ranked[0], ranked[-1]
            if score(best, num_words) - score(worst, num_words) >= MIN_DIFFERENCE and best[0]:
                row = {"prompt": question, "chosen": best[0], "rejected": worst[0] or "..."}
                rows.append(row)
        return rows


class WordCountEvaluator(SamplingClientEvaluator):
    """Grades sampled replies to held-out requests by the rule, which training does not see."""

    def __init__(self, renderer: Renderer, num_requests: int, samples: int) -> None:
        self._renderer = renderer
        self._requests = draw_requests(TOPICS[::5], num_requests, seed=1)
        self._samples = samples

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the mean reward, its standard error over requests, and the mean length."""
        import asyncio
        import math
        import statistics

        questions = [question for question, _ in self._requests]
        replies = await asyncio.to_thread(
            sample_replies, sampling_client, self._renderer, questions, self._samples, 7
        )
        means = [
            statistics.fmean(score(reply, num_words) for reply in found)
            for (_, num_words), found in zip(self._requests, replies, strict=True)
        ]
        lengths = [len(text.split()) for found in replies for text, _ in found]
        return {
            "test/reward": statistics.fmean(means),
            "test/reward/stderr": statistics.stdev(means) / math.sqrt(len(means)),
            "test/words": statistics.fmean(lengths),
        }


@chz.chz
class WordCountEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    model_name: str
    renderer_name: str
    num_requests: int = 32
    samples: int = 4

    def __call__(self) -> WordCountEvaluator:
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        return WordCountEvaluator(renderer, self.num_requests, self.samples)


@chz.chz
class Config(train_dpo.PreferenceOptions):
    """The settings of this recipe: its pairs, and those of every preference run."""

    data: str | None = chz.field(
        default=None, doc="File, folder or several of pairs; default: pairs of the model's replies."
    )
    test_size: int = chz.field(default=16, doc="Number of held-out pairs.")
    batch_size: int = chz.field(default=8, doc="Pairs per optimizer step.")
    max_length: int = chz.field(default=512, doc="Tokens after which a completion is cut.")
    num_prompts: int = chz.field(default=96, doc="Requests that pairs are made from.")
    samples_per_prompt: int = chz.field(default=8, doc="Replies sampled per request.")
    num_epochs: int = 3
    learning_rate: float = 2e-4
    eval_every: int = 10
    save_every: int = 10


def build(config: Config) -> train_dpo.Config:
    """Return the train loop's settings: the pairs, and an evaluation by the rule."""
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    common = recipe.fill(ChatDatasetBuilderCommonConfig, config)
    if config.data is None:
        comparisons = recipe.fill(OwnReplyComparisons, config)
        evaluators = [recipe.fill(WordCountEvaluatorBuilder, config)]
    else:
        comparisons = ComparisonBuilderFromJsonl(
            train_path=config.data, test_size=config.test_size, seed=config.seed
        )
        evaluators = []
    pairs = DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=comparisons)
    return recipe.preference(config, pairs, evaluator_builders=evaluators)


if __name__ == "__main__":
    recipe.main(Config, build)
