"""The parts of the RL loop that on-policy distillation changes.

A group is scored by its teacher as soon as it is sampled, while other groups are still sampling.
With `async_config`, the next batch is sampled and scored while the student is trained.
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
from tinker_cookbook.distillation.taught_batches import TaughtBatches
from tinker_cookbook.distillation.teacher import Teacher, place
from tinker_cookbook.distillation.top_k import (
    PendingStep,
    TaughtDatum,
    measure,
    ratio_error,
    submit_step,
)
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.loop import Loop, SampledGroup, TrainingStep
from tinker_cookbook.rl.metric_util import RLTestSetEvaluator
from tinker_cookbook.rl.metrics import add_to_advantages
from tinker_cookbook.rl.optimize import PendingUpdate
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, TrajectoryGroup
from tinker_cookbook.runs.training_client import add_service_metrics

if TYPE_CHECKING:
    import tinker

__all__ = [
    "OnPolicyLoop",
    "ScoredDatum",
    "ScoredGroup",
    "cut_at_floor",
    "teacher_metrics",
    "with_advantages",
]


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
    """None for a datum that is too long for the teacher, or has no trained token."""


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
    @property
    def objective_beta(self) -> float: ...
    @property
    def overlap_scoring(self) -> bool: ...
    @property
    def teacher_floor(self) -> float: ...
    @property
    def evaluate_teachers(self) -> bool: ...


class OnPolicyLoop(Loop):
    """The RL loop with a teacher for each data set."""

    def __init__(
        self,
        *args: Any,
        teachers: list[Teacher],
        settings: DistillationSettings,
        given: TaughtBatches | None = None,
        **options: Any,
    ) -> None:
        """Keep the teachers.

        Args:
            args: As for `Loop`.
            teachers: The teacher of each data set.
            settings: The run's settings.
            given: Batches of given sequences, which every step trains too.
            options: As for `Loop`.
        """
        super().__init__(*args, **options)
        self.teachers = teachers
        self._distillation = settings
        self._given = given

    @property
    def evaluates_teachers(self) -> bool:
        """Whether the teachers solve the held-out tasks too."""
        return self._distillation.evaluate_teachers and self.config.eval_every > 0

    def add_teacher_evaluation(self, test_dataset: RLDataset, index: int, name: str) -> None:
        """Let the teacher of data set number `index` solve held-out tasks, once."""
        evaluator = RLTestSetEvaluator(
            test_dataset,
            self.config.max_tokens,
            name,
            temperature=self.config.temperature,
            config=self.settings.config,
            context_window=self._context_window,
        )
        self._evaluators.append(_TeacherEvaluator(evaluator, self.teachers[index]))

    async def sample_batch(
        self, builders_P: Sequence[EnvGroupBuilder], policy: TokenCompleter, step: int
    ) -> list[SampledGroup]:
        """Roll out all groups of a batch at once, each scored as soon as it is sampled."""
        sampled_P = await super().sample_batch(builders_P, policy, step)
        if self._distillation.overlap_scoring:
            return sampled_P
        return list(await gather_or_cancel(self._score_group(sampled) for sampled in sampled_P))

    async def sample_group(
        self, builder: EnvGroupBuilder, policy: TokenCompleter, index: int, *, step: int
    ) -> SampledGroup:
        """Roll out a group, and let its teacher score it."""
        sampled = await super().sample_group(builder, policy, index, step=step)
        return await self._score_group(sampled) if self._distillation.overlap_scoring else sampled

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
        self._kept = [
            (datum, score, name)
            for datum, score, name in zip(data_D, scores_D, names_D, strict=True)
            if score is not None
        ]
        if data_D and not self._kept:
            raise DataValidationError(_too_long(data_D, self.teachers))
        taught_D = [
            with_advantages(datum, score, settings.kl_penalty_coef, settings.kl_discount_factor)
            for datum, score, _ in self._kept
        ]
        return taught_D, {}

    async def submit_update(self, step: TrainingStep, data_D: Sequence[tinker.Datum]) -> None:
        """Submit the gradients and the optimizer step."""
        settings = self._distillation
        if not settings.topk:
            await super().submit_update(step, data_D)
            return
        given_D = []
        if self._given is not None:
            last = step.step + 1 == self.total_steps
            given_D = await self._given.get(step.step, last=last)
        sampled_D = [
            TaughtDatum(
                datum, score.positions_n, np.ones(len(score.positions_n)), score.targets, name
            )
            for datum, score, name in self._kept
            if score.targets is not None
        ]
        update = TopKUpdate.from_update(step.update)
        await update.submit(sampled_D, given_D, settings.objective, settings.objective_beta)
        update.data_D += data_D
        step.update = update

    def _rollout_metrics(self, sampled_P: Sequence[SampledGroup]) -> dict[str, float]:
        metrics = super()._rollout_metrics(sampled_P)
        filled_P = [sampled for sampled in sampled_P if sampled.has_trajectories]
        scores_D = [(s, _name_of(group.builder)) for group in filled_P for s in _scores_of(group)]
        kept = [(score, name) for score, name in scores_D if score is not None]
        metrics |= teacher_metrics([score for score, _ in kept], [name for _, name in kept])
        if len(kept) < len(scores_D):
            metrics["teacher/too_long"] = len(scores_D) - len(kept)
        return metrics

    async def _score_group(self, sampled: SampledGroup) -> SampledGroup:
        builder = sampled.builder
        assert isinstance(builder, TaughtGroup), "the data set of this loop is a TaughtDataset"
        data_D = _zero_advantage_data(sampled.group)
        scores = await gather_or_cancel(self._score(datum, builder) for datum in data_D)
        return ScoredGroup(
            builder, sampled.group, sampled.sampling_client_step, sampled.seconds, scores
        )

    async def _score(self, datum: tinker.Datum, builder: TaughtGroup) -> ScoredDatum | None:
        mask_N = datum.loss_fn_inputs["mask"].to_numpy()
        positions_n = np.flatnonzero(mask_N)
        if not len(positions_n):
            return None
        student_n = datum.loss_fn_inputs["logprobs"].to_numpy()[positions_n].astype(np.float64)
        placed = place(datum, positions_n, builder.teacher_prompt())
        teacher = self.teachers[builder.dataset_index]
        if not teacher.fits(placed):
            return None
        teacher_n, targets = await teacher.score_with_top(placed, self._distillation.topk)
        score = ScoredDatum(positions_n, student_n, teacher_n, targets)
        return cut_at_floor(score, self._distillation.teacher_floor)


class _TeacherEvaluator(SamplingClientEvaluator):
    """Evaluates the teacher at the first evaluation; it does not change."""

    def __init__(self, evaluator: RLTestSetEvaluator, teacher: Teacher) -> None:
        self._evaluator = evaluator
        self._teacher = teacher
        self._found: dict[str, float] | None = None

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        if self._found is None:
            self._found = await self._evaluator(self._teacher.client)
        return self._found


@dataclass
class TopKUpdate(PendingUpdate):
    """An update whose gradient is that of a divergence on the teacher's most likely tokens."""

    pending: PendingStep | None = None
    num_sampled: int = 0
    """Number of sequences that the student has sampled; given ones come after them."""

    @classmethod
    def from_update(cls, update: PendingUpdate) -> TopKUpdate:
        """Return an empty update with the same client and optimizer settings."""
        return cls(
            update.training_client, update.loss_fn, update.loss_fn_config, update.adam_params
        )

    async def submit(
        self,
        sampled_D: list[TaughtDatum],
        given_D: list[TaughtDatum],
        objective: str,
        beta: float,
    ) -> None:
        """Submit the gradient, and the optimizer step behind it."""
        if not sampled_D and not given_D:
            return
        taught_D = [*sampled_D, *given_D]
        self.pending = await submit_step(self.training_client, taught_D, objective, beta)
        self.num_sampled = len(sampled_D)
        self._has_gradients = True
        self.step()

    async def finish(self) -> tuple[list[np.ndarray], dict[str, float]]:
        """Wait for the results.

        Returns:
            For each datum an array of nan, because the trainer scores the teacher's tokens and not
            the sampled ones; and the metrics: those of `measure` as `top_k/...` for what the
            student has sampled, and as `given/...` for given sequences.
        """
        metrics: dict[str, float] = {}
        unknown_D = [np.full(datum.model_input.length, np.nan) for datum in self.data_D]
        if self.pending is None:
            return unknown_D, metrics
        student_D = await self.pending.finish()
        taught_D, cut = self.pending.taught_B, self.num_sampled
        for name, part in (("top_k", slice(0, cut)), ("given", slice(cut, None))):
            if taught_D[part]:
                found = measure(taught_D[part], student_D[part], "top")
                metrics |= {f"{name}/{key}": value for key, value in found.items()}
        for future in self._steps:
            add_service_metrics(metrics, (await future).metrics)
        return unknown_D, metrics


def cut_at_floor(score: ScoredDatum, floor: float) -> ScoredDatum:
    """Return the score up to and including the first token that is improbable to the teacher.

    The teacher would not have written such a token, so what it says about the tokens behind it is
    not about the task: in a trained student, it shows as a change of unrelated replies.

    Args:
        score: Of one sequence.
        floor: Probability by the teacher below which a token ends what is used; 0: nothing is cut.
    """
    if floor <= 0:
        return score
    improbable = np.flatnonzero(score.teacher_n < np.log(floor))
    if not len(improbable):
        return score
    kept = slice(0, int(improbable[0]) + 1)
    targets = score.targets
    return ScoredDatum(
        score.positions_n[kept],
        score.student_n[kept],
        score.teacher_n[kept],
        targets and Targets(targets.tokens_nK[kept], targets.logprobs_nK[kept]),
    )


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
        `teacher_kl`, the mean of log p - log q over tokens, and `teacher_kl_stderr`, its standard
        error over sequences, both also per data set; `teacher_kl_k3`, an estimate that is never
        negative; `teacher_nll`, the mean of -log q, and `student_entropy`, the mean of -log p (an
        estimate of the student's entropy); `teacher_more_likely`, the share of tokens to which the
        teacher gives the higher probability.
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
        "teacher_kl_stderr": ratio_error(sums_D, counts_D),
        "teacher_kl_k3": float(k3.mean()),
        "teacher_nll": float(-teacher_N.mean()),
        "student_entropy": float(-student_N.mean()),
        "teacher_more_likely": float((k1 < 0).mean()),
    }
    for name in sorted(set(names_D)):
        chosen = np.array([found == name for found in names_D])
        mean = sums_D[chosen].sum() / counts_D[chosen].sum()
        metrics[f"teacher_kl/{name}"] = float(mean)
        metrics[f"teacher_kl_stderr/{name}"] = ratio_error(sums_D[chosen], counts_D[chosen])
    return metrics


def _too_long(data_D: Sequence[tinker.Datum], teachers: Sequence[Teacher]) -> str:
    windows = sorted({t.context_window for t in teachers if t.context_window is not None})
    lengths = [datum.model_input.length for datum in data_D]
    return (
        f"no sequence of the batch can be scored: they have {min(lengths)} to {max(lengths)} "
        "tokens, to which the teacher's own prompt may add, and the teachers read fewer than "
        f"{', '.join(map(str, windows)) or 'an unknown number'}. Use shorter prompts, a smaller "
        "max_tokens or, in self-distillation, a larger max_context_length."
    )


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
