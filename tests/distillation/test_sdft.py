"""Self-distillation against the real service: the teacher's prompt, its refresh, and resuming."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServiceProcess
from tests.number_format import by_format
from tinker_cookbook.checkpoint_utils import load_checkpoints_file
from tinker_cookbook.distillation import sdft
from tinker_cookbook.distillation.datasets import PromptGroup
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.rl.types import EnvGroupBuilder


class Questions:
    """Two questions per batch; `fail_at` stops the run before that batch."""

    def __init__(self, model: str, num_batches: int, fail_at: int | None = None) -> None:
        self._renderer = load_renderer("chatml", model)
        self._num_batches = num_batches
        self._fail_at = fail_at

    def get_batch(self, index: int) -> tuple[Sequence[EnvGroupBuilder], list[str], list[str]]:
        if index == self._fail_at:
            raise InterruptedError("the run was stopped here")
        questions = [f"What is {index} + {number}?" for number in (1, 2)]
        groups = [PromptGroup(question, self._renderer, group_size=3) for question in questions]
        return groups, questions, [f"It is {index + 1}.", f"It is {index + 2}."]

    def __len__(self) -> int:
        return self._num_batches


@pytest.fixture
def make_config(tmp_path: Path, local_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)

    def make(name: str = "run", **options: Any) -> sdft.Config:
        defaults = {
            "renderer_name": "chatml",
            "max_tokens": 3,
            "learning_rate": 5e-3,
            "lora_rank": 4,
            "topk": 8,
            "save_every": 0,
            "eval_every": 0,
            "behavior_if_log_dir_exists": "resume",
        }
        return sdft.Config(
            log_path=str(tmp_path / name),
            model_name=local_service.model,
            base_url=local_service.base_url,
            **defaults | options,
        )

    return make


def rows_of(config: sdft.Config) -> list[dict[str, Any]]:
    text = (Path(config.log_path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_teachers_prompt_holds_question_and_answer(local_service: ServiceProcess):
    renderer = load_renderer("chatml", local_service.model)
    prompt = sdft.build_sdft_teacher_prompt(
        "What is {golden_answer}?",
        "A {question}.",
        renderer,
        "Be brief.",
        "{golden_answer}|{question}",
    )
    text = str(renderer.tokenizer.decode(prompt.to_ints()))
    assert "A {question}.|What is {golden_answer}?" in text
    assert text.index("Be brief.") < text.index("A {question}.")


@pytest.mark.parametrize("topk", [0, 8])
def test_the_student_learns_from_demonstrations(make_config, local_service, topk: int):
    config = make_config(topk=topk)
    asyncio.run(sdft.main(config, Questions(local_service.model, 3)))
    rows = rows_of(config)
    assert len(rows) == 3
    assert abs(rows[0]["teacher_kl"]) > 0.01, "another prompt, hence other probabilities"
    assert rows[0]["grad_norm"] > 0
    assert ("top_k/teacher_kl" in rows[0]) == bool(topk)


def test_a_resumed_run_continues_with_the_refreshed_teacher(make_config, local_service):
    options = {"teacher_sync_every": 2, "save_every": 3}
    unbroken, broken = make_config("unbroken", **options), make_config("broken", **options)
    asyncio.run(sdft.main(unbroken, Questions(local_service.model, 5)))
    with pytest.raises(InterruptedError):
        asyncio.run(sdft.main(broken, Questions(local_service.model, 5, fail_at=3)))
    # The checkpoint after step 3 names the teacher of step 2.
    record = load_checkpoints_file(broken.log_path)[-1]
    assert "teacher-000002" in record.get("teacher_path")
    asyncio.run(sdft.main(broken, Questions(local_service.model, 5)))
    for one, other in zip(rows_of(unbroken), rows_of(broken), strict=True):
        for key in ("teacher_kl", "top_k/teacher_kl", "grad_norm", "teacher_nll"):
            assert other[key] == pytest.approx(
                one[key], rel=by_format(float32=1e-4, bfloat16=0.1), abs=1e-4
            )


def test_bad_settings_are_refused(make_config):
    with pytest.raises(ConfigurationError, match=r"demo_template has no \{golden_answer\}"):
        make_config(demo_template="{question}")
    with pytest.raises(ConfigurationError, match="teacher_sync_every=0 is less than 1"):
        make_config(teacher_sync_every=0)
