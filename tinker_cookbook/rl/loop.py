"""The parts that all RL loops share: sample a group, evaluate, update, save, write a step's row.

In names of arrays, P is the number of groups in a batch and D the number of datums.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tinker_cookbook.completers import TinkerTokenCompleter, TokenCompleter, derive_seed
from tinker_cookbook.eval.evaluators import SamplingClientEvaluator
from tinker_cookbook.exceptions import (
    AllTrajectoriesFailedError,
    ConfigurationError,
    TrainingError,
)
from tinker_cookbook.rl.config import Config
from tinker_cookbook.rl.credit import Advantages
from tinker_cookbook.rl.data_processing import (
    assemble_training_data,
    remove_constant_reward_groups,
)
from tinker_cookbook.rl.metric_util import RLTestSetEvaluator, compute_trajectory_metrics
from tinker_cookbook.rl.metrics import SamplingGap, compute_post_kl, incorporate_kl_penalty
from tinker_cookbook.rl.optimize import PendingUpdate, submit_substeps
from tinker_cookbook.rl.rollout_correction import correct_rollouts
from tinker_cookbook.rl.rollout_logging import RolloutSummaryExportConfig, RolloutSummaryGroup
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.rollouts import RolloutErrorCounter, rollout_group
from tinker_cookbook.rl.transcripts.page import write_transcripts
from tinker_cookbook.rl.transcripts.token_rows import TrainedTokens, collect_trained_tokens
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, Trajectory, TrajectoryGroup
from tinker_cookbook.runs.best_checkpoint import BestWeights
from tinker_cookbook.runs.checkpoint_manager import FinishSave
from tinker_cookbook.runs.open_run import Run, RunResult
from tinker_cookbook.runs.training_client import snapshot_weights
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.misc_utils import iteration_dir
from tinker_cookbook.utils.progress import ProgressReporter

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["Loop", "SampledGroup", "TrainingStep"]

logger = logging.getLogger(__name__)

SHOWN = (
    ("reward", "env/all/reward/total", ".3f"),
    ("held-out", "test/env/all/reward/total", ".3f"),
    ("mixed groups", "env/all/by_group/frac_mixed", ".2f"),
    ("kl", "optim/kl_sample_train_v2", ".1e"),
)
DIVERGENCE_LIMIT = 1e-3
"""Lowest `optim/kl_sample_train_v2` that gives a warning: about 0.03 nats per token."""
DIVERGENCE_FACTOR = 5
"""The warning also requires this multiple of the value measured in the run's first step."""
LONG_SAMPLING_SECONDS = 15.0


@dataclass(frozen=True)
class SampledGroup:
    """A finished group, and the step whose weights it was sampled from."""

    builder: EnvGroupBuilder
    group: TrajectoryGroup
    sampling_client_step: int
    seconds: float = 0.0

    @property
    def has_trajectories(self) -> bool:
        """False if every rollout of the group failed."""
        return bool(self.group.trajectories_G)


@dataclass
class TrainingStep:
    """A step in progress: the sampled groups, and the update submitted for them."""

    step: int
    update: PendingUpdate
    window: trace.IterationWindow
    sampled_P: list[SampledGroup] = field(default_factory=list)
    """All groups, including failed ones and those with equal rewards."""
    metrics: dict[str, Any] = field(default_factory=dict)
    saving: FinishSave | None = None


class Loop:
    """The parts of a run between its first and last step; each kind of loop orders them."""

    def __init__(
        self,
        run: Run[Config],
        dataset: RLDataset,
        *,
        context_window: int | None = None,
        kl_reference_client: tinker.SamplingClient | None = None,
    ) -> None:
        from tinker_cookbook import tokenizer_utils

        self.config = run.config
        self.dataset = dataset
        self.total_steps = run.total_steps
        self.settings = self.config.rollout_settings()
        self._run = run
        self._tokenizer: Tokenizer = tokenizer_utils.get_tokenizer(self.config.model_name)
        self._context_window = context_window
        self._kl_reference_client = kl_reference_client
        self._credit = self.config.credit_settings()
        self._evaluators = [build() for build in self.config.evaluator_builders]
        self._errors = RolloutErrorCounter()
        self._best = BestWeights(
            run, self.config.best_metric, patience=self.config.early_stopping_evals
        )
        self._floor: SamplingGap | None = None
        self._origins: dict[int, Trajectory] = {}
        """The trajectory of each datum in use, by `id` of the datum."""

    def add_held_out(self, test_dataset: RLDataset | None, name: str = "test") -> None:
        """Evaluate on held-out tasks too."""
        if test_dataset is None or len(test_dataset) == 0 or not self.config.eval_every:
            return
        held_out = RLTestSetEvaluator(
            test_dataset,
            self.config.max_tokens,
            name,
            num_groups_to_log=self.config.num_groups_to_log,
            temperature=self.config.temperature,
            config=self.settings.config,
            context_window=self._context_window,
        )
        self._evaluators.insert(0, held_out)

    # ---- sampling ----

    async def snapshot(self) -> tinker.SamplingClient:
        """Return a sampling client of the weights after all requests submitted so far."""
        recorded = self.config.records_stability_info()
        options = {"record_stability_info": True} if recorded else {}
        async with trace.scope_span("save_weights"):
            return await snapshot_weights(self._run.training_client, **options)

    def policy(self, sampling_client: tinker.SamplingClient, step: int) -> TokenCompleter:
        """Return the policy for the rollouts of a step, seeded by the step."""
        return TinkerTokenCompleter(
            sampling_client,
            self.config.max_tokens,
            self.config.temperature,
            self._context_window,
            seed=derive_seed(self.config.seed, "train", step),
        )

    async def sample_group(
        self, builder: EnvGroupBuilder, policy: TokenCompleter, index: int, *, step: int
    ) -> SampledGroup:
        """Roll out group number `index` of a batch with the weights of `step`."""
        started = time.perf_counter()
        group = await rollout_group(builder, policy.for_rollout(index), self.settings)
        self._errors.ingest(group)
        return SampledGroup(builder, group, step, time.perf_counter() - started)

    async def sample_batch(
        self, builders_P: Sequence[EnvGroupBuilder], policy: TokenCompleter, step: int
    ) -> list[SampledGroup]:
        """Roll out all groups of a batch at once.

        Raises:
            AllTrajectoriesFailedError: if no group is left.
        """
        watch = _SamplingWatch(self._run.progress, len(builders_P))
        async with trace.scope_span("sampling"):
            sampled_P = await gather_or_cancel(
                watch.follow(self.sample_group(builder, policy, index, step=step))
                for index, builder in enumerate(builders_P)
            )
        for attempt in range(1, self.config.max_refill_rounds + 1):
            sampled_P += await self._refill(sampled_P, len(builders_P), policy, step, attempt)
        check_batch(sampled_P, self.config)
        return sampled_P

    async def _refill(
        self,
        sampled_P: Sequence[SampledGroup],
        wanted: int,
        policy: TokenCompleter,
        step: int,
        attempt: int,
    ) -> list[SampledGroup]:
        """Sample as many groups as the batch lacks because all rewards of a group are equal.

        They are tasks of other steps, chosen by the step and the attempt, so a resumed run repeats
        them. Source: dynamic sampling, arXiv:2503.14476 (DAPO).
        """
        mixed = sum(self._is_mixed(sampled) for sampled in sampled_P)
        if mixed >= wanted:
            return []
        distance = max(1, len(self.dataset) // (self.config.max_refill_rounds + 1))
        index = (step + attempt * distance) % len(self.dataset)
        builders_P = await asyncio.to_thread(self.dataset.get_batch, index)
        first = len(sampled_P)
        self._run.progress.message(f"{wanted - mixed} of {wanted} groups are sampled again")
        async with trace.scope_span("refill"):
            return await gather_or_cancel(
                self.sample_group(builder, policy, first + number, step=step)
                for number, builder in enumerate(builders_P[: wanted - mixed])
            )

    def _is_mixed(self, sampled: SampledGroup) -> bool:
        """Return whether the group is trained on."""
        return sampled.has_trajectories and not self._credit.is_constant(
            self._credit.shape(sampled.group)
        )

    # ---- training ----

    def begin_step(self, step: int, window: trace.IterationWindow) -> TrainingStep:
        """Return an empty step with its learning rate."""
        config = self.config
        update = PendingUpdate(
            self._run.training_client,
            config.training_loss_fn(),
            config.loss_fn_config,
            self._run.adam_params(step),
        )
        started = TrainingStep(step, update, window)
        started.metrics |= {
            "progress/batch": step,
            "progress/done_frac": (step + 1) / self.total_steps,
            "optim/lr": self._run.learning_rate(step),
        }
        return started

    async def build_data(
        self, sampled_P: Sequence[SampledGroup]
    ) -> tuple[list[tinker.Datum], dict[str, float]]:
        """Return the datums of groups, with advantages and KL penalty, and their metrics."""
        groups_P, advantages_P = self._assign_credit(sampled_P)
        data_D, metadata_D = assemble_training_data(
            groups_P,
            advantages_P,
            include_provenance=self.config.records_stability_info(),
            train_truncated=self.config.train_truncated,
        )
        metrics: dict[str, float] = {}
        if self._kl_reference_client is not None and self.config.kl_penalty_coef and data_D:
            data_D, metrics = await incorporate_kl_penalty(
                data_D,
                self._kl_reference_client,
                self.config.kl_penalty_coef,
                self.config.kl_discount_factor,
            )
        if self.config.rollout_correction != "none":
            data_D, found = await correct_rollouts(
                data_D,
                self._run.training_client,
                self.config.rollout_correction,
                self.config.correction_limit,
            )
            metrics |= found
        for datum, place in zip(data_D, metadata_D, strict=True):
            trajectories_G = groups_P[place["group_idx"]].trajectories_G
            self._origins[id(datum)] = trajectories_G[place["traj_idx"]]
        return data_D, metrics

    def _assign_credit(
        self, sampled_P: Sequence[SampledGroup]
    ) -> tuple[list[TrajectoryGroup], Advantages]:
        """Return the groups to train on, and the advantages of their members or turns."""
        groups_P = [
            self._credit.shape(sampled.group) for sampled in sampled_P if sampled.has_trajectories
        ]
        if self.config.remove_constant_reward_groups:
            groups_P = remove_constant_reward_groups(groups_P, self._credit.is_constant)
        return groups_P, self._credit.advantages(groups_P)

    async def submit_update(self, step: TrainingStep, data_D: Sequence[tinker.Datum]) -> None:
        """Submit the gradients of a batch with their optimizer steps."""
        submit_substeps(step.update, data_D, self.config.num_substeps)

    def submit_checkpoint(self, step: TrainingStep) -> None:
        """Queue the checkpoint that is due; call it directly after the optimizer step."""
        done = step.step + 1
        step.saving = self._run.submit_checkpoint({"batch": done}, steps_done=done)

    async def finish_step(
        self, step: TrainingStep, next_client: tinker.SamplingClient | None = None
    ) -> None:
        """Wait for the update, write the step's row and transcripts, then its checkpoint record.

        Args:
            step: The step, with its update submitted.
            next_client: The weights after it, for `compute_post_kl`.
        """
        with trace.trace_iteration(step.step, window=step.window):
            logprobs_D, found = await step.update.finish()
            if self.config.compute_post_kl and next_client is not None:
                found |= await compute_post_kl(step.update.data_D, next_client)
        metrics = step.metrics | self._rollout_metrics(step.sampled_P) | found
        metrics |= self._count_data(step.update)
        self._measure_floor(step)
        self._warn(metrics, step)
        trained = collect_trained_tokens(self._origins, step.update.data_D, logprobs_D)
        self._write_transcripts(step, trained)
        await self._run.finish_step(step.step, metrics, step.window, step.saving)

    def _rollout_metrics(self, sampled_P: Sequence[SampledGroup]) -> dict[str, float]:
        filled = [sampled for sampled in sampled_P if sampled.has_trajectories]
        if not filled:
            return self._errors.get_metrics()
        seconds = [sampled.seconds for sampled in filled]
        return {
            **compute_trajectory_metrics(
                [sampled.group for sampled in filled],
                [sampled.builder.logging_tags() for sampled in filled],
            ),
            **self._errors.get_metrics(),
            "time/sampling_time_max": max(seconds),
            "time/sampling_time_mean": sum(seconds) / len(seconds),
        }

    def _count_data(self, update: PendingUpdate) -> dict[str, float]:
        return {
            "num_datums": len(update.data_D),
            "num_tokens": sum(datum.model_input.length for datum in update.data_D),
            "optim/num_steps": update.num_steps,
        }

    def _measure_floor(self, step: TrainingStep) -> None:
        """Measure once the gap between sampler and trainer when both use the same weights."""
        same_weights = all(
            sampled.sampling_client_step == step.step
            for sampled in step.sampled_P
            if sampled.has_trajectories
        )
        gap = step.update.gap
        if self._floor is None and gap is not None and same_weights and math.isfinite(gap.mean):
            self._floor = gap
            self._run.progress.message(gap.describe())

    def _warn(self, metrics: dict[str, Any], step: TrainingStep) -> None:
        divergence = metrics.get("optim/kl_sample_train_v2", 0.0)
        if not math.isfinite(divergence):
            raise TrainingError(
                f"the log probabilities of step {step.step} are not finite: the run has diverged; "
                f"lower learning_rate={self.config.learning_rate} or set grad_clip_norm, and start "
                "over."
            )
        on_policy = self.config.async_config is None and self.config.num_substeps == 1
        floor = 0.0 if self._floor is None else self._floor.half_mean_square
        limit = max(DIVERGENCE_LIMIT, DIVERGENCE_FACTOR * floor)
        if on_policy and divergence > limit:
            logger.warning(
                "step %d: sampler and trainer disagree about the sampled tokens "
                "(optim/kl_sample_train_v2=%.3g, above %.2g; %.2g at the start); their gradients "
                "are biased",
                step.step,
                divergence,
                limit,
                floor,
            )
        if not update_has_data(step):
            ends = Counter(
                trajectory.stop_reason
                for sampled in step.sampled_P
                for trajectory in sampled.group.trajectories_G
            )
            logger.warning(
                "step %d has nothing to train on and is skipped (episodes by their end: %s)",
                step.step,
                ", ".join(f"{reason} {count}" for reason, count in ends.most_common()),
            )

    def _write_transcripts(self, step: TrainingStep, trained: dict[int, TrainedTokens]) -> None:
        if not self.config.rollout_json_export:
            return
        groups = [
            RolloutSummaryGroup(
                sampled.group, sampled.builder.logging_tags(), sampled.sampling_client_step
            )
            for sampled in step.sampled_P
        ]
        write_transcripts(
            self._export("train", "train", step.step),
            groups,
            num_groups_on_page=self.config.num_groups_to_log,
            estimator=self.config.advantage_estimator,
            trained=trained,
        )

    # ---- evaluation ----

    async def evaluate(self, step: int, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Run the evaluators that are due before `step`, and save the weights if they are best."""
        every = self.config.eval_every
        if not every or not self._evaluators:
            return {}
        if step % every and step != self.total_steps:
            return {}
        metrics: dict[str, float] = {}
        async with trace.scope_span("evals"):
            for evaluator in self._evaluators:
                metrics |= await self._run_evaluator(evaluator, step, sampling_client)
        logger.info("evaluation after %d steps: %s", step, metrics)
        await self._best.update(step, metrics)
        return metrics

    async def _run_evaluator(
        self, evaluator: SamplingClientEvaluator, step: int, client: tinker.SamplingClient
    ) -> dict[str, float]:
        if not isinstance(evaluator, RLTestSetEvaluator):
            return await evaluator(client)
        export = None
        if self.config.rollout_json_export:
            export = self._export(evaluator.name, f"eval_{evaluator.name}", step)
        return await evaluator(client, rollout_summary_export=export)

    def _export(self, split: str, base_name: str, step: int) -> RolloutSummaryExportConfig:
        folder = iteration_dir(self.config.log_path, step)
        return RolloutSummaryExportConfig(split, step, base_name, step, folder, self._tokenizer)

    def stop_if_exhausted(self, step: int) -> bool:
        """Return whether the run ends before `step`, because nothing improves any more."""
        if not self._best.is_exhausted:
            return False
        self._run.progress.message(self._best.describe())
        self.total_steps = step
        return True

    async def end(self, sampling_client: tinker.SamplingClient) -> RunResult:
        """Evaluate, write that row, and save; in this order, so that a crash loses nothing."""
        with trace.trace_iteration(self.total_steps) as window:
            evaluated = await self.evaluate(self.total_steps, sampling_client)
        if evaluated:
            self._run.write_row(self.total_steps, evaluated | window.get_timing_metrics())
        return await self._run.finish({"batch": self.total_steps}, evaluated)


def check_batch(sampled_P: Sequence[SampledGroup], config: Config) -> None:
    """Refuse a batch whose gradient would be 0.

    Raises:
        AllTrajectoriesFailedError: if every group failed.
        ConfigurationError: if every group has one member and the KL penalty is off.
    """
    filled = [sampled.group for sampled in sampled_P if sampled.has_trajectories]
    if not filled:
        errors = [e.error_message for sampled in sampled_P for e in sampled.group.rollout_errors]
        raise AllTrajectoriesFailedError(
            f"all {len(sampled_P)} groups of the batch failed; last error: "
            f"{errors[-1] if errors else 'the data set returned no groups'}. "
            "rollout_error_tolerance=False shows the whole traceback."
        )
    alone = all(len(group.trajectories_G) == 1 and not group.rollout_errors for group in filled)
    if alone and not config.kl_penalty_coef:
        raise ConfigurationError("group_size=1 gives every advantage 0; use 2 or more.")


def update_has_data(step: TrainingStep) -> bool:
    """Return whether anything was sent to the trainer."""
    return bool(step.update.data_D)


class _SamplingWatch:
    """Prints the progress of a long sampling phase."""

    def __init__(self, progress: ProgressReporter, num_groups: int) -> None:
        self._progress = progress
        self._num_groups = num_groups
        self._num_done = 0
        self._num_tokens = 0
        self._started = self._last_told = time.monotonic()

    async def follow(self, sampling: Any) -> SampledGroup:
        sampled: SampledGroup = await sampling
        self._num_done += 1
        self._num_tokens += sum(
            len(turn.ac.tokens)
            for trajectory in sampled.group.trajectories_G
            for turn in trajectory.transitions
        )
        now = time.monotonic()
        if now - self._last_told >= LONG_SAMPLING_SECONDS and self._num_done < self._num_groups:
            self._last_told = now
            rate = self._num_tokens / (now - self._started)
            self._progress.message(
                f"sampled {self._num_done}/{self._num_groups} groups, {rate:.0f} tokens/s"
            )
        return sampled
