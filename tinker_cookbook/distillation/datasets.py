"""Prompts for on-policy distillation, and data sets that know their teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import chz

from tinker_cookbook.distillation.teacher import TeacherConfig
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.problem_env import ProblemEnv, read_reply
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    Metrics,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
    Trajectory,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook import renderers
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "CompositeDataset",
    "DistillationDatasetConfig",
    "HasTeacherPrompt",
    "PromptGroup",
    "PromptOnlyDataset",
    "PromptOnlyDatasetBuilder",
    "PromptOnlyEnv",
    "TaughtDataset",
    "TaughtGroup",
    "TeacherConfig",
    "load_deepmath_prompts",
    "load_tulu3_prompts",
]

HUB_ADVICE = "Use prompts that are on this machine: PromptOnlyDataset(prompts, ...)."


@chz.chz
class DistillationDatasetConfig:
    """A data set, and the teacher for it."""

    dataset_builder: RLDatasetBuilder = chz.field(doc="Builder of the training and held-out data.")
    teacher_config: TeacherConfig = chz.field(doc="The teacher.")
    groups_per_batch: int = chz.field(doc="Groups per step, the same number as the data has.")
    name: str | None = chz.field(
        default=None, doc="Name in the metrics; default: dataset_0, dataset_1, and so on."
    )


@runtime_checkable
class HasTeacherPrompt(Protocol):
    """What a group builder has if its teacher sees another prompt than the student."""

    def get_teacher_prompt(self) -> tinker.ModelInput:
        """Return the teacher's prompt, which comes before the student's reply."""
        ...


class CompositeDataset:
    """Several data sets: a batch is the batches of all of them, in their order."""

    def __init__(self, datasets: list[RLDataset], groups_per_batch_list: list[int]) -> None:
        """Combine data sets.

        Args:
            datasets: The data sets.
            groups_per_batch_list: Groups per batch of each.
        """
        if len(datasets) != len(groups_per_batch_list):
            raise ConfigurationError(
                f"{len(datasets)} data sets and {len(groups_per_batch_list)} values of "
                "groups_per_batch; give one for each."
            )
        self._datasets = datasets
        self._sizes = groups_per_batch_list

    def __len__(self) -> int:
        """Return the number of batches of the shortest data set."""
        return min((len(dataset) for dataset in self._datasets), default=0)

    def get_batch(self, i_batch: int) -> tuple[list[EnvGroupBuilder], list[int]]:
        """Return the groups of a step, and for each the index of its data set."""
        builders: list[EnvGroupBuilder] = []
        indices: list[int] = []
        for index, (dataset, size) in enumerate(zip(self._datasets, self._sizes, strict=True)):
            batch = list(dataset.get_batch(i_batch))
            if len(batch) != size:
                raise ConfigurationError(
                    f"dataset_configs[{index}].groups_per_batch={size}, but its batch {i_batch} "
                    f"has {len(batch)} groups; use the number that its builder makes."
                )
            builders += batch
            indices += [index] * size
        return builders, indices


@dataclass(frozen=True)
class TaughtGroup(EnvGroupBuilder):
    """A group that carries the index of its data set, so that a failed group shifts nothing."""

    inner: EnvGroupBuilder
    dataset_index: int
    name: str

    async def make_envs(self) -> Sequence[Env]:
        """Return the environments of the group."""
        return await self.inner.make_envs()

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """Return the rewards of the group."""
        return await self.inner.compute_group_rewards(trajectory_group, env_group)

    async def cleanup(self) -> None:
        """Free what the group opened."""
        await self.inner.cleanup()

    def logging_tags(self) -> list[str]:
        """Return the tags of the group; without any, the name of the data set."""
        return self.inner.logging_tags() or [self.name]

    def teacher_prompt(self) -> tinker.ModelInput | None:
        """Return the teacher's prompt; None if it sees the same tokens as the student."""
        return self.inner.get_teacher_prompt() if isinstance(self.inner, HasTeacherPrompt) else None


class TaughtDataset(RLDataset):
    """The groups of a `CompositeDataset`, each with the index of its data set."""

    def __init__(self, composite: CompositeDataset, names: Sequence[str]) -> None:
        self._composite = composite
        self._names = list(names)

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        builders, indices = self._composite.get_batch(index)
        return [
            TaughtGroup(builder, number, self._names[number])
            for builder, number in zip(builders, indices, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._composite)


class PromptOnlyEnv(ProblemEnv):
    """A prompt without a grade: the reward is 0, and the teacher is the only signal."""

    def __init__(
        self,
        prompt: str,
        renderer: renderers.Renderer,
        convo_prefix: list[renderers.Message] | None = None,
    ) -> None:
        super().__init__(renderer, convo_prefix, format_coef=0.0)
        self.prompt = prompt

    def get_question(self) -> str:
        """Return the prompt."""
        return self.prompt

    def check_format(self, sample_str: str) -> bool:
        """Return True: every reply is allowed."""
        return True

    def check_answer(self, sample_str: str) -> bool:
        """Return False: a prompt does not have an answer."""
        return False

    def get_reference_answer(self) -> str:
        """Return an empty text: a prompt does not have an answer."""
        return ""

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """End the episode; the metric `format` says whether the reply ended by itself."""
        import tinker

        _, ended = read_reply(self.renderer, action, extra, require_stop=True)
        return StepResult(
            reward=0.0,
            episode_done=True,
            next_observation=tinker.ModelInput.empty(),
            next_stop_condition=self.stop_condition,
            metrics={"format": float(ended)},
        )


@dataclass(frozen=True)
class PromptGroup(EnvGroupBuilder):
    """One prompt, several times."""

    prompt: str
    renderer: renderers.Renderer
    group_size: int
    name: str = "prompts"
    convo_prefix: tuple[renderers.Message, ...] = ()

    async def make_envs(self) -> Sequence[Env]:
        """Return one environment per member of the group."""
        return [
            PromptOnlyEnv(self.prompt, self.renderer, list(self.convo_prefix))
            for _ in range(self.group_size)
        ]

    def logging_tags(self) -> list[str]:
        """Return the name of the data set."""
        return [self.name]


class PromptOnlyDataset(RLDataset):
    """Prompts in batches; a last batch that is not full is left out."""

    def __init__(
        self,
        prompts: list[str],
        batch_size: int,
        group_size: int,
        renderer: renderers.Renderer,
        tokenizer: Tokenizer | None = None,
        max_prompt_tokens: int | None = None,
        convo_prefix: list[renderers.Message] | None = None,
        dataset_name: str = "prompts",
    ) -> None:
        """Set the prompts.

        Args:
            prompts: The user's messages.
            batch_size: Prompts per step.
            group_size: Replies sampled per prompt.
            renderer: Writes the prompts.
            tokenizer: Cuts prompts that are too long; default: the renderer's.
            max_prompt_tokens: Maximum tokens of a prompt's text; None: prompts are not cut.
            convo_prefix: Messages before each prompt.
            dataset_name: Tag of the metrics.
        """
        self._prompts = prompts
        self._batch_size = batch_size
        self._group_size = group_size
        self._renderer = renderer
        self._tokenizer = tokenizer or renderer.tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._prefix = tuple(convo_prefix or ())
        self._name = dataset_name

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self._batch_size
        return [
            PromptGroup(
                self._cut(prompt), self._renderer, self._group_size, self._name, self._prefix
            )
            for prompt in self._prompts[start : start + self._batch_size]
        ]

    def __len__(self) -> int:
        return len(self._prompts) // self._batch_size

    def _cut(self, prompt: str) -> str:
        if self._max_prompt_tokens is None:
            return prompt
        tokens = list(self._tokenizer.encode(prompt, add_special_tokens=False))
        if len(tokens) <= self._max_prompt_tokens:
            return prompt
        return str(self._tokenizer.decode(tokens[: self._max_prompt_tokens]))


@chz.chz
class PromptOnlyDatasetBuilder(RLDatasetBuilder):
    """Prompts of a public data set: `deepmath` or `tulu3`."""

    dataset_name: str
    groups_per_batch: int
    group_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    convo_prefix: list[renderers.Message] | None = None
    max_prompt_tokens: int | None = 1024

    async def __call__(self) -> tuple[PromptOnlyDataset, PromptOnlyDataset | None]:
        """Load the prompts; held-out ones exist if the data set has a test split.

        Raises:
            ConfigurationError: if the name is unknown, or the data set cannot be loaded.
        """
        if self.dataset_name == "deepmath":
            return self._build(load_deepmath_prompts("train")), None
        if self.dataset_name == "tulu3":
            return self._build(load_tulu3_prompts()), None
        raise ConfigurationError(
            f"dataset_name={self.dataset_name} is unknown; use deepmath or tulu3. {HUB_ADVICE}"
        )

    def _build(self, prompts: list[str] | None) -> PromptOnlyDataset:
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name_for_tokenizer)
        return PromptOnlyDataset(
            prompts or [],
            self.groups_per_batch,
            self.group_size,
            renderer,
            max_prompt_tokens=self.max_prompt_tokens,
            convo_prefix=self.convo_prefix,
            dataset_name=self.dataset_name,
        )


def load_deepmath_prompts(split: Literal["train", "test"] = "train") -> list[str] | None:
    """Return the problems of DeepMath-103K from the hub; None for a split that it does not have."""
    from tinker_cookbook.hub_datasets import load_hub_table

    if split != "train":
        return None
    table = load_hub_table("zwhe99/DeepMath-103K", split=split, advice=HUB_ADVICE)
    return [str(text) for text in table["question"]]


def load_tulu3_prompts() -> list[str] | None:
    """Return the first user message of each conversation of the Tulu 3 mixture, from the hub."""
    from tinker_cookbook.hub_datasets import load_hub_table

    table = load_hub_table("allenai/tulu-3-sft-mixture", split="train", advice=HUB_ADVICE)
    first = (
        next((str(m["content"]) for m in messages if m["role"] == "user"), "")
        for messages in table["messages"]
    )
    return [prompt for prompt in first if prompt]
