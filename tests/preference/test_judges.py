"""Judges that are read from the probabilities of their labels, and their quality."""

# pyright: reportReturnType=false

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tinker

from tinker_cookbook import renderers, service, tokenizer_utils
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.judge_quality import (
    CheckedJudgeBuilder,
    JudgeEvaluatorBuilder,
    compute_judge_quality,
    measure_judge,
)
from tinker_cookbook.preference.judges import (
    JudgeBuilder,
    PairwiseJudge,
    PointwiseJudge,
    pointwise_messages,
)
from tinker_cookbook.preference.label_logprobs import find_label_tokens, read_label_logprobs
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.preference.types import Comparison, LabeledComparison, PreferenceModel
from tinker_cookbook.utils import sdk_compat
from tinker_cookbook.utils.sdk_compat import wait_for_client


def compare(first: str, second: str) -> Comparison:
    return Comparison(
        [{"role": "user", "content": "Speak."}],
        [{"role": "assistant", "content": first}],
        [{"role": "assistant", "content": second}],
    )


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


@pytest.fixture(scope="module")
def client(local_service) -> tinker.SamplingClient:
    return wait_for_client(
        local_service.connect().create_sampling_client(base_model=local_service.model)
    )


def test_labels_are_the_first_tokens_of_replies(renderer):
    tokens = find_label_tokens(renderer, ("A", "B", "Tie"))
    assert [renderer.tokenizer.decode([token]) for token in tokens[:2]] == ["A", "B"]
    with pytest.raises(ConfigurationError, match="they must differ"):
        find_label_tokens(renderer, ("Yes", "Yes"))


def test_one_request_reads_what_separate_requests_score(
    renderer, client, monkeypatch: pytest.MonkeyPatch
):
    tokens = find_label_tokens(renderer, ("A", "B", "Tie"))
    prompt = renderer.build_generation_prompt([{"role": "user", "content": "Hello"}])
    together = asyncio.run(read_label_logprobs(client, prompt, tokens))
    monkeypatch.setattr(
        "tinker_cookbook.preference.label_logprobs.can_score_targets", lambda: False
    )
    apart = asyncio.run(read_label_logprobs(client, prompt, tokens))
    assert together.shape == (3,)
    assert together == pytest.approx(apart, abs=1e-4)
    assert np.ptp(together) > 0
    assert sdk_compat.can_score_targets()


def test_a_pairwise_judge_only_changes_its_sign_in_the_other_order(renderer, client):
    judge = PairwiseJudge(renderer, client)
    shown = compare("short", "rather long")

    async def ask() -> list[float]:
        return await asyncio.gather(
            judge(shown), judge(shown.swap()), judge.verdict(shown), judge.verdict(shown.swap())
        )

    mean, swapped, first, second = asyncio.run(ask())
    assert mean == pytest.approx(-swapped)
    assert mean == pytest.approx((first - second) / 2)
    assert abs(first) < 1


def test_a_tournament_of_replies_needs_one_prefill_each(renderer, client):
    judge = PointwiseJudge(renderer, client)
    replies = ["one", "two", "three", "four"]

    async def tournament() -> tuple[list[float], list[float]]:
        pairs = list(itertools.permutations(replies, 2))
        verdicts = await asyncio.gather(*(judge(compare(*pair)) for pair in pairs))
        prompt = compare("", "").prompt_conversation
        scores = [await judge.score(prompt, compare(r, "").completion_A) for r in replies]
        return verdicts, scores

    verdicts, scores = asyncio.run(tournament())
    assert judge.num_scored == len(replies)
    assert verdicts[0] == pytest.approx(np.tanh((scores[1] - scores[0]) / 2))
    # Scores stay when another event loop asks.
    again = asyncio.run(judge(compare("one", "two")))
    assert (again, judge.num_scored) == (pytest.approx(verdicts[0]), len(replies))


def test_a_failed_score_is_asked_again(renderer, client):
    judge = PointwiseJudge(renderer, client)
    judge._tokens = [10**9, 1]  # no such token
    with pytest.raises(Exception, match="the service could not score"):
        asyncio.run(judge(compare("one", "two")))
    judge._tokens = find_label_tokens(renderer, ("Yes", "No"))
    assert -1 <= asyncio.run(judge(compare("one", "two"))) <= 1


def test_the_question_of_a_pointwise_judge_is_at_the_end():
    messages = pointwise_messages(
        compare("a", "b").prompt_conversation, compare("a", "").completion_A
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "system"]
    assert "Yes or No" in str(messages[-1]["content"])


def test_the_quality_is_that_of_the_definition():
    """Three comparisons whose second completion is better; the last verdict is wrong."""
    forward, backward = np.array([0.9, 0.5, -0.2]), np.array([-0.7, 0.1, 0.2])
    quality = compute_judge_quality(forward, backward, np.array([2.0, -1.0, 3.0]), num_ties=4)
    mean = [0.8, 0.2, -0.2]
    pairs = [(x > -y) + 0.5 * (x == -y) for x in mean for y in mean]
    assert quality.accuracy == pytest.approx(2 / 3)
    assert quality.auc == pytest.approx(np.mean(pairs))
    assert quality.consistency == pytest.approx(2 / 3)  # the second has the same winner's place
    assert quality.position_bias == pytest.approx((0.2 + 0.6 + 0.0) / 6)
    expected = (0.8 * 2 - 0.2 - 0.2 * 3) / np.sqrt((0.64 + 0.04 + 0.04) * 14)
    assert quality.length_correlation == pytest.approx(expected)
    assert (quality.num_comparisons, quality.num_ties) == (3, 4)


class Longer(PreferenceModel):
    """Prefers the longer completion, and with equal lengths the second."""

    async def __call__(self, comparison: Comparison) -> float:
        first, second = (
            len(str(part[-1]["content"]))
            for part in (comparison.completion_A, comparison.completion_B)
        )
        return float(np.sign(second - first)) or 1.0


def test_a_rule_is_measured_as_a_judge_and_ties_are_counted():
    labeled = [
        LabeledComparison(compare("long one", "a"), "A"),
        LabeledComparison(compare("a", "long one"), "A"),
        LabeledComparison(compare("same", "size"), "B"),
        LabeledComparison(compare("a", "b"), "Tie"),
    ]
    quality = asyncio.run(measure_judge(Longer(), labeled))
    assert quality.accuracy == pytest.approx(0.5)  # right, wrong, and no winner in both orders
    assert quality.consistency == pytest.approx(2 / 3)
    assert (quality.num_comparisons, quality.num_ties) == (3, 1)
    with pytest.raises(ConfigurationError, match="1 held-out comparisons, all of them ties"):
        asyncio.run(measure_judge(Longer(), labeled[-1:]))


class LongerBuilder:
    def __call__(self) -> PreferenceModel:
        return Longer()


def held_out(tmp_path: Path, better: str, worse: str) -> ComparisonBuilderFromJsonl:
    path = tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"Q{n}", "chosen": better, "rejected": worse} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ComparisonBuilderFromJsonl(train_path=str(path), test_path=str(path))


def test_a_judge_below_the_bound_is_refused_with_its_numbers(tmp_path: Path):
    report = tmp_path / "judge.json"
    checked = CheckedJudgeBuilder(
        judge=LongerBuilder(),  # pyright: ignore[reportArgumentType]
        comparison_builder=held_out(tmp_path, "long one", "a"),
        min_auc=0.9,
        report_path=str(report),
    )
    assert isinstance(checked(), Longer)
    assert json.loads(report.read_text())["auc"] == 1.0
    refused = CheckedJudgeBuilder(
        judge=LongerBuilder(),  # pyright: ignore[reportArgumentType]
        comparison_builder=held_out(tmp_path, "a", "long one"),
        min_auc=0.9,
    )
    with pytest.raises(ConfigurationError, match=r"AUC 0.000, .* and min_judge_auc=0.9"):
        refused()


def test_weights_in_training_are_measured(local_service, client, tmp_path: Path):
    builder = JudgeEvaluatorBuilder(
        kind="pointwise",
        renderer_name="chatml",
        model_name=local_service.model,
        comparison_builder=held_out(tmp_path, "yes", "no"),
    )
    metrics = asyncio.run(builder()(client))
    assert {"test/accuracy", "test/auc", "test/consistency", "test/position_bias"} <= metrics.keys()
    assert metrics["test/consistency"] == 1.0  # a score does not depend on the order


def test_saved_weights_judge_in_the_process_that_builds_them(
    local_service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    created = local_service.connect().create_lora_training_client(local_service.model, rank=2)
    training = wait_for_client(created)
    path = training.save_weights_for_sampler("judge").result().path
    builder = JudgeBuilder(
        renderer_name="chatml", model_name=local_service.model, rm_weights_path=path
    )
    assert pickle.loads(pickle.dumps(builder)) == builder
    with service.connect(local_service.base_url, local_service.model):
        assert -1 <= asyncio.run(builder()(compare("a", "b"))) <= 1
