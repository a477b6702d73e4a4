"""The frame of every recipe: `main` leads from the command line to a finished run.

@chz.chz
class Config(train.RunOptions):             # the options of rl.train or supervised.train
    group_size: int = chz.field(default=8, doc="Replies sampled per problem.")

def build(config: Config) -> train.Config:  # model, chat format and run directory are known here
    return recipe.rl(config, recipe.fill(MyDatasetBuilder, config))

if __name__ == "__main__":
    recipe.main(Config, build)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tinker_cookbook import cli_utils
from tinker_cookbook.recipe_runner import C, L, blueprint, complete, fill, recipe_name, run

if TYPE_CHECKING:
    from tinker_cookbook.distillation import sdft, train_off_policy, train_on_policy
    from tinker_cookbook.distillation.datasets import DistillationDatasetConfig
    from tinker_cookbook.preference import train_dpo
    from tinker_cookbook.rl import train as rl_train
    from tinker_cookbook.rl.types import RLDatasetBuilder
    from tinker_cookbook.runs.options import ModelOptions
    from tinker_cookbook.supervised import train as sl_train
    from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDatasetBuilder

__all__ = [
    "blueprint",
    "complete",
    "distillation",
    "fill",
    "main",
    "on_policy",
    "preference",
    "rl",
    "run",
    "self_distillation",
    "supervised",
]


def main(
    config_class: type[C],
    build: Callable[[C], L],
    *,
    prepare: Callable[[C, L], L] | None = None,
    argv: list[str] | None = None,
) -> None:
    """Run a recipe from the command line; `--help` lists its settings.

    Args:
        config_class: The recipe's settings. Its method `log_words` may add words to the default
            name of the run directory.
        build: Returns the train loop's settings; see `supervised` and `rl`.
        prepare: Runs before training and may change those settings.
        argv: Arguments; those of this process by default.
    """
    cli_utils.start(config_class, lambda config: run(config, build, prepare), argv)


def supervised(
    config: ModelOptions, data: SupervisedDatasetBuilder, *, prompts: Sequence[str] = (), **own: Any
) -> sl_train.Config:
    """Return the settings of a supervised train loop.

    Args:
        config: The recipe's settings. The learning rate None becomes the model's recommended one.
        data: Makes the training and the held-out data.
        prompts: Questions that the model answers before and after training.
        own: Settings of the loop that the config does not have, or that replace the config's.
    """
    from tinker_cookbook import hyperparam_utils
    from tinker_cookbook.eval.samples import SampleEvaluatorBuilder
    from tinker_cookbook.supervised import train

    own = {"recipe_name": recipe_name(type(config)), "dataset_builder": data} | own
    if own.get("learning_rate", getattr(config, "learning_rate", None)) is None:
        own["learning_rate"] = hyperparam_utils.get_lr(str(config.model_name))
    if prompts:
        answers = fill(SampleEvaluatorBuilder, config, prompts=list(prompts))
        own.setdefault("infrequent_evaluator_builders", [answers])
    return fill(train.Config, config, **own)


def rl(config: ModelOptions, data: RLDatasetBuilder, **own: Any) -> rl_train.Config:
    """Return the settings of a reinforcement-learning train loop; arguments as in `supervised`."""
    from tinker_cookbook.rl import train

    own = {"recipe_name": recipe_name(type(config)), "dataset_builder": data} | own
    return fill(train.Config, config, **own)


def preference(config: ModelOptions, data: ChatDatasetBuilder, **own: Any) -> train_dpo.Config:
    """Return the settings of a preference train loop; arguments as in `supervised`."""
    from tinker_cookbook.preference import train_dpo

    own = {"recipe_name": recipe_name(type(config)), "dataset_builder": data} | own
    return fill(train_dpo.Config, config, **own)


def distillation(
    config: ModelOptions, data: Sequence[train_off_policy.DatasetWithTeacher], **own: Any
) -> train_off_policy.Config:
    """Return the settings of off-policy distillation; arguments as in `supervised`."""
    from tinker_cookbook.distillation import train_off_policy

    own = {"recipe_name": recipe_name(type(config)), "dataset_configs": list(data)} | own
    return fill(train_off_policy.Config, config, **own)


def on_policy(
    config: ModelOptions, data: Sequence[DistillationDatasetConfig], **own: Any
) -> train_on_policy.Config:
    """Return the settings of on-policy distillation; arguments as in `supervised`."""
    from tinker_cookbook.distillation import train_on_policy

    own = {"recipe_name": recipe_name(type(config)), "dataset_configs": list(data)} | own
    return fill(train_on_policy.Config, config, **own)


def self_distillation(config: ModelOptions, data: sdft.SDFTBuilder, **own: Any) -> sdft.Config:
    """Return the settings of self-distillation; arguments as in `supervised`."""
    from tinker_cookbook.distillation import sdft

    own = {"recipe_name": recipe_name(type(config)), "sdft_builder": data} | own
    return fill(sdft.Config, config, **own)
