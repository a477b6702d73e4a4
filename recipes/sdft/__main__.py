"""Self-distillation: the model that reads the right answer teaches the model that does not.

    python -m recipes.sdft max_steps=8                # the default model, on this machine
    python -m recipes.sdft.supervised max_steps=12    # the same skill, supervised

The skill is to name the initial of a name. The right answers are records in the style of a machine,
such as [[RECORD]] Paul: INITIAL = P [[END OF RECORD]]. The student replies to the question; the
teacher, the same model, reads the record behind four solved examples and scores every token of that
reply in its own words. Supervised training imitates the record. The names of the test are neither
trained on nor shown. The same command again resumes a stopped run.

Watch test/accuracy rise, in which a reply counts in either style, and test/base_kl: how far the
replies to everyday questions move away from those of the base model. That is forgetting; compare it
at equal accuracy. In recorded runs, self-distillation had an accuracy of 1.00 with a KL of 0.34
(standard error 0.04) after 7 steps, and the supervised run 0.97 with 0.60 (0.05) after 11, both
with seed 0; with seed 1, 0.97 with 0.40 (0.04) after 7 and 0.97 with 0.57 (0.05) after 11. Both
forget more with every further step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import chz

from tinker_cookbook import recipe, recipe_runner
from tinker_cookbook.distillation import sdft
from tinker_cookbook.distillation.datasets import PromptGroup
from tinker_cookbook.rl.types import EnvGroupBuilder

from .skill import SkillEvaluatorBuilder, ask, build_demonstration, split_names, write_record

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Message, Renderer


@dataclass(frozen=True)
class DemonstratedName(PromptGroup):
    """A question whose teacher sees the record, after solved examples."""

    demonstration: tuple[Message, ...] = ()

    def get_teacher_prompt(self) -> tinker.ModelInput:
        """Return the teacher's prompt."""
        return self.renderer.build_generation_prompt(list(self.demonstration))


class Names:
    """Batches of names, drawn anew for every step."""

    def __init__(self, data: NamesBuilder, renderer: Renderer) -> None:
        self._data = data
        self._renderer = renderer
        self._examples, self._trained, _ = split_names(
            data.num_shots, data.groups_per_batch, data.seed
        )

    def get_batch(self, index: int) -> tuple[Sequence[EnvGroupBuilder], list[str], list[str]]:
        """Return the groups of a step, with their questions and good answers."""
        data = self._data
        names = random.Random(f"{data.seed}/{index}").sample(self._trained, data.groups_per_batch)
        groups = [
            DemonstratedName(
                ask(name),
                self._renderer,
                data.group_size,
                "names",
                demonstration=tuple(build_demonstration(self._examples, name)),
            )
            for name in names
        ]
        return groups, [ask(name) for name in names], [write_record(name) for name in names]

    def __len__(self) -> int:
        return self._data.num_steps


@chz.chz
class NamesBuilder(sdft.SDFTBuilder):
    """Builder of the training data; the evaluator has the test."""

    model_name: str
    renderer_name: str
    num_shots: int
    groups_per_batch: int
    group_size: int
    num_steps: int
    seed: int = 0

    def __call__(self) -> tuple[Names, None]:
        """Return the names to train on."""
        from tinker_cookbook.renderers import load_renderer

        return Names(self, load_renderer(self.renderer_name, self.model_name)), None


@chz.chz
class Config(sdft.SDFTOptions):
    """The settings of this recipe."""

    num_shots: int = chz.field(default=4, doc="Solved examples in the teacher's prompt.")
    groups_per_batch: int = chz.field(default=16, doc="Names per step.")
    group_size: int = chz.field(default=1, doc="Replies sampled per name.")
    num_steps: int = chz.field(default=20, doc="Number of steps.")
    max_tokens: int = 16
    teacher_floor: float = 0.01
    learning_rate: float = 5e-4
    lora_rank: int = 16
    eval_every: int = 1
    save_every: int = 4


def build(config: Config) -> sdft.Config:
    """Return the train loop's settings."""
    _, _, test = split_names(config.num_shots, config.groups_per_batch, config.seed)
    evaluator = recipe.fill(SkillEvaluatorBuilder, config, names=test)
    return recipe_runner.self_distillation(
        config, recipe.fill(NamesBuilder, config), evaluator_builders=[evaluator]
    )


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, argv=argv)


if __name__ == "__main__":
    main()
