"""Self-distillation: the teacher is the same model with a demonstration in its prompt.

The student replies to a question. The teacher, which also sees a good answer, scores that reply.
Training moves the student towards the teacher on the student's own replies, so it learns the
demonstrated skill with little change elsewhere. The teacher is the model that the run started from;
with `teacher_sync_every`, it is replaced by the student of that moment. A replaced teacher is saved
and named in the checkpoint, so that a resumed run continues with it.

Source: arXiv:2601.19897.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import chz

from tinker_cookbook.distillation.compatibility import check_data_format, data_format_of
from tinker_cookbook.distillation.datasets import HasTeacherPrompt, TaughtGroup
from tinker_cookbook.distillation.on_policy_loop import OnPolicyLoop
from tinker_cookbook.distillation.sdft_datums import (
    MAX_CONTEXT_LENGTH,
    build_reverse_kl_datums,
    build_topk_distillation_datums,
    compute_sdft_advantages,
    reverse_kl_custom_loss,
)
from tinker_cookbook.distillation.teacher import Teacher, TeacherConfig, open_teachers
from tinker_cookbook.distillation.train_on_policy import SHOWN, OnPolicyOptions
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import load_renderer
from tinker_cookbook.rl import config as rl_config
from tinker_cookbook.rl.loop import TrainingStep
from tinker_cookbook.rl.train import choose_loop, context_window
from tinker_cookbook.rl.types import (
    Env,
    EnvGroupBuilder,
    Metrics,
    RLDataset,
    RLDatasetBuilder,
    Trajectory,
)
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.utils.sdk_compat import create_client

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Message, Renderer

__all__ = [
    "DEFAULT_DEMO_TEMPLATE",
    "Config",
    "SDFTBatchProvider",
    "SDFTBuilder",
    "build_reverse_kl_datums",
    "build_sdft_teacher_prompt",
    "build_topk_distillation_datums",
    "compute_sdft_advantages",
    "main",
    "reverse_kl_custom_loss",
]

DEFAULT_DEMO_TEMPLATE = """{question}

Answer with the help of this note, in your own words:
{golden_answer}"""
"""The teacher's message: `{question}` and `{golden_answer}` are replaced."""
TEACHER_PATH = "teacher_path"
"""Key of a checkpoint record: the weights that are the teacher from there on."""


@runtime_checkable
class SDFTBatchProvider(Protocol):
    """Batches of questions with good answers."""

    def get_batch(self, index: int) -> tuple[Sequence[EnvGroupBuilder], list[str], list[str]]:
        """Return the groups of a step, and for each its question and its good answer.

        A group with the method `get_teacher_prompt` has its own prompt for the teacher; others get
        one from `demo_template`.
        """
        ...

    def __len__(self) -> int:
        """Return the number of batches."""
        ...


@chz.chz
class SDFTBuilder:
    """Base of the builders of questions with good answers."""

    def __call__(self) -> tuple[SDFTBatchProvider, RLDataset | None]:
        """Return the training data and held-out tasks."""
        raise NotImplementedError


@chz.chz
class SDFTOptions(OnPolicyOptions):
    """Self-distillation; a recipe's config adds its own settings."""

    learning_rate: float = 2e-5
    lora_rank: int = 128
    max_tokens: int = 2048
    reward_weight: float = 0.0
    topk: int = 20
    objective: str = "forward_kl"
    reverse: bool = chz.field(
        default=False, doc="Whether to minimize the reverse KL; the same as objective=reverse_kl."
    )
    demo_template: str = chz.field(
        default=DEFAULT_DEMO_TEMPLATE,
        doc="The teacher's message, with {question} and {golden_answer}.",
    )
    system_prompt: str | None = chz.field(
        default=None, doc="System message of the teacher's prompt."
    )
    teacher_sync_every: int | None = chz.field(
        default=None, doc="Steps after which the student becomes the teacher; None: never."
    )
    max_context_length: int = chz.field(
        default=MAX_CONTEXT_LENGTH,
        doc="Maximum tokens of the teacher's prompt with a reply; longer ones are left out.",
    )

    @chz.validate
    def _check_sdft(self) -> None:
        for name in ("{question}", "{golden_answer}"):
            if name not in self.demo_template:
                raise ConfigurationError(f"demo_template has no {name}; put it where it belongs.")
        if self.teacher_sync_every is not None and self.teacher_sync_every < 1:
            raise ConfigurationError(
                f"teacher_sync_every={self.teacher_sync_every} is less than 1; use 1 or more, or "
                "leave it out."
            )
        if self.reverse and not self.topk:
            raise ConfigurationError(
                "reverse=true with topk=0 is the default of topk=0, which always minimizes the "
                "reverse KL; leave reverse out."
            )

    def training_objective(self) -> str:
        """Return the divergence that is minimized."""
        return "reverse_kl" if self.reverse else self.objective


@chz.chz
class Config(SDFTOptions, rl_config.Config):
    """All settings of the loop."""

    recipe_name: str = chz.field(default="sdft", doc="Name recorded with the session.")
    dataset_builder: RLDatasetBuilder = chz.field(
        default_factory=RLDatasetBuilder,
        doc="Unused field of the RL settings; main takes the data.",
    )
    sdft_builder: SDFTBuilder | None = chz.field(
        default=None, doc="Builder of the data; None: main gets them as arguments."
    )

    @chz.validate
    def _check_loops_of_sdft(self) -> None:
        if self.teacher_sync_every and self.async_config is not None:
            raise ConfigurationError(
                f"teacher_sync_every={self.teacher_sync_every} with async_config is not supported, "
                "because a group could be scored by either teacher; leave one of them out."
            )

    def needs_kl_reference(self) -> bool:
        """Return False: the teacher is what the KL is computed with."""
        return False


def build_sdft_teacher_prompt(
    question: str,
    golden_answer: str,
    renderer: Renderer,
    system_prompt: str | None = None,
    demo_template: str = DEFAULT_DEMO_TEMPLATE,
) -> tinker.ModelInput:
    """Return the teacher's prompt: the question with a good answer.

    Args:
        question: The question that the student sees.
        golden_answer: A good answer, which the student does not see.
        renderer: Writes the prompt.
        system_prompt: System message; None: without one.
        demo_template: The user's message, with `{question}` and `{golden_answer}`.
    """
    # Replaced in one pass, because questions and answers may contain braces.
    texts = {"{question}": question, "{golden_answer}": golden_answer}
    text = re.sub("|".join(map(re.escape, texts)), lambda m: texts[m.group()], demo_template)
    messages: list[Message] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    messages.append({"role": "user", "content": text})
    return renderer.build_generation_prompt(messages)


async def main(
    cfg: Config,
    sdft_dataset: SDFTBatchProvider | None = None,
    test_dataset: RLDataset | None = None,
) -> RunResult:
    """Train, evaluate and save; the same settings again resume an interrupted run.

    Args:
        cfg: The settings.
        sdft_dataset: Questions with good answers; None: `cfg.sdft_builder` makes them.
        test_dataset: Held-out tasks.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    async with open_run(cfg, cfg.recipe_name) as run:
        config = run.config
        if config.renderer_name is None:
            raise ConfigurationError("renderer_name is not set; name the chat format of the data.")
        if sdft_dataset is None:
            sdft_dataset, test_dataset = await asyncio.to_thread(_build_data, config)
        total = len(sdft_dataset)
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        has_begun = await run.begin(total, renderer_name=config.renderer_name, shown=SHOWN)
        if not has_begun:
            return run.result()
        renderer = await asyncio.to_thread(load_renderer, config.renderer_name, config.model_name)
        path = await _teacher_path(run)
        teacher = TeacherConfig(base_model=config.model_name, load_checkpoint_path=path)
        teachers = await open_teachers(
            run,
            [teacher],
            concurrency=config.teacher_concurrency,
            count=config.topk,
            max_context_length=config.max_context_length,
        )
        loop = _SelfTeachingLoop(
            run,
            _DemonstrationDataset(sdft_dataset, renderer, config),
            context_window=await asyncio.to_thread(context_window, run),
            teachers=teachers,
            settings=chz.replace(config, objective=config.training_objective()),
        )
        loop.start(run, path, config)
        loop.add_held_out(test_dataset)
        return await loop.end(await choose_loop(config)(loop, run.start_step))


def _build_data(config: Config) -> tuple[SDFTBatchProvider, RLDataset | None]:
    if config.sdft_builder is None:
        raise ConfigurationError("sdft_builder is not set; set it, or give main a sdft_dataset.")
    data_format = data_format_of(config.sdft_builder)
    check_data_format(config.renderer_name, data_format, "sdft_builder")
    return config.sdft_builder()


async def _teacher_path(run: Run[Config]) -> str | None:
    """Return the teacher's weights: those of the checkpoint, or what the run starts from."""
    if run.checkpoint is not None and run.checkpoint.has(TEACHER_PATH):
        return str(run.checkpoint.get(TEACHER_PATH))
    if run.config.load_checkpoint_path is None:
        return None
    # A state is not a sampler: the weights that the run starts from are saved as one.
    load = run.service_client.create_training_client_from_state
    client = await create_client(load, run.config.load_checkpoint_path)
    saved = await client.save_weights_for_sampler(
        "sdft-teacher", ttl_seconds=run.config.ttl_seconds
    )
    return str(saved.path)


class _SelfTeachingLoop(OnPolicyLoop):
    """The on-policy loop with one teacher, which the student may replace."""

    def start(self, run: Run[Config], path: str | None, config: Config) -> None:
        """Set the teacher's weights at the first step of this start."""
        self._own_run = run
        self._teacher_path = path
        self._every = config.teacher_sync_every
        self._concurrency = config.teacher_concurrency
        self._ttl_seconds = config.ttl_seconds

    async def submit_update(self, step: TrainingStep, data_D: Sequence[tinker.Datum]) -> None:
        """Submit the update; then make the student the teacher if that is due."""
        await super().submit_update(step, data_D)
        done = step.step + 1
        if not self._every or done % self._every or done >= self.total_steps:
            return
        run = self._own_run
        saved = await run.training_client.save_weights_for_sampler(
            f"teacher-{done:06d}", ttl_seconds=self._ttl_seconds
        )
        self._teacher_path = str(saved.path)
        client = await create_client(
            run.service_client.create_sampling_client, model_path=self._teacher_path
        )
        [before] = self.teachers
        self.teachers = [
            Teacher(
                client,
                self._teacher_path,
                concurrency=self._concurrency,
                context_window=before.context_window,
            )
        ]

    def submit_checkpoint(self, step: TrainingStep) -> None:
        """Queue the checkpoint that is due, with the name of the teacher."""
        done = step.step + 1
        state: dict[str, Any] = {"batch": done}
        if self._teacher_path is not None:
            state[TEACHER_PATH] = self._teacher_path
        step.saving = self._own_run.submit_checkpoint(state, steps_done=done)


@dataclass(frozen=True)
class _DemonstratedGroup(EnvGroupBuilder):
    """A group whose teacher sees a good answer."""

    inner: EnvGroupBuilder
    prompt: tinker.ModelInput

    def get_teacher_prompt(self) -> tinker.ModelInput:
        return self.prompt

    async def make_envs(self) -> Sequence[Env]:
        return await self.inner.make_envs()

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        return await self.inner.compute_group_rewards(trajectory_group, env_group)

    async def cleanup(self) -> None:
        await self.inner.cleanup()

    def logging_tags(self) -> list[str]:
        return self.inner.logging_tags()


class _DemonstrationDataset(RLDataset):
    """The groups of a provider, each with the teacher's prompt."""

    def __init__(self, provider: SDFTBatchProvider, renderer: Renderer, config: Config) -> None:
        self._provider = provider
        self._renderer = renderer
        self._config = config

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        builders, questions, answers = self._provider.get_batch(index)
        return [
            TaughtGroup(self._demonstrate(builder, question, answer), 0, "demonstrations")
            for builder, question, answer in zip(builders, questions, answers, strict=True)
        ]

    def _demonstrate(self, builder: EnvGroupBuilder, question: str, answer: str) -> EnvGroupBuilder:
        """Return the group with the teacher's prompt; a group may have its own."""
        if isinstance(builder, HasTeacherPrompt):
            return builder
        config = self._config
        prompt = build_sdft_teacher_prompt(
            question, answer, self._renderer, config.system_prompt, config.demo_template
        )
        return _DemonstratedGroup(builder, prompt)

    def __len__(self) -> int:
        return len(self._provider)
