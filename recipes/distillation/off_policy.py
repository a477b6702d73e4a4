"""Off-policy distillation: a teacher's probabilities on texts that it has written.

    python -m recipes.distillation.off_policy                 # the default model, on this machine
    python -m recipes.distillation.off_policy objective=renormalized
    python -m recipes.distillation.off_policy teacher=tinker://.../sampler_weights/final

The task is to write about a topic in a given number of words. The recipe first trains a teacher on
solved examples; its run is in the folder `teachers` of the run directory. The teacher then writes
a reply to every question. The student, a fresh adapter of lower rank, is trained on these replies
with the teacher's 20 most likely tokens of each position as targets. The same command again
resumes a stopped run.

Watch test/teacher_kl fall: the KL to the teacher on replies to held-out questions, computed with
the 1024 most likely tokens, which is nearly that of the whole vocabulary. In a recorded run with
seed 0 it fell from 2.75 (standard error 0.14) to 0.15 (0.01) in 12 steps and 0.075 (0.003) in 24.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.distillation import train_off_policy
from tinker_cookbook.distillation.prompt_distillation import PromptDistillationBuilder
from tinker_cookbook.distillation.teacher import TeacherConfig
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher
from tinker_cookbook.exceptions import ConfigurationError

from .tasks import count_examples, count_problems
from .teachers import train_by_examples

TEACHER = "word_count"


@chz.chz
class Config(train_off_policy.OffPolicyOptions):
    """The settings of this recipe."""

    teacher: str | None = chz.field(
        default=None, doc="Sampler weights of the teacher (tinker://...); None: train one first."
    )
    teacher_steps: int = chz.field(default=16, doc="Supervised steps of the teacher.")
    num_questions: int = chz.field(default=192, doc="Questions that the teacher replies to.")
    max_tokens: int = chz.field(default=24, doc="Maximum number of tokens per reply.")
    batch_size: int = chz.field(default=16, doc="Replies per optimizer step.")
    num_epochs: int = 2
    lora_rank: int = 16
    learning_rate: float = 5e-4
    eval_every: int = 6
    n_held_out_targets: int | None = 1024


def build(config: Config) -> train_off_policy.Config:
    """Return the train loop's settings; `make_teacher` fills in the teacher."""
    if config.num_questions < config.batch_size:
        raise ConfigurationError(
            f"num_questions={config.num_questions} is less than batch_size={config.batch_size}; "
            "use more questions, or a smaller batch."
        )
    teacher = TeacherConfig(base_model=str(config.model_name), load_checkpoint_path=config.teacher)
    trained = [str(problem.question) for problem in count_problems("train")]
    data = recipe.fill(
        PromptDistillationBuilder,
        config,
        questions=trained[: config.num_questions],
        test_questions=[str(problem.question) for problem in count_problems("test")],
        teacher_messages=[],
        teacher_config=teacher,
    )
    return recipe.distillation(
        config, [DatasetWithTeacher(dataset_builder=data, teacher_config=teacher)]
    )


def make_teacher(config: Config, loop: train_off_policy.Config) -> train_off_policy.Config:
    """Train the teacher, unless one is given."""
    if config.teacher is not None:
        return loop
    path = train_by_examples(loop, TEACHER, count_examples(), steps=config.teacher_steps)
    [data] = loop.dataset_configs
    teacher = chz.replace(data.teacher_config, load_checkpoint_path=path)
    builder = chz.replace(data.dataset_builder, teacher_config=teacher)
    taught = chz.replace(data, teacher_config=teacher, dataset_builder=builder)
    return chz.replace(loop, dataset_configs=[taught])


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, prepare=make_teacher, argv=argv)


if __name__ == "__main__":
    main()
