"""Tasks of inspect-ai during training, as evaluators of a train loop (extra `inspect`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import chz
from inspect_ai import Tasks, eval_async  # pyright: ignore[reportMissingImports]
from inspect_ai.log import EvalLog  # pyright: ignore[reportMissingImports]
from inspect_ai.model import GenerateConfig as InspectAIGenerateConfig  # pyright: ignore[reportMissingImports]
from inspect_ai.model import Model as InspectAIModel  # pyright: ignore[reportMissingImports]
from inspect_ai.model import ModelAPI as InspectAIModelAPI  # pyright: ignore[reportMissingImports]

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.eval.inspect_utils import InspectAPIFromTinkerSampling
from tinker_cookbook.exceptions import ConfigurationError

if TYPE_CHECKING:
    import tinker

__all__ = ["InspectEvaluator", "InspectEvaluatorBuilder"]

logger = logging.getLogger(__name__)


@chz.chz
class InspectEvaluatorBuilder:
    """Builds an `InspectEvaluator` for the `evaluator_builders` of a train loop."""

    tasks: Tasks = chz.field(doc="Tasks of inspect-ai: objects, or names such as `pkg/task`.")
    renderer_name: str | None = chz.field(
        default=None, doc="Name of the chat format; None: the recommended one of the model."
    )
    model_name: str | None = chz.field(
        default=None, doc="Name of the base model; None: the model of the sampling client."
    )
    seed: int | None = chz.field(default=None, doc="Seed of the sampling.")
    verbose: bool = chz.field(default=False, doc="Whether prompts and replies are logged.")
    include_reasoning: bool = chz.field(
        default=False, doc="Whether replies include the reasoning before the answer."
    )
    temperature: float = chz.field(default=1.0, doc="Sampling temperature; 0 is greedy.")
    max_tokens: int = chz.field(default=1000, doc="Maximum tokens per reply.")
    top_p: float = chz.field(default=1.0, doc="Probability mass that is sampled from.")
    top_k: int = chz.field(default=-1, doc="Number of likeliest tokens to sample from; -1: all.")
    num_choices: int = chz.field(default=1, doc="Replies per request.")
    limit: int | None = chz.field(default=None, doc="Number of samples per task; None: all.")
    debug_errors: bool = chz.field(
        default=True, doc="Whether an error in a sample is raised instead of recorded."
    )
    log_dir: str | None = chz.field(
        default=None, doc="Folder for Inspect's logs; None: the one that Inspect chooses."
    )
    max_connections: int = chz.field(default=512, doc="Maximum number of requests at a time.")
    log_level: str = chz.field(default="INFO", doc="Log level of Inspect.")
    metadata: dict[str, str] | None = chz.field(
        default=None, doc="Facts to store in Inspect's logs."
    )

    def __call__(self) -> SamplingClientEvaluator:
        return InspectEvaluator(self)


class InspectEvaluator(SamplingClientEvaluator):
    """Runs tasks on the weights of the current step; metrics are `DATASET/METRIC`."""

    def __init__(self, config: InspectEvaluatorBuilder) -> None:
        self.config = config

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the metrics of all scorers; a task that fails only logs its reason."""
        config = self.config
        logs = await eval_async(
            tasks=config.tasks,
            model=[self._model(sampling_client)],
            limit=config.limit,
            debug_errors=config.debug_errors,
            fail_on_error=False,
            log_dir=config.log_dir,
            log_level=config.log_level,
            max_connections=config.max_connections,
            metadata=config.metadata,
        )
        return collect_metrics(logs)

    def _model(self, client: tinker.SamplingClient) -> InspectAIModel:
        from tinker_cookbook.model_info import get_recommended_renderer_name

        config = self.config
        model_name = config.model_name or client.get_base_model()
        if not model_name:
            raise ConfigurationError("model_name=None: the sampling client has none; give it.")
        settings = InspectAIGenerateConfig(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            top_p=config.top_p,
            top_k=config.top_k,
            num_choices=config.num_choices,
            seed=config.seed,
            max_connections=config.max_connections,
        )
        make_api: Callable[..., InspectAIModelAPI] = InspectAPIFromTinkerSampling
        api = make_api(
            renderer_name=config.renderer_name or get_recommended_renderer_name(model_name),
            model_name=model_name,
            sampling_client=client,
            config=settings,
            verbose=config.verbose,
            include_reasoning=config.include_reasoning,
        )
        return InspectAIModel(api=api, config=settings)


def collect_metrics(logs: Sequence[EvalLog]) -> dict[str, float]:
    """Return the metrics of all tasks and scorers; equal names of datasets are kept apart.

    Metrics of a task's first scorer are `DATASET/METRIC`, those of the others
    `DATASET/SCORER/METRIC`. Of datasets with one name, the later ones have their task's name.
    """
    metrics: dict[str, float] = {}
    used: set[str] = set()
    for log in logs:
        if log.status != "success":
            reason = log.error.message if log.error is not None else log.status
            logger.warning("%s has no result: %s", log.eval.task, reason)
        if log.results is None:
            continue
        name = _free_name(used, log.eval.dataset.name or log.eval.task, log.eval.task)
        for number, score in enumerate(log.results.scores):
            prefix = f"{name}/{score.name}" if number else name
            for metric, found in score.metrics.items():
                metrics[f"{prefix}/{metric}"] = float(found.value)
    return metrics


def _free_name(used: set[str], *wanted: str) -> str:
    numbered = (f"{wanted[-1]}-{number}" for number in range(2, len(used) + 3))
    name = next(name for name in (*wanted, *numbered) if name not in used)
    used.add(name)
    return name
