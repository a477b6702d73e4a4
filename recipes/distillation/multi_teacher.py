"""On-policy distillation with two teachers: one student learns two tasks, each from its teacher.

    python -m recipes.distillation.multi_teacher              # the default model, on this machine
    python -m recipes.distillation.multi_teacher topk=20

The tasks are to write a given number of words, and to name the first letter of a word. The recipe
first trains an adapter for each on solved examples; these are the teachers, and their runs are in
the folder `teachers` of the run directory. Every step has prompts of both tasks. A reply is scored
by the teacher of its task alone. The same command again resumes a stopped run.

Watch teacher_kl/word_count and teacher_kl/first_letter fall, and the held-out rewards
test_word_count/env/all/reward/total and test_first_letter/env/all/reward/total rise. In a recorded
run with seed 0, they had 0.58 (standard error 0.02) and 0.90 (0.04) after 12 steps, three minutes;
the teachers have 0.59 (0.02) and 0.97 (0.02).
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe, recipe_runner
from tinker_cookbook.distillation import train_on_policy
from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, TeacherConfig
from tinker_cookbook.rl.problems import ProblemDatasetBuilder
from tinker_cookbook.utils.lr_scheduling import LRSchedule

from .tasks import CountData, LetterData, count_examples, letter_examples
from .teachers import train_by_examples

TEST_GROUP_SIZE = 3
EXAMPLES = {"word_count": count_examples, "first_letter": letter_examples}


@chz.chz
class Config(train_on_policy.OnPolicyOptions):
    """The settings of this recipe."""

    teacher_steps: int = chz.field(default=16, doc="Supervised steps of each teacher.")
    groups_per_batch: int = chz.field(default=16, doc="Prompts of each task per step.")
    group_size: int = chz.field(default=1, doc="Replies sampled per prompt.")
    num_steps: int = chz.field(default=12, doc="Number of steps of the student.")
    max_tokens: int = 24
    lora_rank: int = 16
    learning_rate: float = 5e-4
    lr_schedule: LRSchedule = "linear"
    eval_every: int = 4
    save_every: int = 4
    reward_weight: float = 0.0
    topk: int = 20
    evaluate_teachers: bool = True


def build(config: Config) -> train_on_policy.Config:
    """Return the train loop's settings; `make_teachers` fills in the teachers."""
    steps = config.max_steps or config.num_steps
    own = {"max_steps": steps, "num_epochs": steps}  # the smaller data set repeats
    return recipe_runner.on_policy(
        config, [_taught(config, CountData), _taught(config, LetterData)], **own
    )


def make_teachers(config: Config, loop: train_on_policy.Config) -> train_on_policy.Config:
    """Train a teacher for each task."""
    taught = []
    for one in loop.dataset_configs:
        assert one.name is not None, "build names the data sets"
        path = train_by_examples(loop, one.name, EXAMPLES[one.name](), steps=config.teacher_steps)
        teacher = chz.replace(one.teacher_config, load_checkpoint_path=path)
        taught.append(chz.replace(one, teacher_config=teacher))
    return chz.replace(loop, dataset_configs=taught)


def _taught(config: Config, data: type[ProblemDatasetBuilder]) -> DistillationDatasetConfig:
    builder = recipe.fill(data, config, test_group_size=TEST_GROUP_SIZE)
    return DistillationDatasetConfig(
        dataset_builder=builder,
        teacher_config=TeacherConfig(base_model=str(config.model_name)),
        groups_per_batch=config.groups_per_batch,
        name=builder.name,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, prepare=make_teachers, argv=argv)


if __name__ == "__main__":
    main()
