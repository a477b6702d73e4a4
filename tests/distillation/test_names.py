"""Names and settings that programs of the Tinker cookbook use."""

from __future__ import annotations

import importlib
import inspect

import chz
import pytest

from tinker_cookbook import distillation

FIELDS = {
    "datasets:TeacherConfig": "base_model load_checkpoint_path",
    "datasets:DistillationDatasetConfig": "dataset_builder teacher_config groups_per_batch",
    "datasets:PromptOnlyDatasetBuilder": "dataset_name groups_per_batch group_size "
    "model_name_for_tokenizer renderer_name convo_prefix max_prompt_tokens",
    "train_off_policy:DatasetWithTeacher": "dataset_builder teacher_config weight",
    "train_off_policy:Config": "learning_rate dataset_configs model_name recipe_name renderer_name "
    "lora_rank n_teacher_targets teacher_concurrency batch_size save_every eval_every max_steps "
    "load_checkpoint_path log_path wandb_project wandb_name session_name base_url ttl_seconds "
    "enable_trace evaluator_builders",
    "train_on_policy:Config": "learning_rate dataset_configs model_name recipe_name renderer_name "
    "max_tokens temperature compute_post_kl evaluator_builders lora_rank kl_penalty_coef "
    "kl_discount_factor loss_fn loss_fn_config num_substeps wandb_project wandb_name session_name "
    "log_path base_url enable_trace span_chart_every eval_every save_every load_checkpoint_path "
    "max_steps",
    "sdft:Config": "model_name recipe_name renderer_name lora_rank base_url learning_rate "
    "max_tokens temperature loss_fn topk reverse demo_template system_prompt teacher_sync_every "
    "max_context_length evaluator_builders eval_every save_every num_substeps log_path "
    "wandb_project wandb_name session_name load_checkpoint_path max_steps enable_trace "
    "span_chart_every",
}
PARAMETERS = {
    "datasets:CompositeDataset": "datasets groups_per_batch_list",
    "datasets:PromptOnlyEnv": "prompt renderer convo_prefix",
    "datasets:PromptOnlyDataset": "prompts batch_size group_size renderer tokenizer "
    "max_prompt_tokens convo_prefix dataset_name",
    "datasets:load_deepmath_prompts": "split",
    "train_on_policy:incorporate_kl_penalty": "data_D teacher_clients_D dataset_indices_D "
    "kl_penalty_coef kl_discount_factor",
    "train_on_policy:prepare_minibatch": "env_group_builders_P trajectory_groups_P tokenizer "
    "dataset_indices_P teacher_clients kl_penalty_coef kl_discount_factor",
    "sdft:compute_sdft_advantages": "data_D metadata_D teacher_client teacher_prompts_P "
    "max_context_length",
    "sdft:build_topk_distillation_datums": "data_D metadata_D teacher_client teacher_prompts_P "
    "topk max_context_length vocab_size skip_first_n_tokens",
    "sdft:build_reverse_kl_datums": "data_D metadata_D teacher_client teacher_prompts_P topk "
    "max_context_length vocab_size skip_first_n_tokens",
    "sdft:reverse_kl_custom_loss": "data logprobs_list",
    "sdft:build_sdft_teacher_prompt": "question golden_answer renderer system_prompt demo_template",
    "sdft:main": "cfg sdft_dataset test_dataset",
}


def find(name: str):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"tinker_cookbook.distillation.{module}"), attribute)


def test_the_package_offers_its_three_loops():
    assert set(distillation.__all__) == {"train_on_policy", "train_off_policy", "sdft"}


@pytest.mark.parametrize("name", FIELDS)
def test_settings(name: str):
    assert set(FIELDS[name].split()) <= set(chz.chz_fields(find(name)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str):
    assert list(inspect.signature(find(name)).parameters) == PARAMETERS[name].split()
