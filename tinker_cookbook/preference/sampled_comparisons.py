"""Comparisons of replies that a model samples, labelled by a function."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.completers import derive_seed
from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.preference.comparison_rows import parse_comparison
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import (
    Comparison,
    Label,
    LabeledComparison,
    connect_to_weights,
)
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.file_utils import read_jsonl
from tinker_cookbook.utils.own_loop import run_in_own_loop

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = ["DistinctPrompts", "SampledComparisons", "SampledReply", "sample_replies"]

Conversation = list[Message]


@dataclass(frozen=True)
class SampledReply:
    """A sampled reply."""

    text: str
    has_ended: bool
    """False if the token limit cut it."""
    num_tokens: int
    """Sampled tokens, with the stop token."""


async def sample_replies(
    client: tinker.SamplingClient,
    renderer: Renderer,
    prompts: list[Conversation],
    count: int,
    *,
    max_tokens: int,
    seed: int,
) -> list[list[SampledReply]]:
    """Sample `count` replies to each conversation at temperature 1, all at once.

    The same weights and seed give the same replies.
    """
    import tinker

    from tinker_cookbook.renderers import get_text_content
    from tinker_cookbook.utils.sdk_compat import call

    waiting = [
        call(
            client,
            "sample",
            prompt=renderer.build_generation_prompt(prompt),
            num_samples=count,
            sampling_params=tinker.SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0,
                stop=renderer.get_stop_sequences(),
                seed=derive_seed(seed, number),
            ),
        )
        for number, prompt in enumerate(prompts)
    ]
    replies = []
    for future in waiting:
        found = []
        for sequence in (await future).sequences:
            tokens = list(sequence.tokens)
            message, _ = renderer.parse_response(tokens)
            text = get_text_content(message).strip()
            ended = sequence.stop_reason == "stop"
            found.append(SampledReply(text, has_ended=ended, num_tokens=len(tokens)))
        replies.append(found)
    return replies


@chz.chz
class SampledComparisons(ComparisonDatasetBuilder):
    """Pairs of replies to one prompt, sampled from saved weights; subclasses label them.

    The comparisons are kept in a file whose name contains a digest of the weights and settings, so
    a resumed run uses the same ones, and other weights never use them.
    """

    model_name: str
    renderer_name: str
    folder: str
    """Folder of the file."""
    sampler_path: str | None = None
    """Weights that write the replies (tinker://...); None: the base model."""
    samples_per_prompt: int = 4
    pairs_per_prompt: int = 3
    """Maximum comparisons of the replies to one prompt, chosen at random."""
    max_tokens: int = 24
    seed: int = 0

    def prompts(self) -> tuple[list[Conversation], list[Conversation]]:
        """Return the conversations to train on, and the held-out ones."""
        raise NotImplementedError

    def label(self, prompt: Conversation, first: str, second: str) -> Label | None:
        """Return which of two replies is better; None leaves the pair out."""
        raise NotImplementedError

    @property
    def path(self) -> Path:
        """The file of the comparisons."""
        settings = (
            self.model_name,
            self.renderer_name,
            self.sampler_path,
            self.samples_per_prompt,
            self.pairs_per_prompt,
            self.max_tokens,
            self.seed,
            self.prompts(),
        )
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return Path(self.folder) / f"comparisons-{digest}.jsonl"

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the training and the held-out comparisons; the first call samples the replies."""
        if not self.path.exists():
            rows = run_in_own_loop(self._make_rows())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        found: dict[str, list[LabeledComparison]] = {"train": [], "test": []}
        for number, row in enumerate(read_jsonl(str(self.path)), 1):
            one = parse_comparison(SourceRow(f"{self.path.name}:{number}", row))
            found[row["split"]].append(one)
        if not found["train"]:
            raise DataFormatError(
                f"{self.path} has no comparison: all replies to a prompt were equal or empty. "
                "Sample more of them (samples_per_prompt)."
            )
        trained = found["train"]
        if self.swap:
            trained = [c for one in trained for c in (one, one.swap())]
        return trained, found["test"]

    async def _make_rows(self) -> list[dict[str, object]]:
        from tinker_cookbook.renderers import load_renderer

        splits = dict(zip(("train", "test"), self.prompts(), strict=True))
        prompts = [prompt for found in splits.values() for prompt in found]
        print(f"pairs    sampling {len(prompts)} x {self.samples_per_prompt} replies", flush=True)
        client = await asyncio.to_thread(
            connect_to_weights, self.sampler_path, None, self.model_name
        )
        renderer = load_renderer(self.renderer_name, self.model_name)
        replies = await sample_replies(
            client,
            renderer,
            prompts,
            self.samples_per_prompt,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )
        rng = random.Random(self.seed)
        names = [name for name, found in splits.items() for _ in found]
        return [
            row
            for name, prompt, found in zip(names, prompts, replies, strict=True)
            for row in self._compare(name, prompt, found, rng)
        ]

    def _compare(
        self, split: str, prompt: Conversation, replies: list[SampledReply], rng: random.Random
    ) -> list[dict[str, object]]:
        """Return the rows of pairs of different replies, each in a random order."""
        rows = []
        texts = dict.fromkeys(reply.text for reply in replies if reply.text)
        pairs = list(itertools.combinations(texts, 2))
        for pair in rng.sample(pairs, min(len(pairs), self.pairs_per_prompt)):
            first, second = rng.sample(pair, 2)
            label = self.label(prompt, first, second)
            if label is None:
                continue
            comparison = Comparison(
                prompt,
                [{"role": "assistant", "content": first}],
                [{"role": "assistant", "content": second}],
            )
            rows.append({"comparison": vars(comparison), "label": label, "split": split})
        return rows


@chz.chz
class DistinctPrompts(ComparisonDatasetBuilder):
    """One comparison for each prompt of another data set, for RL, which samples its own replies."""

    source: ComparisonDatasetBuilder

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the first comparison of every prompt."""
        trained, held_out = self.source.get_labeled_comparisons()
        return _first_of_each(trained), None if held_out is None else _first_of_each(held_out)


def _first_of_each(comparisons: list[LabeledComparison]) -> list[LabeledComparison]:
    found = {
        json.dumps(c.comparison.prompt_conversation, default=str): c for c in reversed(comparisons)
    }
    return list(reversed(found.values()))
