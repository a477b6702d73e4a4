"""On-policy distillation: the student samples, and a teacher trained here scores every token.

    python -m recipes.distillation.on_policy                  # the default model, on this machine
    python -m recipes.distillation.on_policy teacher=tinker://.../sampler_weights/final
    python -m recipes.distillation.on_policy topk=20

The task is to write about a topic in a given number of words. The teacher learns it first, by
reinforcement learning; its run is in the folder `teachers` of the run directory. The student is a
fresh adapter of lower rank. It gets no reward: it learns only from what the teacher thinks of each
of its tokens. The same command again resumes a stopped run, of the teacher or of the student.

Expect the held-out reward to rise from 0.15 (standard error 0.03) to 0.75 (0.03) in 6 steps and to
0.92 (0.02) in 8, as in a recorded run with seed 0 whose teacher had 0.92 (0.01). It may fall again
after that; the checkpoint best_... is kept. Teacher and student take six minutes each on two cores.

Compare test/env/all/reward/total of the two runs at equal numbers of sampled tokens
(env/all/total_ac_tokens, summed over steps).
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe, recipe_runner
from tinker_cookbook.distillation import train_on_policy
from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, TeacherConfig

from .tasks import CountData
from .teachers import TEST_GROUP_SIZE, train_by_rewards


@chz.chz
class Config(train_on_policy.OnPolicyOptions):
    """The settings of this recipe."""

    teacher: str | None = chz.field(
        default=None, doc="Sampler weights of the teacher (tinker://...); None: train one first."
    )
    teacher_steps: int = chz.field(default=20, doc="Steps of the teacher's reinforcement learning.")
    groups_per_batch: int = chz.field(default=32, doc="Problems per step.")
    group_size: int = chz.field(default=1, doc="Replies sampled per problem.")
    num_steps: int = chz.field(default=12, doc="Number of steps of the student.")
    max_tokens: int = 24
    lora_rank: int = 16
    learning_rate: float = 5e-4
    eval_every: int = 4
    reward_weight: float = 0.0
    evaluate_teachers: bool = True


def build(config: Config) -> train_on_policy.Config:
    """Return the train loop's settings; `make_teacher` fills in the teacher."""
    assert config.model_name is not None, "the recipe's frame fills in the model"
    data = recipe.fill(CountData, config, test_group_size=TEST_GROUP_SIZE)
    taught = DistillationDatasetConfig(
        dataset_builder=data,
        teacher_config=TeacherConfig(
            base_model=config.model_name, load_checkpoint_path=config.teacher
        ),
        groups_per_batch=config.groups_per_batch,
        name="word_count",
    )
    epochs = -(-config.num_steps // max(1, len(data.problems("train")) // config.groups_per_batch))
    own = {"num_epochs": epochs, "max_steps": config.max_steps or config.num_steps}
    return recipe_runner.on_policy(config, [taught], **own)


def make_teacher(config: Config, loop: train_on_policy.Config) -> train_on_policy.Config:
    """Train the teacher, unless one is given."""
    if config.teacher is not None:
        return loop
    path = train_by_rewards(
        loop,
        CountData,
        steps=config.teacher_steps,
        max_tokens=config.max_tokens,
        eval_every=config.eval_every,
    )
    [taught] = loop.dataset_configs
    teacher = chz.replace(taught.teacher_config, load_checkpoint_path=path)
    return chz.replace(loop, dataset_configs=[chz.replace(taught, teacher_config=teacher)])


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, prepare=make_teacher, argv=argv)


if __name__ == "__main__":
    main()
