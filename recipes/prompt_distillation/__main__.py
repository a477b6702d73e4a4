"""Prompt distillation: eight solved examples in the prompt become zero.

    python -m recipes.prompt_distillation                      # the default model, on this machine
    python -m recipes.prompt_distillation objective=renormalized
    python -m recipes.prompt_distillation num_shots=16 num_epochs=4

In two commands, to look at the replies in between:

    python -m recipes.prompt_distillation.create_data replies=/tmp/replies.jsonl
    python -m recipes.prompt_distillation.train replies=/tmp/replies.jsonl

The task is to reply to a word with its first letter. Nothing in the student's prompt says so; the
teacher, which is the same model, sees eight solved examples before each word. It writes the
replies, and the student is trained on them behind the word alone, with the teacher's probabilities
as targets. The words of the test are neither trained on nor shown as examples.

Watch test/accuracy rise from 0 towards test/teacher_accuracy, and test/teacher_kl fall. The same
command again resumes a stopped run.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.distillation import train_off_policy
from tinker_cookbook.distillation.prompt_distillation import PromptDistillationBuilder
from tinker_cookbook.distillation.teacher import TeacherConfig
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher

from .letters import FirstLetterEvaluatorBuilder, build_examples, split_words


@chz.chz
class Config(train_off_policy.OffPolicyOptions):
    """The settings of this recipe."""

    replies: str | None = chz.field(
        default=None, doc="File of create_data; None: the teacher writes the replies first."
    )
    num_shots: int = chz.field(default=8, doc="Solved examples in the teacher's prompt.")
    max_tokens: int = chz.field(default=8, doc="Maximum number of tokens per reply.")
    batch_size: int = chz.field(default=16, doc="Words per optimizer step.")
    num_epochs: int = 3
    learning_rate: float = 5e-4
    lora_rank: int = 16
    eval_every: int = 5
    save_every: int = 5


def build(config: Config) -> train_off_policy.Config:
    """Return the train loop's settings: the teacher's replies, and the test on other words."""
    assert config.model_name is not None, "the recipe's frame fills in the model"
    shots, trained, test = split_words(config.num_shots, config.seed)
    teacher = TeacherConfig(base_model=config.model_name)
    data = recipe.fill(
        PromptDistillationBuilder,
        config,
        replies_path=config.replies,
        questions=trained,
        test_questions=test,
        teacher_messages=build_examples(shots),
        teacher_config=teacher,
    )
    evaluator = recipe.fill(FirstLetterEvaluatorBuilder, config, words=test)
    return recipe.distillation(
        config,
        [DatasetWithTeacher(dataset_builder=data, teacher_config=teacher)],
        evaluator_builders=[evaluator],
    )


def main(argv: list[str] | None = None) -> None:
    """Run the recipe with these arguments; by default, those of the command line."""
    recipe.main(Config, build, argv=argv)


if __name__ == "__main__":
    main()
