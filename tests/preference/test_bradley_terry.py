"""Bradley-Terry without a value head: the loss, its gradient on the service, and a run."""

# pyright: reportOptionalSubscript=false

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import tinker

from tinker_cookbook import renderers, tokenizer_utils
from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference import train_pointwise
from tinker_cookbook.preference.bradley_terry import (
    PointwiseDataset,
    PointwiseDatasetBuilder,
    bradley_terry,
    read_scores,
    score_weights,
)
from tinker_cookbook.preference.judge_quality import JudgeEvaluatorBuilder
from tinker_cookbook.preference.judges import PointwiseJudge
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.preference.types import Comparison, LabeledComparison
from tinker_cookbook.runs.custom_gradient import submit_custom_gradient
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils.jsonl_log import read_rows
from tinker_cookbook.utils.sdk_compat import wait_for_client


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


def labeled(chosen: str, rejected: str, label: str = "A") -> LabeledComparison:
    comparison = Comparison(
        [{"role": "user", "content": "Speak."}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )
    return LabeledComparison(comparison, label)  # pyright: ignore[reportArgumentType]


def test_the_loss_equals_its_definition_and_its_slopes_finite_differences():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 3, (2, 20))
    loss, by_chosen, by_rejected = bradley_terry(chosen, rejected)
    assert loss == pytest.approx(-np.log(1 / (1 + np.exp(rejected - chosen))))
    step = 1e-6
    for index, slopes in ((0, by_chosen), (1, by_rejected)):
        up, down = [chosen.copy(), rejected.copy()], [chosen.copy(), rejected.copy()]
        up[index] += step
        down[index] -= step
        found = (bradley_terry(*up)[0] - bradley_terry(*down)[0]) / (2 * step)
        assert slopes == pytest.approx(found, abs=1e-8)


def test_far_scores_neither_overflow_nor_lose_the_gradient():
    loss, by_chosen, _ = bradley_terry(np.array([-2000.0, 2000.0]), np.array([2000.0, -2000.0]))
    assert loss.tolist() == [4000.0, 0.0]
    assert by_chosen.tolist() == [-1.0, 0.0]


def test_weights_are_minus_the_derivatives_of_the_two_label_logprobs():
    [rows] = score_weights(np.array([0.25]), [3])
    assert rows.tolist() == [[0, 0], [0, 0], [-0.25, 0.25]]
    assert read_scores([np.array([[9.0, 9.0], [-1.0, -3.0]])]).tolist() == [2.0]


def test_ties_are_left_out_and_the_label_decides_which_is_better(renderer):
    comparisons = [labeled("a", "b"), labeled("c", "d", "Tie"), labeled("e", "f", "B")]
    data = PointwiseDataset(comparisons, renderer, batch_size=8)
    assert data.summary == ["2 comparisons, 1 ties left out"]
    texts = [renderer.tokenizer.decode(d.model_input.to_ints()) for d in data.get_batch(0)]
    shown = [text.split("assistant\n")[1][0] for text in texts]
    assert shown == ["a", "b", "f", "e"]


def test_a_conversation_that_is_too_long_is_refused_by_name(renderer):
    row = LabeledComparison(labeled("a " * 50, "b").comparison, "A", source="pairs.jsonl:3")
    data = PointwiseDataset([row], renderer, batch_size=1, max_length=40)
    with pytest.raises(DataValidationError, match=r"pairs.jsonl:3: .* more than max_length=40"):
        data.get_batch(0)


def service_scores(client: tinker.TrainingClient, data: list[tinker.Datum]) -> np.ndarray:
    output = client.forward(data, "cross_entropy").result()
    return read_scores(
        [
            found["logprobs"].to_numpy().reshape(datum.model_input.length, 2)
            for found, datum in zip(output.loss_fn_outputs, data, strict=True)
        ]
    )


def test_the_gradient_of_the_service_is_that_of_forward_backward_custom(local_service, renderer):
    """Two runs from the same weights, one with each kind of gradient, have the same norm."""
    pytest.importorskip("torch")
    import torch

    data = PointwiseDataset([labeled("a", "b c"), labeled("d", "e")], renderer, batch_size=2)
    batch = data.get_batch(0)

    def new_client() -> tinker.TrainingClient:
        return wait_for_client(
            local_service.connect().create_lora_training_client(local_service.model, rank=4, seed=1)
        )

    async def ours(client: tinker.TrainingClient) -> float:
        def weigh(part: slice, logprobs: list[np.ndarray]) -> list[np.ndarray]:
            lengths = [datum.model_input.length for datum in batch[part]]
            pairs = zip(logprobs, lengths, strict=True)
            scores = read_scores([rows.reshape(length, 2) for rows, length in pairs])
            _, by_chosen, by_rejected = bradley_terry(scores[0::2], scores[1::2])
            slopes = np.stack([by_chosen, by_rejected], axis=1).reshape(-1) / 2
            return score_weights(slopes, lengths)

        for gradient in await submit_custom_gradient(client, batch, weigh, group_size=2):
            await gradient
        result = await client.optim_step(tinker.AdamParams(learning_rate=1e-3))
        return result.metrics["grad_norm"]

    def loss(data: list[tinker.Datum], logprobs: list[torch.Tensor]):
        del data
        scores = torch.stack(
            [rows.reshape(-1, 2)[-1] @ torch.tensor([1.0, -1.0]) for rows in logprobs]
        )
        return -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).mean(), {}

    first, second = new_client(), new_client()
    norm = asyncio.run(ours(first))
    second.forward_backward_custom(batch, loss).result()
    result = second.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
    assert norm == pytest.approx(result.metrics["grad_norm"], rel=1e-4)
    assert norm > 0
    assert service_scores(first, batch) == pytest.approx(service_scores(second, batch), abs=1e-3)


def write_pairs(path: Path, count: int = 8) -> str:
    rows = [
        {"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(local_service, tmp_path: Path, **changes) -> train_pointwise.Config:
    path = write_pairs(tmp_path / "pairs.jsonl")
    comparisons = ComparisonBuilderFromJsonl(train_path=path, test_path=path)
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=local_service.model,
        renderer_name="chatml",
        max_length=None,
        batch_size=4,
    )
    evaluator = JudgeEvaluatorBuilder(
        kind="pointwise",
        renderer_name="chatml",
        model_name=local_service.model,
        comparison_builder=comparisons,
    )
    values = {
        "log_path": str(tmp_path / "run"),
        "model_name": local_service.model,
        "renderer_name": "chatml",
        "base_url": local_service.base_url,
        "dataset_builder": PointwiseDatasetBuilder(
            common_config=common, comparison_builder=comparisons
        ),
        "evaluator_builders": [evaluator],
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "num_epochs": 6,
        "eval_every": 12,
        "save_every": 4,
    }
    return train_pointwise.Config(**values | changes)


def test_a_run_learns_to_score_and_the_sampler_agrees_with_the_trainer(
    local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renderer
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    result = asyncio.run(train_pointwise.main(settings(local_service, tmp_path)))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(13))
    assert rows[0]["loss"] > rows[11]["loss"]
    assert rows[-1]["test/accuracy"] == 1.0
    assert rows[-1]["test/auc"] >= rows[0]["test/auc"]
    service_client = local_service.connect()
    trainer = wait_for_client(service_client.create_training_client_from_state(result.state_path))
    sampler = wait_for_client(service_client.create_sampling_client(model_path=result.sampler_path))
    pair = labeled("good 1", "no 1")
    data = PointwiseDataset([pair], renderer, batch_size=1).get_batch(0)
    judge = PointwiseJudge(renderer, sampler)
    prompt = pair.comparison.prompt_conversation

    async def scores() -> list[float]:
        completions = (pair.comparison.completion_A, pair.comparison.completion_B)
        return [await judge.score(prompt, completion) for completion in completions]

    assert asyncio.run(scores()) == pytest.approx(service_scores(trainer, data), abs=1e-3)
    again = asyncio.run(train_pointwise.main(settings(local_service, tmp_path)))
    assert again.sampler_path == result.sampler_path


def test_a_data_set_of_ties_is_refused(tmp_path: Path, tiny_model_folder: Path):
    row = {"comparison": vars(labeled("a", "b").comparison), "label": "Tie"}
    path = tmp_path / "ties.jsonl"
    path.write_text(json.dumps(row))
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=str(tiny_model_folder),
        renderer_name="chatml",
        max_length=None,
        batch_size=1,
    )
    builder = PointwiseDatasetBuilder(
        common_config=common, comparison_builder=ComparisonBuilderFromJsonl(train_path=str(path))
    )
    with pytest.raises(DataFormatError, match="all 1 comparisons are ties"):
        builder()
