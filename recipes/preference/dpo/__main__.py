"""Preference learning: DPO on pairs of the model's own replies, or on a file of pairs.

    python -m recipes.preference.dpo                          # the default model, on this machine
    python -m recipes.preference.dpo data=pairs.jsonl test_size=100      # your own pairs
    python -m recipes.preference.dpo loss=simpo dpo_beta=2.0 loss_config.gamma=0.5

Without `data=`, the model is asked to write about a topic in a given number of words, several
times for each request. The reply that comes nearest to the number and the one furthest from it are
a pair. Topics of held-out requests are not trained on.

Recorded runs with seeds 0, 1 and 2 (about 85 pairs, 20 steps, three minutes on one core each;
standard errors over requests in brackets):

    held-out pairs      accuracy 0.50 -> 1.00, 0.92, 1.00
    held-out requests   reward 0.17 (0.03) -> 0.50 (0.02), 0.46 (0.02), 0.43 (0.03)
                        win rate against the replies before training 0.76, 0.74, 0.70 (0.03)
                        exactly the asked number of words 0.03 (0.01) -> 0.11, 0.09, 0.09 (0.02)

The supervised term of `dpo_with_nll`, the default, keeps the better replies likely. With loss=dpo
they become less likely too, and most of the gain is shorter replies. Reinforcement learning on the
same task (recipes.rl_basic) reaches 0.9 in 40 steps.

A row of such a file is {"prompt": ..., "chosen": ..., "rejected": ...}, with texts or lists of
messages, or two whole conversations as chosen and rejected. The same command again resumes a
stopped run.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl

from .own_replies import OwnReplyComparisons, check_can_count
from .word_count import WordCountEvaluatorBuilder


@chz.chz
class Config(train_dpo.PreferenceOptions):
    """The settings of this recipe: its pairs, and those of every preference run."""

    data: str | None = chz.field(
        default=None, doc="File, folder or several of pairs; default: pairs of the model's replies."
    )
    test_size: int = chz.field(
        default=16, doc="Number of held-out pairs; of own replies, of held-out requests."
    )
    batch_size: int = chz.field(default=8, doc="Pairs per optimizer step.")
    max_length: int = chz.field(default=512, doc="Tokens after which a completion is cut.")
    num_prompts: int = chz.field(default=48, doc="Requests that pairs are made from.")
    samples_per_prompt: int = chz.field(default=8, doc="Replies sampled per request.")
    pairs_per_prompt: int = chz.field(default=3, doc="Maximum pairs made from one request.")
    loss: str = "dpo_with_nll"
    num_epochs: int = 2
    learning_rate: float = 5e-4
    eval_every: int = 100
    save_every: int = 10

    @chz.validate
    def _check_pairs(self) -> None:
        """Refuse numbers of replies that cannot give a batch of pairs, before any is sampled."""
        for name, least in (("num_prompts", 1), ("samples_per_prompt", 2), ("pairs_per_prompt", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)} is too small for a pair; use {least} or more."
                )
        most = self.num_prompts * self.pairs_per_prompt
        if self.data is None and self.batch_size > most:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than the {most} pairs that num_prompts="
                f"{self.num_prompts} with pairs_per_prompt={self.pairs_per_prompt} can give; use "
                "a smaller batch, or more prompts."
            )


def build(config: Config) -> train_dpo.Config:
    """Return the train loop's settings: the pairs, and an evaluation by the rule."""
    from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    common = recipe.fill(ChatDatasetBuilderCommonConfig, config)
    if config.data is None:
        if config.dry_run:
            check_can_count(str(config.log_path))
        comparisons = recipe.fill(OwnReplyComparisons, config)
        evaluators = [recipe.fill(WordCountEvaluatorBuilder, config)]
    else:
        comparisons = ComparisonBuilderFromJsonl(
            train_path=config.data, test_size=config.test_size, seed=config.seed
        )
        evaluators = []
    pairs = DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=comparisons)
    return recipe.preference(config, pairs, evaluator_builders=evaluators)


if __name__ == "__main__":
    recipe.main(Config, build)
