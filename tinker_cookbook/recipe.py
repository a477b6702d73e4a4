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
from tinker_cookbook.recipe_runner import blueprint, distillation, fill, fill_loop, preference, run
from tinker_cookbook.recipe_runner import complete as complete  # for programs

if TYPE_CHECKING:
    from tinker_cookbook.recipe_runner import C, L
    from tinker_cookbook.rl import train as rl_train
    from tinker_cookbook.rl.types import RLDatasetBuilder
    from tinker_cookbook.runs.options import ModelOptions
    from tinker_cookbook.supervised import train as sl_train
    from tinker_cookbook.supervised.types import SupervisedDatasetBuilder

__all__ = ["blueprint", "distillation", "fill", "main", "preference", "rl", "supervised"]


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

    own = {"dataset_builder": data} | own
    if own.get("learning_rate", getattr(config, "learning_rate", None)) is None:
        own["learning_rate"] = hyperparam_utils.get_lr(str(config.model_name))
    if prompts:
        answers = fill(SampleEvaluatorBuilder, config, prompts=list(prompts))
        own.setdefault("infrequent_evaluator_builders", [answers])
    return fill_loop(train.Config, config, own)


def rl(config: ModelOptions, data: RLDatasetBuilder, **own: Any) -> rl_train.Config:
    """Return the settings of a reinforcement-learning train loop; arguments as in `supervised`."""
    from tinker_cookbook.rl import train

    return fill_loop(train.Config, config, {"dataset_builder": data} | own)
