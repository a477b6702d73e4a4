"""The parts of the RL loop that on-policy distillation changes.

A group is scored by its teacher as soon as it is sampled, while other groups are still sampling.
The scores belong to the group, so a failed group does not move those of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinker_cookbook.completers import TokenCompleter
from tinker_cookbook.distillation.datasets import TaughtGroup
from tinker_cookbook.distillation.objectives import kl_estimates, reverse_kl_advantages
from tinker_cookbook.distillation.target_cache import Targets
from tinker_cookbook.distillation.teacher import Teacher, place
from tinker_cookbook.distillation.top_k import PendingStep, TaughtDatum, measure, submit_step
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.loop import Loop, SampledGroup, TrainingStep
from tinker_cookbook.rl.metrics import add_to_advantages
from tinker_cookbook.rl.optimize import PendingUpdate
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.types import EnvGroupBuilder, TrajectoryGroup
from tinker_cookbook.runs.training_client import add_service_metrics

if TYPE_CHECKING:
    import tinker

__all__ = ["OnPolicyLoop", "ScoredDatum", "ScoredGroup", "teacher_metrics", "with_advantages"]


@dataclass(frozen=True)
class ScoredDatum:
    """What a teacher says about a datum. n sampled positions."""

    positions_n: np.ndarray
    student_n: np.ndarray
    """Log probabilities with which the tokens were sampled."""
    teacher_n: np.ndarray
    """The teacher's log probabilities of the same tokens."""
    targets: Targets | None
    """The teacher's most likely tokens, if the objective needs them."""


@dataclass(frozen=True)
class ScoredGroup(SampledGroup):
    """A sampled group with the teacher's scores of its datums, in their order."""

    scores: list[ScoredDatum | None] = field(default_factory=list)
    """None for a datum that is too long for the teacher."""


class DistillationSettings(Protocol):
    """The settings of the loop that plain RL does not have."""

    @property
    def kl_penalty_coef(self) -> float: ...
    @property
    def kl_discount_factor(self) -> float: ...
    @property
    def reward_weight(self) -> float: ...
    @property
    def topk(self) -> int: ...
    @property
    def objective(self) -> str: ...


class OnPolicyLoop(Loop):
    """The RL loop with a teacher for each data set."""

    def __init__(
        self, *args: Any, teachers: list[Teacher], settings: DistillationSettings, **options: Any
    ) -> None:
        """Keep the teachers.

        Args:
            args: As for `Loop`.
            teachers: The teacher of each data set.
            settings: The run's settings.
            options: As for `Loop`.
        """
        super().__init__(*args, **options)
        self.teachers = teachers
        self._distillation = settings

    async def sample_group(
        self, builder: EnvGroupBuilder, policy: TokenCompleter, index: int, *, step: int
    ) -> SampledGroup:
        """Roll out a group, and let its teacher score it."""
        sampled = await super().sample_group(builder, policy, index, step=step)
        assert isinstance(builder, TaughtGroup), "the data set of this loop is a TaughtDataset"
        data_D = _zero_advantage_data(sampled.group)
        scores = await gather_or_cancel(self._score(datum, builder) for datum in data_D)
        return ScoredGroup(
            builder, sampled.group, sampled.sampling_client_step, sampled.seconds, scores
        )

    async def build_data(
        self, sampled_P: Sequence[SampledGroup]
    ) -> tuple[list[tinker.Datum], dict[str, float]]:
        """Return datums whose advantages are those of the rewards minus the KL to the teacher."""
        settings = self._distillation
        filled_P = [sampled for sampled in sampled_P if sampled.has_trajectories]
        groups_P = [sampled.group for sampled in filled_P]
        advantages_P = compute_advantages(
            groups_P,
            estimator=self.config.advantage_estimator,
            length_normalization=self.config.length_normalization,
        )
        weighted_P = [settings.reward_weight * advantages_G for advantages_G in advantages_P]
        data_D, metadata_D = assemble_training_data(
            groups_P, weighted_P, include_provenance=self.config.records_stability_info()
        )
        names_D = [_name_of(filled_P[found["group_idx"]].builder) for found in metadata_D]
        scores_D = [score for sampled in filled_P for score in _scores_of(sampled)]
        kept = [
            (datum, score, name)
            for datum, score, name in zip(data_D, scores_D, names_D, strict=True)
            if score is not None
        ]
        taught_D = [
            with_advantages(datum, score, settings.kl_penalty_coef, settings.kl_discount_factor)
            for datum, score, _ in kept
        ]
        self._kept = kept
        metrics = teacher_metrics([score for _, score, _ in kept], [name for *_, name in kept])
        if len(kept) < len(data_D):
            metrics["teacher/too_long"] = len(data_D) - len(kept)
        return taught_D, metrics

    async def submit_update(self, step: TrainingStep, data_D: Sequence[tinker.Datum]) -> None:
        """Submit the gradients and the optimizer step."""
        if not self._distillation.topk:
            await super().submit_update(step, data_D)
            return
        taught_D = [
            TaughtDatum(
                datum, score.positions_n, np.ones(len(score.positions_n)), score.targets, name
            )
            for datum, score, name in self._kept
            if score.targets is not None
        ]
        update = TopKUpdate.from_update(step.update)
        await update.submit(taught_D, self._distillation.objective)
        update.data_D += data_D
        step.update = update

    async def _score(self, datum: tinker.Datum, builder: TaughtGroup) -> ScoredDatum | None:
        mask_N = datum.loss_fn_inputs["mask"].to_numpy()
        positions_n = np.flatnonzero(mask_N)
        student_n = datum.loss_fn_inputs["logprobs"].to_numpy()[positions_n].astype(np.float64)
        placed = place(datum, positions_n, builder.teacher_prompt())
        teacher = self.teachers[builder.dataset_index]
        if not teacher.fits(placed):
            return None
        teacher_n, targets = await teacher.score_with_top(placed, self._distillation.topk)
        return ScoredDatum(positions_n, student_n, teacher_n, targets)


@dataclass
class TopKUpdate(PendingUpdate):
    """An update whose gradient is that of a divergence on the teacher's most likely tokens."""

    pending: PendingStep | None = None

    @classmethod
    def from_update(cls, update: PendingUpdate) -> TopKUpdate:
        """Return an empty update with the same client and optimizer settings."""
        return cls(
            update.training_client, update.loss_fn, update.loss_fn_config, update.adam_params
        )

    async def submit(self, taught_D: list[TaughtDatum], objective: str) -> None:
        """Submit the gradient, and the optimizer step behind it."""
        if not taught_D:
            return
        self.pending = await submit_step(self.training_client, taught_D, objective)
        self._has_gradients = True
        self.step()

    async def finish(self) -> tuple[list[np.ndarray], dict[str, float]]:
        """Wait for the results; return the metrics, with those of `measure` as `top_k/...`."""
        metrics: dict[str, float] = {}
        if self.pending is None:
            return [], metrics
        student_D = await self.pending.finish()
        found = measure(self.pending.taught_B, student_D, "top")
        metrics |= {f"top_k/{name}": value for name, value in found.items()}
        for future in self._steps:
            add_service_metrics(metrics, (await future).metrics)
        return [], metrics


def with_advantages(
    datum: tinker.Datum, score: ScoredDatum, coef: float, discount: float
) -> tinker.Datum:
    """Return the datum with the reverse KL to the teacher taken from its advantages."""
    added_N = np.zeros(len(datum.loss_fn_inputs["mask"].to_numpy()))
    added_N[score.positions_n] = reverse_kl_advantages(
        score.student_n, score.teacher_n, np.ones(len(score.positions_n)), coef, discount
    )
    return add_to_advantages(datum, added_N)


def teacher_metrics(scores_D: Sequence[ScoredDatum], names_D: Sequence[str]) -> dict[str, float]:
    """Measure the KL of student and teacher on the sampled tokens.

    Returns:
        `teacher_kl`, the mean of log p - log q over tokens, also per data set, and its standard
        error over sequences, `teacher_kl_stderr`; `teacher_kl_k3`, an estimate that is never
        negative; `teacher_nll`, the mean of -log q; `teacher_more_likely`, the share of tokens to
        which the teacher gives the higher probability.
    """
    if not scores_D:
        return {}
    student_N = np.concatenate([score.student_n for score in scores_D])
    teacher_N = np.concatenate([score.teacher_n for score in scores_D])
    k1, k3 = kl_estimates(student_N, teacher_N)
    sums_D = np.array([(score.student_n - score.teacher_n).sum() for score in scores_D])
    counts_D = np.array([len(score.positions_n) for score in scores_D])
    metrics = {
        "teacher_kl": float(k1.mean()),
        "teacher_kl_stderr": _ratio_error(sums_D, counts_D),
        "teacher_kl_k3": float(k3.mean()),
        "teacher_nll": float(-teacher_N.mean()),
        "teacher_more_likely": float((k1 < 0).mean()),
    }
    for name in sorted(set(names_D)):
        chosen = np.array([found == name for found in names_D])
        metrics[f"teacher_kl/{name}"] = float(sums_D[chosen].sum() / counts_D[chosen].sum())
    return metrics


def _ratio_error(sums_D: np.ndarray, counts_D: np.ndarray) -> float:
    """Return the standard error of sum / count: the tokens of a sequence are not independent."""
    mean = sums_D.sum() / counts_D.sum()
    return float(np.sqrt(((sums_D - mean * counts_D) ** 2).sum()) / counts_D.sum())


def _zero_advantage_data(group: TrajectoryGroup) -> list[tinker.Datum]:
    """Return the datums of a group in the order in which `build_data` makes them."""
    if not group.trajectories_G:
        return []
    zeros = [np.zeros(len(group.trajectories_G), np.float32)]
    data_D, _ = assemble_training_data([group], zeros, include_provenance=False)
    return data_D


def _scores_of(sampled: SampledGroup) -> list[ScoredDatum | None]:
    assert isinstance(sampled, ScoredGroup), "this loop scores every group"
    return sampled.scores


def _name_of(builder: EnvGroupBuilder) -> str:
    assert isinstance(builder, TaughtGroup), "the data set of this loop is a TaughtDataset"
    return builder.name
