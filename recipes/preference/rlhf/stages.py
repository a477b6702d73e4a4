"""The settings of each stage's train loop, from the settings of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook import recipe
from tinker_cookbook.preference import train_pointwise
from tinker_cookbook.preference.bradley_terry import PointwiseDatasetBuilder
from tinker_cookbook.preference.judge_quality import CheckedJudgeBuilder, JudgeEvaluatorBuilder
from tinker_cookbook.preference.judged_policy import JudgedPolicyEvaluatorBuilder
from tinker_cookbook.preference.judges import JudgeBuilder
from tinker_cookbook.preference.preference_datasets import (
    ChatDatasetBuilderFromComparisons,
    ComparisonBuilderFromJsonl,
    ComparisonDatasetBuilder,
)
from tinker_cookbook.preference.sampled_comparisons import DistinctPrompts
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.preference_envs import (
    PairwisePreferenceRLDatasetBuilder,
    TournamentPattern,
)
from tinker_cookbook.supervised import train as sl_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

from .data import OpinionComparisons, OpinionExamples
from .opinions import rule_reward

if TYPE_CHECKING:
    from .rlhf_pipeline import CLIConfig


@dataclass(frozen=True)
class Policy:
    """The weights of the supervised stage; None is the base model."""

    state_path: str | None
    sampler_path: str | None


def build_sft(config: CLIConfig) -> sl_train.Config:
    """Return the settings of the supervised stage."""
    common = _common(config, config.sft_batch_size)
    if config.sft_data is None:
        size = config.sft_steps * config.sft_batch_size
        data = OpinionExamples(common_config=common, num_examples=size, seed=config.seed)
    else:
        data = FromConversationFileBuilder(common_config=common, file_path=config.sft_data)
    return recipe.fill(
        sl_train.Config,
        config,
        recipe_name="rlhf_sft",
        dataset_builder=data,
        log_path=config.folder("sft"),
        learning_rate=config.sft_learning_rate,
        max_steps=config.sft_steps,
    )


def build_rm(config: CLIConfig, policy: Policy) -> sl_train.Config | train_pointwise.Config:
    """Return the settings of the reward model's training, which starts from the base model."""
    comparisons = build_comparisons(config, policy)
    common = _common(config, config.rm_batch_size)
    evaluator = recipe.fill(
        JudgeEvaluatorBuilder, config, kind=config.rm_kind, comparison_builder=comparisons
    )
    settings = {
        "recipe_name": "rlhf_rm",
        "load_checkpoint_path": None,
        "log_path": config.folder(config.rm_name),
        "learning_rate": config.rm_learning_rate,
        "max_steps": config.rm_steps,
        "num_epochs": config.rm_steps,  # max_steps ends it
        "eval_every": config.rm_steps,
        "evaluator_builders": [evaluator],
    }
    if config.rm_kind == "pointwise":
        data = PointwiseDatasetBuilder(common_config=common, comparison_builder=comparisons)
        return recipe.fill(train_pointwise.Config, config, dataset_builder=data, **settings)
    # A batch has each comparison in both orders.
    common = _common(config, 2 * config.rm_batch_size)
    data = ChatDatasetBuilderFromComparisons(
        common_config=common, comparison_builder=comparisons, swap=True
    )
    return recipe.fill(sl_train.Config, config, dataset_builder=data, **settings)


def build_rl(config: CLIConfig, policy: Policy, judge_path: str) -> rl_train.Config:
    """Return the settings of the RL stage, with its guards."""
    comparisons = build_comparisons(config, policy)
    judge = recipe.fill(
        JudgeBuilder, config, kind=config.rm_kind, rm_weights_path=judge_path, base_url=None
    )
    checked = CheckedJudgeBuilder(
        judge=judge,
        comparison_builder=comparisons,
        min_auc=config.min_judge_auc,
        report_path=f"{config.folder(config.rl_name)}/judge.json",
    )
    prompts = DistinctPrompts(source=comparisons)
    data = PairwisePreferenceRLDatasetBuilder(
        comparison_builder=prompts,
        batch_size=config.rl_groups_per_batch,
        policy_renderer_name=str(config.renderer_name),
        policy_model_name=str(config.model_name),
        group_size=config.rl_group_size,
        tournament_pattern=TournamentPattern.ALL_PAIRS_ONE_WAY,  # the judge sees both orders
        preference_model_builder=checked,
        length_control=config.length_control,
    )
    evaluator = recipe.fill(
        JudgedPolicyEvaluatorBuilder,
        config,
        comparison_builder=prompts,
        preference_model_builder=judge,
        opponent_path=policy.sampler_path,
        base_url=None,
        rule=rule_reward if config.comparisons is None else None,
        max_tokens=config.rl_max_tokens,
    )
    return recipe.fill(
        rl_train.Config,
        config,
        recipe_name="rlhf_rl",
        dataset_builder=data,
        log_path=config.folder(config.rl_name),
        load_checkpoint_path=policy.state_path,
        learning_rate=config.rl_learning_rate,
        max_tokens=config.rl_max_tokens,
        max_steps=config.rl_steps,
        num_epochs=config.rl_steps,  # max_steps ends it
        kl_reference_config=rl_train.KLReferenceConfig(
            base_model=str(config.model_name), load_checkpoint_path=policy.sampler_path
        ),
        evaluator_builders=[evaluator],
        best_metric="test/judge_win_rate",
    )


def build_comparisons(config: CLIConfig, policy: Policy) -> ComparisonDatasetBuilder:
    """Return the comparisons: those of a file, or replies of the policy with generated labels."""
    if config.comparisons is not None:
        return ComparisonBuilderFromJsonl(
            train_path=config.comparisons, test_size=config.test_size, seed=config.seed
        )
    return recipe.fill(
        OpinionComparisons,
        config,
        folder=str(config.log_path),
        sampler_path=policy.sampler_path,
        max_tokens=config.rl_max_tokens,
    )


def _common(config: CLIConfig, batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return recipe.fill(
        ChatDatasetBuilderCommonConfig, config, batch_size=batch_size, max_length=None
    )
