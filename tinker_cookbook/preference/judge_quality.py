"""How good a judge is on held-out comparisons, and the gate that a judge passes before RL.

Training against a judge that cannot tell good from bad rewards whatever the judge confuses with
quality, such as length. So the judge is measured first, and refused below a bound.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.judges import JudgeKind, build_judge
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import (
    Comparison,
    LabeledComparison,
    PreferenceModel,
    PreferenceModelBuilder,
)
from tinker_cookbook.renderers.content import format_content_as_string
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.own_loop import run_in_own_loop

if TYPE_CHECKING:
    import tinker

__all__ = [
    "CheckedJudgeBuilder",
    "JudgeEvaluator",
    "JudgeEvaluatorBuilder",
    "JudgeQuality",
    "check_judge",
    "compute_judge_quality",
    "measure_judge",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeQuality:
    """What a judge gets right; ties of the data are left out."""

    num_comparisons: int
    num_ties: int
    """Comparisons whose label is Tie, which are not judged."""
    accuracy: float
    """Share of comparisons with the verdict of the label, both orders averaged; no verdict counts
    half."""
    auc: float
    """Probability that the verdict for a better completion is above that for a worse one, over all
    pairs of comparisons. 0.5 is chance."""
    consistency: float
    """Share of comparisons in which both orders have the same winner."""
    position_bias: float
    """Mean verdict for the second completion over both orders; 0 for a judge without a preference
    for a position."""
    length_correlation: float
    """Correlation of the verdict with the difference of the lengths, in characters."""

    def metrics(self, prefix: str = "test/") -> dict[str, float]:
        """Return the numbers by name."""
        return {f"{prefix}{name}": float(value) for name, value in asdict(self).items()}

    def describe(self) -> str:
        """Return one line."""
        return (
            f"accuracy {self.accuracy:.3f}, AUC {self.auc:.3f}, consistent in "
            f"{self.consistency:.0%} of {self.num_comparisons} held-out comparisons, correlation "
            f"with length {self.length_correlation:+.2f}"
        )


def compute_judge_quality(
    forward_N: np.ndarray, backward_N: np.ndarray, longer_N: np.ndarray, *, num_ties: int = 0
) -> JudgeQuality:
    """Compute the quality from verdicts on N comparisons whose second completion is the better one.

    Args:
        forward_N: Verdicts with the better completion second, where 1 is right.
        backward_N: Verdicts with the better completion first, where -1 is right.
        longer_N: Length of the better completion minus that of the worse one.
        num_ties: Comparisons that were left out.
    """
    mean_N = (forward_N - backward_N) / 2
    # Each comparison also counts with its completions exchanged, so the base rate is one half.
    right_NN = mean_N[:, None] > -mean_N[None, :]
    equal_NN = mean_N[:, None] == -mean_N[None, :]
    return JudgeQuality(
        num_comparisons=len(mean_N),
        num_ties=num_ties,
        accuracy=float(((mean_N > 0) + 0.5 * (mean_N == 0)).mean()),
        auc=float((right_NN + 0.5 * equal_NN).mean()),
        consistency=float((np.sign(forward_N) == -np.sign(backward_N)).mean()),
        position_bias=float((forward_N + backward_N).mean() / 2),
        length_correlation=_correlation(mean_N, longer_N),
    )


async def measure_judge(
    judge: PreferenceModel, comparisons: Sequence[LabeledComparison]
) -> JudgeQuality:
    """Judge all comparisons concurrently, in both orders.

    Raises:
        ConfigurationError: if all comparisons are ties.
    """
    labeled = [one for one in comparisons if one.label != "Tie"]
    if not labeled:
        raise ConfigurationError(
            f"{len(comparisons)} held-out comparisons, all of them ties, cannot measure a judge; "
            "hold out comparisons with a winner (test_size=...)."
        )
    shown = [one.comparison if one.label == "B" else one.comparison.swap() for one in labeled]
    # A pairwise judge averages both orders when it is called; here each order counts alone.
    ask = getattr(judge, "verdict", judge)
    verdicts = await asyncio.gather(
        *(ask(comparison) for comparison in shown),
        *(ask(comparison.swap()) for comparison in shown),
    )
    return compute_judge_quality(
        np.array(verdicts[: len(shown)], np.float64),
        np.array(verdicts[len(shown) :], np.float64),
        np.array([_length_difference(comparison) for comparison in shown], np.float64),
        num_ties=len(comparisons) - len(labeled),
    )


def check_judge(quality: JudgeQuality, min_auc: float) -> None:
    """Refuse a judge that is not good enough to be a reward.

    Raises:
        ConfigurationError: naming the numbers.
    """
    if quality.auc < min_auc:
        raise ConfigurationError(
            f"the judge has {quality.describe()}, and min_judge_auc={min_auc:g}: a policy trained "
            "against it would learn its errors. Train the judge longer or on more comparisons, or "
            "lower min_judge_auc."
        )


class JudgeEvaluator(SamplingClientEvaluator):
    """Measures the weights in training as a judge."""

    def __init__(
        self,
        kind: JudgeKind,
        renderer_name: str,
        model_name: str,
        held_out: list[LabeledComparison],
    ) -> None:
        self._kind: JudgeKind = kind
        self._renderer_name = renderer_name
        self._model_name = model_name
        self._held_out = held_out

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return the numbers of `JudgeQuality`, as `test/accuracy`, `test/auc` and so on."""
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self._renderer_name, self._model_name)
        judge = build_judge(self._kind, renderer, sampling_client)
        return (await measure_judge(judge, self._held_out)).metrics()


@chz.chz
class JudgeEvaluatorBuilder:
    """Builder of the evaluator, for a train loop."""

    kind: JudgeKind = "pairwise"
    renderer_name: str
    model_name: str
    comparison_builder: ComparisonDatasetBuilder
    """Its held-out comparisons are judged."""

    def __call__(self) -> JudgeEvaluator:
        _, held_out = self.comparison_builder.get_labeled_comparisons()
        return JudgeEvaluator(self.kind, self.renderer_name, self.model_name, held_out or [])


@chz.chz
class CheckedJudgeBuilder(PreferenceModelBuilder):
    """Builds a judge, measures it on held-out comparisons, and refuses it if it is not good."""

    judge: PreferenceModelBuilder
    comparison_builder: ComparisonDatasetBuilder
    min_auc: float = 0.7
    report_path: str | None = None
    """File for the measured numbers; None: no file."""

    def __call__(self) -> PreferenceModel:
        """Return the judge.

        Raises:
            ConfigurationError: if its AUC is below `min_auc`.
        """
        judge = self.judge()
        _, held_out = self.comparison_builder.get_labeled_comparisons()
        quality = run_in_own_loop(measure_judge(judge, held_out or []))
        if self.report_path is not None:
            text = json.dumps(asdict(quality), indent=1) + "\n"
            write_atomically(Path(self.report_path), text)
        print(f"judge    {quality.describe()}", flush=True)
        check_judge(quality, self.min_auc)
        return judge


def _length_difference(comparison: Comparison) -> int:
    """Return how many characters the second completion is longer."""
    first, second = (
        sum(len(format_content_as_string(message["content"])) for message in completion)
        for completion in (comparison.completion_A, comparison.completion_B)
    )
    return second - first


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation through the origin.

    Which completion is called the second is arbitrary, so both variables have mean 0 if each
    comparison is counted in both orders.
    """
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / scale) if scale else 0.0
