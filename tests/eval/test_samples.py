"""Answers that are sampled during training."""

from __future__ import annotations

from pathlib import Path

from tests.assets import tokenizer_folder
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder, read_samples, record_sample
from tinker_cookbook.tokenizer_utils import get_tokenizer


def test_answers_are_appended_and_read_in_order(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    record_sample(tmp_path, "Who?", "Me.")
    record_sample(tmp_path, "Who?", "Naïve me.\n")
    assert read_samples(tmp_path) == [
        {"prompt": "Who?", "answer": "Me."},
        {"prompt": "Who?", "answer": "Naïve me.\n"},
    ]


def test_the_builder_loads_the_renderer_of_the_model(tmp_path: Path) -> None:
    build = SampleEvaluatorBuilder(
        prompts=["Who?"],
        model_name=str(tokenizer_folder("qwen3")),
        renderer_name="qwen3",
        log_path=str(tmp_path),
        max_tokens=5,
    )
    evaluator = build()
    tokens = get_tokenizer(str(tokenizer_folder("qwen3"))).encode("Me.<|im_end|>")
    assert evaluator._text(tokens) == "Me."
    assert (evaluator.prompts, evaluator.max_tokens, evaluator.temperature) == (["Who?"], 5, 0.0)
