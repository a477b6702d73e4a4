"""Off-policy distillation: train on given conversations, with a teacher's probabilities as targets.

For each trained position the teacher names K tokens and their log probabilities. They are computed
once and kept in the run directory (`target_cache`); the next batch is scored while the current one
is trained. `objectives` says what each objective means, `top_k` computes the step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence

import chz

from tinker_cookbook.distillation.compatibility import (
    check_data_format,
    check_same_tokenizer,
    data_format_of,
)
from tinker_cookbook.distillation.mixture import Mixture, divide_batch, load_examples
from tinker_cookbook.distillation.target_cache import TargetCache
from tinker_cookbook.distillation.taught_batches import TaughtBatches, teach
from tinker_cookbook.distillation.teacher import Teacher, TeacherConfig, open_teachers
from tinker_cookbook.distillation.top_k import (
    OBJECTIVES,
    HeldOutTeacherKL,
    TaughtDatum,
    check_objective,
    measure,
    submit_step,
    target_kind,
)
from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.runs.training_client import failed_step
from tinker_cookbook.supervised.train import run_evals
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.lr_scheduling import LRSchedule
from tinker_cookbook.utils.progress import ShownNumbers

__all__ = ["Config", "DatasetWithTeacher", "OffPolicyOptions", "RunResult", "main", "open_data"]

SHOWN: ShownNumbers = (
    ("teacher KL", "teacher_kl", ".4f"),
    ("held-out", "test/teacher_kl", ".4f"),
    ("teacher mass", "teacher_mass", ".3f"),
)


@chz.chz
class DatasetWithTeacher:
    """Conversations, and the teacher for them."""

    dataset_builder: SupervisedDatasetBuilder = chz.field(
        doc="Builder of the training and held-out data."
    )
    teacher_config: TeacherConfig = chz.field(doc="The teacher.")
    weight: float = chz.field(default=1.0, doc="Share of each batch, relative to other data sets.")
    name: str | None = chz.field(
        default=None, doc="Name in the metrics; default: dataset_0, dataset_1, and so on."
    )


@chz.chz
class OffPolicyOptions(SharedOptions):
    """Off-policy distillation; a recipe's config adds its own settings."""

    lr_schedule: LRSchedule = chz.field(
        default="constant", doc="Learning rate over time: linear, cosine or constant."
    )
    objective: str = chz.field(
        default="forward_kl",
        doc=f"What is minimized: {', '.join(OBJECTIVES)}. The first three count the tokens outside "
        "the top K as one; renormalized leaves them out, which is biased; sampled draws K tokens "
        "from the teacher.",
    )
    objective_beta: float = chz.field(
        default=0.5, doc="Share of the teacher in the mixture of jensen_shannon, between 0 and 1."
    )
    n_teacher_targets: int = chz.field(default=20, doc="Teacher's tokens per position (K).")
    n_held_out_targets: int | None = chz.field(
        default=None,
        doc="Teacher's tokens per position of held-out data; None: n_teacher_targets. More tokens "
        "bring the held-out KL closer to that of the whole vocabulary.",
    )
    teacher_concurrency: int = chz.field(
        default=64, doc="Maximum number of requests to a teacher at a time."
    )
    batch_size: int = chz.field(default=64, doc="Conversations per optimizer step.")
    num_epochs: int = chz.field(
        default=1, doc="Passes over the data set that is used up first; others continue."
    )
    save_every: int = chz.field(default=10, doc="Steps between checkpoints; 0: only at the end.")
    eval_every: int = chz.field(default=20, doc="Steps between evaluations; 0: none.")

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        check_objective(self.objective, self.objective_beta)


@chz.chz
class Config(OffPolicyOptions):
    """All settings of the loop."""

    # The type is narrower than in the options. This is safe, since chz objects never change.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model of the student, as a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(
        default="off_policy_distillation", doc="Name recorded with the session."
    )
    dataset_configs: list[DatasetWithTeacher] = chz.field(doc="Data sets with their teachers.")
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Builders of evaluators that run every eval_every steps."
    )

    @chz.validate
    def _check_datasets(self) -> None:
        if not self.dataset_configs:
            raise ConfigurationError("dataset_configs is empty; give one or more data sets.")
        self.datums_per_dataset()

    def datums_per_dataset(self) -> list[int]:
        """Return the number of datums of each data set in a batch."""
        return divide_batch(self.batch_size, [config.weight for config in self.dataset_configs])

    def dataset_names(self) -> list[str]:
        """Return the names of the data sets in the metrics."""
        return [
            config.name or f"dataset_{index}" for index, config in enumerate(self.dataset_configs)
        ]


async def main(config: Config) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, a teacher, the service or the old run directory forbids
            the run.
        DataError: if the data cannot be used.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    async with open_run(config, config.recipe_name) as run:
        config = run.config
        _check_datasets(config)
        async with open_data(config.dataset_configs) as (datasets, held_out):
            mixture = Mixture(
                datasets,
                config.datums_per_dataset(),
                num_epochs=config.num_epochs,
                seed=config.seed,
            )
            has_begun = await run.begin(
                _count_steps(config, mixture),
                data_fingerprint=_fingerprint(datasets),
                renderer_name=config.renderer_name,
                shown=SHOWN,
            )
            if not has_begun:
                return run.result()
            loop = _Loop(run, mixture, await _open_teachers(run))
            await loop.add_held_out(held_out)
            return await loop.train()


class _Loop:
    """The state of a run between its first and last step."""

    def __init__(self, run: Run[Config], mixture: Mixture, teachers: list[Teacher]) -> None:
        config = run.config
        self._run = run
        self._config = config
        self._teachers = teachers
        self._names = config.dataset_names()
        self._batches = TaughtBatches(
            mixture,
            teachers,
            self._names,
            count=config.n_teacher_targets,
            kind=target_kind(config.objective),
        )
        self._evaluators: list[Evaluator] = [build() for build in config.evaluator_builders]

    async def add_held_out(self, held_out: Sequence[SupervisedDataset | None]) -> None:
        """Evaluate held-out data too."""
        if not self._config.eval_every:
            return
        examples = [
            example
            for index, dataset in enumerate(held_out)
            if dataset is not None and len(dataset)
            for step in range(len(dataset))
            for example in load_examples(dataset, step, index)
        ]
        if examples:
            count = self._config.n_held_out_targets or self._config.n_teacher_targets
            where = "held-out data"
            taught = await teach(
                examples, self._teachers, self._names, where, count=count, kind="top"
            )
            self._evaluators.insert(0, HeldOutTeacherKL(taught))

    async def train(self) -> RunResult:
        """Do the remaining steps, then evaluate and save."""
        run, total = self._run, self._run.total_steps
        try:
            for step in range(run.start_step, total):
                taught = await self._batches.get(step, last=step + 1 == total)
                await self._step(step, taught)
        finally:
            self._batches.cancel()
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            run.write_row(total, evaluated | window.get_timing_metrics())
        return await run.finish({"batch": total}, evaluated)

    async def _step(self, step: int, taught: list[TaughtDatum]) -> None:
        """Evaluate, submit one step, wait for it, and write its row."""
        import tinker

        run = self._run
        with trace.trace_iteration(step) as window:
            evaluated = await self._evaluate(step)
            try:
                pending = await submit_step(
                    run.training_client,
                    taught,
                    self._config.objective,
                    self._config.objective_beta,
                )
                update = run.training_client.optim_step(run.adam_params(step))
                # Directly after the optimizer step, so that it contains exactly the steps so far.
                saving = run.submit_checkpoint({"batch": step + 1}, steps_done=step + 1)
                student = await pending.finish()
                result = await update
            except (tinker.TinkerError, ValueError) as error:
                raise failed_step(error, step) from error
        metrics = measure(taught, student, target_kind(self._config.objective))
        metrics |= {
            "progress": step / run.total_steps,
            "learning_rate": run.learning_rate(step),
            "num_tokens": sum(one.datum.model_input.length for one in taught),
            "num_loss_tokens": sum(len(one.positions_n) for one in taught),
            "teacher/scored": sum(teacher.num_scored for teacher in self._teachers),
        }
        await run.finish_step(
            step, {**metrics, **(result.metrics or {}), **evaluated}, window, saving
        )

    async def _evaluate(self, step: int) -> dict[str, float]:
        """Run the evaluators if they are due before `step`."""
        every = self._config.eval_every
        last = step == self._run.total_steps
        if not every or not self._evaluators or not (last or step % every == 0):
            return {}
        async with trace.scope_span("evals"):
            return await run_evals(self._evaluators, self._run.training_client, step)


async def _open_teachers(run: Run[Config]) -> list[Teacher]:
    return await open_teachers(
        run,
        [config.teacher_config for config in run.config.dataset_configs],
        cache=await asyncio.to_thread(TargetCache, run.log_path),
        concurrency=run.config.teacher_concurrency,
        count=run.config.n_teacher_targets,
        count_name="n_teacher_targets",
        kind=target_kind(run.config.objective),
    )


def _check_datasets(config: Config) -> None:
    """Refuse a teacher or data that do not fit the student, before anything is opened.

    Raises:
        ConfigurationError: naming the tokenizers or the chat formats.
    """
    for index, dataset in enumerate(config.dataset_configs):
        check_same_tokenizer(config.model_name, dataset.teacher_config.base_model)
        data_format = data_format_of(dataset.dataset_builder)
        check_data_format(config.renderer_name, data_format, f"dataset_configs[{index}]")


@contextlib.asynccontextmanager
async def open_data(
    configs: Sequence[DatasetWithTeacher],
) -> AsyncIterator[tuple[list[SupervisedDataset], list[SupervisedDataset | None]]]:
    """Open the training and the held-out data, and close them at the end of the block."""
    with contextlib.ExitStack() as opened:
        datasets, held_out = [], []
        for dataset_config in configs:
            # In a thread, because a builder may sample from the service.
            train, test = await asyncio.to_thread(dataset_config.dataset_builder)
            for dataset in filter(None, (train, test)):
                opened.callback(dataset.close)
            for line in train.summary:
                print(f"data     {line}", flush=True)
            datasets.append(train)
            held_out.append(test)
        yield datasets, held_out


def _count_steps(config: Config, mixture: Mixture) -> int:
    steps = mixture.num_steps
    if steps == 0:
        raise ConfigurationError(
            f"batch_size={config.batch_size} is more than the data; use a smaller number or more "
            "data."
        )
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _fingerprint(datasets: Sequence[SupervisedDataset]) -> str | None:
    """Return a value that changes with the data; None if a data set does not have one."""
    found = [dataset.fingerprint for dataset in datasets]
    if any(one is None for one in found):
        return None
    return hashlib.sha256("\n".join(map(str, found)).encode()).hexdigest()[:16]
