"""Sample answers to a few fixed prompts during training, to see what the metrics mean."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.stores.storage import LocalStorage
from tinker_cookbook.stores.training_store import TrainingRunStore
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.jsonl_log import read_rows
from tinker_cookbook.utils.run_files import SAMPLES_FILE
from tinker_cookbook.utils.sdk_compat import call

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

__all__ = [
    "SAMPLES_FILE",
    "SampleEvaluator",
    "SampleEvaluatorBuilder",
    "read_samples",
    "record_sample",
]

logger = logging.getLogger(__name__)


class SampleEvaluator(SamplingClientEvaluator):
    """Answers each prompt and appends the answers to samples.jsonl; returns an empty dict."""

    def __init__(
        self,
        prompts: list[str],
        renderer: Renderer,
        log_path: str | Path,
        *,
        max_tokens: int = 80,
        temperature: float = 0.0,
    ) -> None:
        self.prompts = prompts
        self.renderer = renderer
        self.log_path = log_path
        self.max_tokens = max_tokens
        self.temperature = temperature

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Sample one answer to each prompt, all in parallel."""
        import tinker

        params = tinker.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=0,
            stop=self.renderer.get_stop_sequences(),
        )
        futures = [
            call(
                sampling_client,
                "sample",
                prompt=self.renderer.build_generation_prompt([{"role": "user", "content": prompt}]),
                num_samples=1,
                sampling_params=params,
            )
            for prompt in self.prompts
        ]
        for prompt, future in zip(self.prompts, futures, strict=True):
            tokens = list((await future).sequences[0].tokens)
            answer = self._text(tokens)
            record_sample(self.log_path, prompt, answer)
            logger.info("prompt: %s\nanswer: %s", prompt, answer)
        return {}

    def _text(self, tokens: list[int]) -> str:
        from tinker_cookbook.renderers import get_text_content

        message, _ = self.renderer.parse_response(tokens)
        return get_text_content(message).strip()


@chz.chz
class SampleEvaluatorBuilder:
    """Builds a `SampleEvaluator` for the `infrequent_evaluator_builders` of a training loop."""

    prompts: list[str] = chz.field(doc="User messages, each answered in its own conversation.")
    model_name: str = chz.field(doc="Name of the model whose tokenizer is used.")
    renderer_name: str = chz.field(doc="Name of the renderer, that is, the chat format.")
    log_path: str = chz.field(doc="Run directory in which samples.jsonl is written.")
    max_tokens: int = chz.field(default=80, doc="Maximum tokens per answer.")
    temperature: float = chz.field(
        default=0.0, doc="Sampling temperature; 0 is greedy. The seed is fixed."
    )

    def __call__(self) -> SampleEvaluator:
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name)
        return SampleEvaluator(
            self.prompts,
            renderer,
            self.log_path,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )


def record_sample(log_path: str | Path, prompt: str, answer: str) -> None:
    """Append an answer to samples.jsonl, for loops that sample themselves.

    In a block of `trace.trace_iteration`, the row also has the `step`.
    """
    step = trace.current_step()
    row = {} if step is None else {"step": step}
    store = TrainingRunStore(LocalStorage(log_path))
    store.write_sample(row | {"prompt": prompt, "answer": answer})


def read_samples(log_path: str | Path) -> list[dict[str, Any]]:
    """Return the rows `{"step", "prompt", "answer"}` of a run, oldest first."""
    return read_rows(Path(log_path) / SAMPLES_FILE)
