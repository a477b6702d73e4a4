"""Benchmarks during training, as evaluators of a train loop."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.eval.benchmarks import BenchmarkConfig, find_benchmark, run_benchmark
from tinker_cookbook.eval.benchmarks._types import BenchmarkResult
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import EvalError

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

__all__ = ["BenchmarkEvaluator", "BenchmarkEvaluatorBuilder"]

logger = logging.getLogger(__name__)


class BenchmarkEvaluator(SamplingClientEvaluator):
    """Runs a benchmark on the weights of the current step; metrics are `eval/BENCHMARK/...`."""

    def __init__(
        self,
        benchmark_name: str,
        renderer: Renderer,
        max_examples: int = 100,
        max_tokens: int = 32768,
        temperature: float = 0.6,
        save_dir: str | None = None,
    ) -> None:
        """Set the benchmark.

        Args:
            benchmark_name: The name of a registered benchmark.
            renderer: The chat format.
            max_examples: Number of examples, from the start of the data.
            max_tokens: Maximum tokens per reply.
            temperature: Sampling temperature; 0 is greedy. The seed is fixed.
            save_dir: Folder for the replies: a numbered folder is made for each evaluation. None:
                replies are not saved.

        Raises:
            BenchmarkNotFoundError: if the benchmark is unknown.
        """
        self.benchmark = find_benchmark(benchmark_name)
        self.renderer = renderer
        self.save_dir = save_dir
        self.config = BenchmarkConfig(
            max_examples=max_examples, max_tokens=max_tokens, temperature=temperature
        )

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the metrics; an evaluation without a single grade only logs its reason."""
        from dataclasses import replace

        config = replace(self.config, save_dir=self._new_folder())
        try:
            result = await run_benchmark(self.benchmark, sampling_client, self.renderer, config)
        except EvalError as error:
            logger.warning("%s", error)
            return {}
        return _metrics(result)

    def _new_folder(self) -> str | None:
        if self.save_dir is None:
            return None
        folder = Path(self.save_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        return str(folder / f"{max(numbers, default=-1) + 1:06d}")


@chz.chz
class BenchmarkEvaluatorBuilder:
    """Builds a `BenchmarkEvaluator` for the `evaluator_builders` of a train loop."""

    benchmark_name: str = chz.field(doc="Name of the benchmark.")
    model_name: str = chz.field(doc="Name of the model whose tokenizer is used.")
    renderer_name: str = chz.field(doc="Name of the renderer, that is, the chat format.")
    max_examples: int = chz.field(default=100, doc="Number of examples.")
    max_tokens: int = chz.field(default=32768, doc="Maximum tokens per reply.")
    temperature: float = chz.field(default=0.6, doc="Sampling temperature; 0 is greedy.")
    save_dir: str | None = chz.field(
        default=None, doc="Folder for the replies of each evaluation; None: they are not saved."
    )

    def __call__(self) -> BenchmarkEvaluator:
        from tinker_cookbook.renderers import load_renderer

        return BenchmarkEvaluator(
            self.benchmark_name,
            load_renderer(self.renderer_name, self.model_name),
            max_examples=self.max_examples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            save_dir=self.save_dir,
        )


def _metrics(result: BenchmarkResult) -> dict[str, float]:
    found: dict[str, float] = {
        "score": result.score,
        "standard_error": result.standard_error,
        "num_examples": float(result.num_examples),
        "num_errors": float(result.num_errors),
        "num_truncated": float(result.num_truncated),
        "time_seconds": result.time_seconds,
    }
    found |= {name: float(value) for name, value in result.metrics.items() if name not in found}
    return {f"eval/{result.name}/{name}": value for name, value in found.items()}
