"""Comparisons of sampled replies, and what a policy gains against a judge."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import chz
import numpy as np
import pytest

from tinker_cookbook import renderers, service, tokenizer_utils
from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.preference.judged_policy import JudgedPolicyEvaluatorBuilder
from tinker_cookbook.preference.sampled_comparisons import (
    DistinctPrompts,
    SampledComparisons,
    SampledReply,
    sample_replies,
)
from tinker_cookbook.preference.types import Comparison, Label, PreferenceModel
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.utils.jsonl_log import read_rows
from tinker_cookbook.utils.sdk_compat import wait_for_client


def ask(number: int) -> list[Message]:
    return [{"role": "user", "content": f"Question {number}?"}]


@chz.chz
class Longer(SampledComparisons):
    """The longer reply is the better one."""

    def prompts(self) -> tuple[list[list[Message]], list[list[Message]]]:
        return [ask(1), ask(2), ask(3)], [ask(4), ask(5)]

    def label(self, prompt: list[Message], first: str, second: str) -> Label | None:
        return None if len(first) == len(second) else ("A" if len(first) > len(second) else "B")


@chz.chz
class Silent(Longer):
    """No pair of replies is a comparison."""

    def label(self, prompt: list[Message], first: str, second: str) -> Label | None:
        return None


@pytest.fixture
def connected(local_service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    with service.connect(local_service.base_url, local_service.model) as connection:
        yield connection


def settings(local_service, folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"model_name": local_service.model, "renderer_name": "chatml", "folder": str(folder)}
    return values | {"max_tokens": 6} | changes


def test_replies_are_sampled_once_and_only_for_the_same_weights(
    local_service, connected, tmp_path: Path, capsys
):
    builder = Longer(**settings(local_service, tmp_path))
    trained, held_out = builder.get_labeled_comparisons()
    assert held_out
    for one in trained:
        a, b = (
            str(part[0]["content"])
            for part in (one.comparison.completion_A, one.comparison.completion_B)
        )
        assert one.label == ("A" if len(a) > len(b) else "B")
    assert {one.label for one in trained} == {"A", "B"}
    asked = {str(one.comparison.prompt_conversation[0]["content"]) for one in held_out}
    assert asked <= {"Question 4?", "Question 5?"}
    assert builder.get_labeled_comparisons() == (trained, held_out)
    assert capsys.readouterr().out.count("pairs    sampling 5 x 4 replies") == 1
    assert len(read_rows(builder.path)) == len(trained) + len(held_out)
    other = Longer(**settings(local_service, tmp_path, sampler_path="tinker://other"))
    assert other.path != builder.path


def test_a_running_event_loop_does_not_matter(local_service, connected, tmp_path: Path):
    async def build():
        return Longer(**settings(local_service, tmp_path, seed=3)).get_labeled_comparisons()

    trained, _ = asyncio.run(build())
    assert trained


def test_replies_without_a_comparison_are_refused(local_service, connected, tmp_path: Path):
    with pytest.raises(DataFormatError, match="has no comparison: all replies"):
        Silent(**settings(local_service, tmp_path)).get_labeled_comparisons()


def test_rl_takes_each_prompt_once(local_service, connected, tmp_path: Path):
    source = Longer(**settings(local_service, tmp_path, samples_per_prompt=6))
    trained, held_out = DistinctPrompts(source=source).get_labeled_comparisons()
    asked = [str(one.comparison.prompt_conversation[0]["content"]) for one in trained]
    assert asked == ["Question 1?", "Question 2?", "Question 3?"]
    assert held_out is not None
    assert len(held_out) == 2


def test_equal_seeds_give_equal_replies(local_service, connected, tiny_model_folder: Path):
    renderer = renderers.get_renderer(
        "chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder))
    )
    client = wait_for_client(
        local_service.connect().create_sampling_client(base_model=local_service.model)
    )

    def sample(seed: int) -> list[list[SampledReply]]:
        prompts = [ask(1), ask(2)]
        return asyncio.run(sample_replies(client, renderer, prompts, 3, max_tokens=5, seed=seed))

    first = sample(1)
    assert [len(found) for found in first] == [3, 3]
    assert first == sample(1) != sample(2)
    assert all(1 <= reply.num_tokens <= 5 for found in first for reply in found)


class FewerWords(PreferenceModel):
    """Prefers the shorter completion."""

    async def __call__(self, comparison: Comparison) -> float:
        first, second = (
            len(str(part[0]["content"]))
            for part in (comparison.completion_A, comparison.completion_B)
        )
        return float(np.sign(first - second))


def rule(prompt: list[Message], reply: SampledReply) -> float:
    assert str(prompt[0]["content"]).startswith("Question")
    return float(reply.num_tokens)


def test_the_judge_and_the_rule_are_measured_on_the_same_replies(
    local_service, connected, tmp_path: Path
):
    builder = JudgedPolicyEvaluatorBuilder(
        model_name=local_service.model,
        renderer_name="chatml",
        comparison_builder=DistinctPrompts(source=Longer(**settings(local_service, tmp_path))),
        preference_model_builder=FewerWords,
        opponent_path=None,
        rule=rule,
        samples=8,
        max_tokens=6,
    )
    client = wait_for_client(
        local_service.connect().create_sampling_client(base_model=local_service.model)
    )
    evaluator = builder()
    metrics = asyncio.run(evaluator(client))
    assert metrics["test/rule_reward"] == pytest.approx(metrics["test/reply_tokens"])
    assert 0 < metrics["test/judge_win_rate"] < 1  # the policy plays against itself
    assert metrics["test/judge_win_rate/stderr"] >= 0
    assert asyncio.run(evaluator(client)) == metrics
