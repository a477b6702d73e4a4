"""A task of inspect-ai, as an example: questions whose replies another model judges.

    python -m tinker_cookbook.eval.run_inspect_evals \\
        tasks=tinker_cookbook/eval/custom_inspect_task.py@example_lm_as_judge model_path=tinker://...

The judge is the default model; `TINKER_JUDGE_MODEL` names another one. It is loaded when the task
is made, and not when this module is imported.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from inspect_ai import Task, task  # pyright: ignore[reportMissingImports]
from inspect_ai.dataset import MemoryDataset, Sample  # pyright: ignore[reportMissingImports]
from inspect_ai.model import GenerateConfig, Model  # pyright: ignore[reportMissingImports]
from inspect_ai.scorer import model_graded_qa  # pyright: ignore[reportMissingImports]
from inspect_ai.solver import generate  # pyright: ignore[reportMissingImports]

from tinker_cookbook.eval.inspect_utils import InspectAPIFromTinkerSampling
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.model_info import get_recommended_renderer_name
from tinker_cookbook.utils.sdk_compat import wait_for_client

if TYPE_CHECKING:
    import tinker

__all__ = ["QA_DATASET", "example_lm_as_judge"]

QA_DATASET = MemoryDataset(
    name="qa_dataset",
    samples=[
        Sample(input="What is the capital of France?", target="Paris"),
        Sample(input="What is the capital of Italy?", target="Rome"),
    ],
)


@functools.cache
def _service_client() -> tinker.ServiceClient:
    import tinker

    return tinker.ServiceClient()


@functools.cache
def _sampling_client() -> tinker.SamplingClient:
    return wait_for_client(_service_client().create_sampling_client(base_model=_judge_name()))


@functools.cache
def _api() -> InspectAPIFromTinkerSampling:
    name = _judge_name()
    return InspectAPIFromTinkerSampling(
        renderer_name=get_recommended_renderer_name(name),
        model_name=name,
        sampling_client=_sampling_client(),
    )


@functools.cache
def _grader_model() -> Model:
    return Model(api=_api(), config=GenerateConfig())


_LAZY = {
    "service_client": _service_client,
    "sampling_client": _sampling_client,
    "api": _api,
    "GRADER_MODEL": _grader_model,
}


def __getattr__(name: str) -> object:
    """Return the judge and its clients; they are made when they are first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _LAZY[name]()


def _judge_name() -> str:
    return os.environ.get("TINKER_JUDGE_MODEL") or DEFAULT_MODEL


@task
def example_lm_as_judge() -> Task:
    """Ask the questions of `QA_DATASET`; the judge compares the replies with the targets."""
    return Task(
        name="llm_as_judge",
        dataset=QA_DATASET,
        solver=generate(),
        scorer=model_graded_qa(model=_grader_model()),
    )
