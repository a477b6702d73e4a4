"""Self-distillation against the real service: the teacher's prompt, its refresh, and resuming."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.number_format import by_format
from tinker_cookbook.checkpoint_utils import load_checkpoints_file
from tinker_cookbook.distillation import sdft
from tinker_cookbook.distillation.datasets import PromptGroup
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.rl.config import AsyncConfig
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


PROGRAM = """
import asyncio, pickle, sys
from tests.distillation.test_sdft import Questions
from tinker_cookbook.distillation import sdft
config = pickle.load(open(sys.argv[1], "rb"))
if __name__ == "__main__":
    asyncio.run(sdft.main(config, Questions(config.model_name, 5)))
"""


def test_a_killed_run_equals_an_unbroken_one(make_config, local_service, tmp_path: Path):
    options = {"teacher_sync_every": 2, "save_every": 1}
    unbroken, broken = make_config("unbroken", **options), make_config("broken", **options)
    asyncio.run(sdft.main(unbroken, Questions(local_service.model, 5)))
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(broken))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "config.pkl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    metrics = Path(broken.log_path) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    asyncio.run(sdft.main(broken, Questions(local_service.model, 5)))
    assert load_checkpoints_file(broken.log_path)[-1].final
    for one, other in zip(rows_of(unbroken), rows_of(broken), strict=True):
        for key in ("teacher_kl", "top_k/teacher_kl", "grad_norm", "teacher_nll"):
            assert other[key] == pytest.approx(
                one[key], rel=by_format(float32=1e-4, bfloat16=0.1), abs=1e-4
            )


def test_a_group_may_have_its_own_prompt_for_the_teacher(make_config, local_service):
    class Prompted(Questions):
        def get_batch(self, index: int):
            groups, questions, answers = super().get_batch(index)
            return [OwnPrompt(**vars(group)) for group in groups], questions, answers

    own, template = make_config("own", max_steps=1), make_config("template", max_steps=1)
    asyncio.run(sdft.main(own, Prompted(local_service.model, 1)))
    asyncio.run(sdft.main(template, Questions(local_service.model, 1)))
    assert rows_of(own)[0]["teacher_nll"] != pytest.approx(rows_of(template)[0]["teacher_nll"])


class OwnPrompt(PromptGroup):
    def get_teacher_prompt(self) -> tinker.ModelInput:
        return tinker.ModelInput.from_ints([40, 41, 42])


def test_replies_that_are_too_long_for_the_teacher_are_named(make_config, local_service):
    config = make_config(max_context_length=20)
    with pytest.raises(DataValidationError, match=r"can be scored.* 20\. .*max_context_length"):
        asyncio.run(sdft.main(config, Questions(local_service.model, 1)))


def test_reverse_is_another_name_of_the_objective(make_config):
    assert make_config(reverse=True).training_objective() == "reverse_kl"
    assert make_config().training_objective() == "forward_kl"


def test_bad_settings_are_refused(make_config):
    with pytest.raises(ConfigurationError, match="reverse=true with topk=0"):
        make_config(reverse=True, topk=0)
    asynchronous = AsyncConfig(max_steps_off_policy=1, groups_per_batch=2)
    with pytest.raises(ConfigurationError, match="teacher_sync_every=1 with async_config"):
        make_config(teacher_sync_every=1, async_config=asynchronous)
    with pytest.raises(ConfigurationError, match=r"demo_template has no \{golden_answer\}"):
        make_config(demo_template="{question}")
    with pytest.raises(ConfigurationError, match="teacher_sync_every=0 is less than 1"):
        make_config(teacher_sync_every=0)
