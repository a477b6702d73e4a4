"""Names, parameters and defaults that programs written for the Tinker cookbook rely on."""

import dataclasses
import importlib
import inspect

import chz
import pytest

from tinker_cookbook import exceptions

PACKAGES = {
    "tinker_cookbook.capture": {
        "RESERVED_KEYS",
        "Address",
        "CallDatabase",
        "CallLimits",
        "CallLog",
        "CallRefusedError",
        "CallStore",
        "CaptureExporter",
        "CaptureSink",
        "ClientSampler",
        "JsonlFileSink",
        "PolicySampler",
        "ProgramOutcome",
        "RecordedCall",
        "RecordingEndpoint",
        "Rollout",
        "Sampler",
        "capture",
        "count_sequences",
        "current_scope",
        "instrument_tinker",
        "open_calls",
        "read_calls",
        "run_in_sandbox",
        "run_program",
        "uninstrument_tinker",
    },
    "tinker_cookbook": {"__version__", *exceptions.__all__},
    "tinker_cookbook.supervised": {
        "ChatDatasetBuilder",
        "ChatDatasetBuilderCommonConfig",
        "FromConversationFileBuilder",
        "HFDatasetSource",
        "InterleavedChatDatasetBuilder",
        "StreamingSupervisedDatasetFromHFDataset",
        "SupervisedDataset",
        "SupervisedDatasetBuilder",
        "SupervisedDatasetFromHFDataset",
        "compute_bpb",
        "compute_mean_nll",
        "conversation_to_datum",
        "conversation_to_datums",
        "datum_from_model_input_weights",
    },
    "tinker_cookbook.stores": {
        "AsyncStorage",
        "EvalStore",
        "FsspecStorage",
        "IncrementalReader",
        "LocalStorage",
        "RunInfo",
        "RunMetadata",
        "RunRegistry",
        "Storage",
        "StorageStat",
        "TrainingRunStore",
        "storage_from_uri",
        "storage_join",
    },
    "tinker_cookbook.renderers": {
        "AudioPart",
        "ContentPart",
        "ImagePart",
        "Message",
        "MessageDelta",
        "ParseFailureKind",
        "ParseTermination",
        "RenderContext",
        "Renderer",
        "Role",
        "StreamingMessageHeader",
        "StreamingTextDelta",
        "StreamingThinkingDelta",
        "TextPart",
        "ThinkingPart",
        "ToolCall",
        "ToolSpec",
        "TrainOnWhat",
        "UnparsedToolCall",
        "Utf8TokenDecoder",
        "check_renderer_name",
        "classify_parse_failure",
        "ensure_text",
        "find_image_renderer_names",
        "format_content_as_string",
        "get_registered_renderer_names",
        "get_renderer",
        "get_renderer_names",
        "get_text_content",
        "is_renderer_registered",
        "load_renderer",
        "parse_content_blocks",
        "register_renderer",
        "unregister_renderer",
    },
    "tinker_cookbook.eval": {
        "REGISTRY",
        "BenchmarkBuilder",
        "BenchmarkConfig",
        "BenchmarkEvaluator",
        "BenchmarkEvaluatorBuilder",
        "BenchmarkResult",
        "EndpointClient",
        "EvalStore",
        "Evaluator",
        "EvaluatorBuilder",
        "RunMetadata",
        "SamplingClientEvaluator",
        "SamplingClientEvaluatorBuilder",
        "StoredTrajectory",
        "TrainingClientEvaluator",
        "compare_results",
        "endpoint_format",
        "load_result",
        "print_trajectory",
        "register",
        "run_benchmark",
        "run_benchmarks",
    },
    "tinker_cookbook.weights": {
        "ModelCardConfig",
        "build_gguf",
        "build_gguf_adapter",
        "build_hf_model",
        "build_lora_adapter",
        "download",
        "generate_model_card",
        "publish_to_hf_hub",
    },
}

# Function: its parameters in order, with the defaults that callers leave out.
SIGNATURES = {
    "tinker_cookbook.weights:download": "tinker_path, output_dir, base_url=None",
    "tinker_cookbook.weights:build_lora_adapter": (
        "base_model, adapter_path, output_path, trust_remote_code=None"
    ),
    "tinker_cookbook.weights:build_hf_model": (
        "base_model, adapter_path, output_path, dtype='bfloat16', trust_remote_code=None, "
        "merge_strategy='auto', dequantize=False, quantize=None, serving_format=None, device=None"
    ),
    "tinker_cookbook.weights:publish_to_hf_hub": (
        "model_path, repo_id, private=True, token=None, model_card=None"
    ),
    "tinker_cookbook.weights:generate_model_card": "config, repo_id=None, model_path=None",
    "tinker_cookbook.supervised.common:datum_from_model_input_weights": (
        "model_input, weights, max_length=None, reduction='none'"
    ),
    "tinker_cookbook.supervised.common:compute_mean_nll": "logprobs_list, weights_list",
    "tinker_cookbook.supervised.common:compute_bpb": (
        "logprobs_list, weights_list, target_tokens_list, tokenizer"
    ),
    "tinker_cookbook.supervised.data:conversation_to_datum": (
        "conversation, renderer, max_length, "
        "train_on_what=<TrainOnWhat.ALL_ASSISTANT_MESSAGES: 'all_assistant_messages'>, "
        "reduction='mean'"
    ),
    "tinker_cookbook.checkpoint_utils:load_checkpoints_file": "log_dir",
    "tinker_cookbook.checkpoint_utils:get_last_checkpoint": "log_dir, required_key='state_path'",
    "tinker_cookbook.checkpoint_utils:save_checkpoint_async": (
        "training_client, name, log_path, loop_state, kind='state', ttl_seconds=None"
    ),
    "tinker_cookbook.cli_utils:check_log_dir": "log_dir, behavior_if_exists",
    "tinker_cookbook.cli_utils:model_name_from_argv": "argv, default",
    "tinker_cookbook.eval.benchmarks:run_benchmark": (
        "benchmark, sampling_client, renderer, config=None"
    ),
    "tinker_cookbook.eval.benchmarks:run_benchmarks": (
        "names, sampling_client, renderer, config=None, parallel=True"
    ),
    "tinker_cookbook.eval.benchmarks:load_trajectories": (
        "save_dir, benchmark_name, correct_only=False, incorrect_only=False, errors_only=False"
    ),
    "tinker_cookbook.eval.benchmarks:regrade_trajectories": (
        "save_dir, benchmark_name, grade_fn=None, aggregate_fn=None"
    ),
    "tinker_cookbook.eval.benchmark_evaluator:BenchmarkEvaluator": (
        "benchmark_name, renderer, max_examples=100, max_tokens=32768, temperature=0.6"
    ),
    "tinker_cookbook.hyperparam_utils:get_lr": "model_name, is_lora=True",
    "tinker_cookbook.hyperparam_utils:get_lora_lr_over_full_finetune_lr": (
        "model_name, lora_alpha=32"
    ),
    "tinker_cookbook.model_info:get_model_attributes": "model_name",
    "tinker_cookbook.model_info:get_recommended_renderer_name": "model_name",
    "tinker_cookbook.model_info:get_recommended_renderer_names": "model_name",
    "tinker_cookbook.tokenizer_utils:get_tokenizer": "model_name",
    "tinker_cookbook.tokenizer_utils:register_tokenizer": "name, factory",
    "tinker_cookbook.tokenizer_utils:unregister_tokenizer": "name",
    "tinker_cookbook.eval.benchmarks._common:limit_dataset": "ds, max_examples, shuffle_seed=None",
    "tinker_cookbook.eval.benchmarks._common:load_benchmark_dataset": (
        "path, name=None, split='test', trust_remote_code=None"
    ),
    "tinker_cookbook.eval.benchmarks._common:get_sandbox_factory": "config, packages=None",
    "tinker_cookbook.eval.benchmarks._common:parse_kwargs": "raw_kwargs, instruction_ids=None",
    "tinker_cookbook.eval.benchmarks.aime:AIMEMessageEnv": (
        "problem, expected, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.ceval:CEvalMessageEnv": (
        "prompt, expected, subject='', example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.gpqa:GPQAMessageEnv": (
        "prompt, expected, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.gsm8k:GSM8KMessageEnv": (
        "question, expected, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.ifbench:IFBenchEnv": (
        "prompt, instruction_ids, kwargs_list, renderer, example_id=''"
    ),
    "tinker_cookbook.eval.benchmarks.ifeval:IFEvalMessageEnv": (
        "messages, instruction_ids, kwargs_list, example_id=''"
    ),
    "tinker_cookbook.eval.benchmarks.math500:MATH500MessageEnv": (
        "problem, expected, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.mbpp:MBPPMessageEnv": (
        "prompt, task_prompt, test_list, sandbox_factory, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.mmlu_pro:MMLUProMessageEnv": (
        "prompt, expected, valid_letters, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.mmlu_redux:MMLUReduxMessageEnv": (
        "prompt, expected, subject, example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.benchmarks.supergpqa:SuperGPQAMessageEnv": (
        "prompt, expected, valid_letters='ABCD', discipline='', example_id='', system_prompt=None"
    ),
    "tinker_cookbook.eval.custom_evaluators:CustomEvaluator": (
        "dataset, grader_fn, model_name, renderer_name"
    ),
    "tinker_cookbook.eval.custom_evaluators:grader_fn": "response, target",
    "tinker_cookbook.weights._adapter:build_lora_adapter": (
        "base_model, adapter_path, output_path, trust_remote_code=None"
    ),
    "tinker_cookbook.utils.lr_scheduling:compute_schedule_lr_multiplier": (
        "lr_schedule, step, total_steps"
    ),
    "tinker_cookbook.utils.misc_utils:timed": "key, metrics",
    "tinker_cookbook.utils.misc_utils:dict_mean": "list_of_dicts",
    "tinker_cookbook.utils.misc_utils:all_same": "xs",
    "tinker_cookbook.utils.misc_utils:split_list": "lst, num_splits",
    "tinker_cookbook.utils.misc_utils:concat_lists": "list_of_lists",
    "tinker_cookbook.utils.misc_utils:not_none": "x",
    "tinker_cookbook.utils.ml_log:dump_config": "config",
    "tinker_cookbook.utils.ml_log:setup_logging": (
        "log_dir, wandb_project=None, wandb_name=None, config=None, "
        "do_configure_logging_module=True"
    ),
    "tinker_cookbook.utils.ml_log:JsonLogger": "log_dir, store=None",
    "tinker_cookbook.utils.ml_log:TrackioLogger": (
        "project=None, config=None, log_dir=None, trackio_name=None"
    ),
    "tinker_cookbook.utils.cost_estimation:TokenUsage": (
        "sampled=0, prefill_cached=0, prefill_uncached=0, trained=0"
    ),
    "tinker_cookbook.utils.cost_estimation:TokenCostRates": (
        "prefill_usd_per_million, cached_prefill_usd_per_million, sample_usd_per_million, "
        "train_usd_per_million"
    ),
    "tinker_cookbook.utils.cost_estimation:rates_from_pricing_entry": "entry",
    "tinker_cookbook.utils.cost_estimation:load_model_pricing": (
        "url='https://tinker-docs.thinkingmachines.ai/tinker/models.json', timeout=5.0"
    ),
    "tinker_cookbook.utils.cost_estimation:fetch_model_pricing": (
        "model_name, url='https://tinker-docs.thinkingmachines.ai/tinker/models.json', timeout=5.0"
    ),
    "tinker_cookbook.stores.storage:LocalStorage": "root, mkdir=True",
    "tinker_cookbook.stores.registry:RunRegistry": "storages",
    "tinker_cookbook.stores.training_store:TrainingRunStore": "storage, prefix=''",
    "tinker_cookbook.stores.eval_store:EvalStore": "storage_or_path, prefix=''",
    "tinker_cookbook.utils.file_utils:read_jsonl": "path",
    "tinker_cookbook.utils.format_colorized:format_colorized": (
        "tokens, weights, tokenizer, draw_newline_arrow=False"
    ),
    "tinker_cookbook.display:format_trajectory": (
        "trajectory, tokenizer, only_last_transition=False"
    ),
    "tinker_cookbook.preference.train_dpo:compute_dpo_loss": (
        "chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, dpo_beta"
    ),
    "tinker_cookbook.preference.train_dpo:create_dpo_clients": (
        "config, service_client, resume_info=None, user_metadata=None"
    ),
    "tinker_cookbook.preference.train_dpo:do_update": (
        "epoch_idx, batch_idx, n_batches, total_steps, config, training_client, reference_client, "
        "evaluators, infrequent_evaluators, dataset, ml_logger, log_path, tokenizer, "
        "checkpoint_mgr=None"
    ),
    "tinker_cookbook.preference.train_dpo:print_example": "datum, tokenizer, label=''",
    "recipes.preference.dpo.train:get_dataset_builder": (
        "dataset, model_name, renderer_name, max_length, batch_size"
    ),
    "tinker_cookbook.rl.train:save_checkpoint_and_get_sampling_client": (
        "training_client, checkpoint_mgr, i_batch, start_batch=0, record_stability_info=False"
    ),
    "tinker_cookbook.utils.logtree:init_trace": "title, path=None, write_on_error=True",
    "tinker_cookbook.utils.logtree:details": "text, summary='Details', pre=True",
    "tinker_cookbook.utils.logtree:table_from_dict": (
        "data, caption=None, key_header='key', value_header='value', sort_by=None"
    ),
    "tinker_cookbook.utils.trace:update_scope_context": "values",
    "recipes.math_rl.math_env:get_math_dataset_builder": (
        "dataset_name, batch_size, model_name_for_tokenizer, renderer_name, group_size, seed=0"
    ),
    "recipes.math_rl.math_env:safe_grade": (
        "given_answer, ground_truth, grader='sympy', timeout=1.0"
    ),
    "recipes.sl_basic:build_config_blueprint": "",
}

# Config: fields that programs set, with their defaults.
FIELDS = {
    "tinker_cookbook.supervised.train:Config": {
        "log_path": None,
        "model_name": None,
        "recipe_name": None,
        "load_checkpoint_path": None,
        "renderer_name": None,
        "dataset_builder": None,
        "learning_rate": 1e-4,
        "lr_schedule": "linear",
        "num_epochs": 1,
        "lora_rank": 32,
        "base_url": None,
        "evaluator_builders": None,
        "infrequent_evaluator_builders": None,
        "save_every": 20,
        "eval_every": 10,
        "infrequent_eval_every": 100,
        "ttl_seconds": 604800,
        "rolling_save_every": 0,
        "rolling_ttl_seconds": 7200,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "wandb_project": None,
        "wandb_name": None,
        "max_steps": None,
        "submit_ahead": 1,
    },
    "tinker_cookbook.supervised.types:ChatDatasetBuilderCommonConfig": {
        "model_name_for_tokenizer": None,
        "renderer_name": None,
        "max_length": None,
        "batch_size": None,
        "train_on_what": None,
    },
    "tinker_cookbook.supervised.data:FromConversationFileBuilder": {
        "common_config": None,
        "file_path": None,
        "test_size": 0,
        "shuffle_seed": 0,
    },
    "recipes.math_rl.math_env:Gsm8kDatasetBuilder": {
        "batch_size": None,
        "model_name_for_tokenizer": None,
        "renderer_name": None,
        "group_size": None,
        "seed": 0,
    },
    "tinker_cookbook.preference.train_dpo:Config": {
        "log_path": None,
        "model_name": None,
        "recipe_name": None,
        "dataset_builder": None,
        "load_checkpoint_path": None,
        "renderer_name": None,
        "learning_rate": 1e-5,
        "lr_schedule": "linear",
        "num_epochs": 1,
        "dpo_beta": 0.1,
        "lora_rank": 32,
        "num_replicas": 8,
        "base_url": None,
        "evaluator_builders": None,
        "infrequent_evaluator_builders": None,
        "save_every": 20,
        "eval_every": 10,
        "infrequent_eval_every": 100,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "wandb_project": None,
        "wandb_name": None,
        "reference_model_name": None,
        "max_steps": None,
    },
    "tinker_cookbook.preference.dpo_datasets:DPODatasetBuilderFromComparisons": {
        "common_config": None,
        "comparison_builder": None,
    },
    "tinker_cookbook.preference.preference_datasets:ComparisonBuilderFromJsonl": {
        "train_path": None,
        "test_path": None,
        "swap": False,
    },
    "recipes.preference.dpo.train:CLIConfig": {
        "dataset": "hhh",
        "learning_rate": 1e-5,
        "lr_schedule": "linear",
        "dpo_beta": 0.1,
        "max_length": 8192,
        "batch_size": 256,
        "reference_model_name": None,
    },
    "recipes.math_rl.arithmetic_env:ArithmeticDatasetBuilder": {
        "batch_size": None,
        "model_name_for_tokenizer": None,
        "renderer_name": None,
        "n_batches": None,
        "group_size": None,
        "include_fewshot": True,
    },
    "tinker_cookbook.checkpoint_utils:CheckpointRecord": {
        "name": None,
        "batch": None,
        "epoch": None,
        "final": None,
        "state_path": None,
        "sampler_path": None,
        "extra": None,
    },
}


# Module: names that outside programs import from it.
NAMES = {
    "tinker_cookbook.checkpoint_utils": "CheckpointManager CheckpointRecord get_last_checkpoint "
    "load_checkpoints_file save_checkpoint save_checkpoint_async",
    "tinker_cookbook.completers": "MessageCompleter StopCondition TinkerMessageCompleter "
    "TinkerTokenCompleter TokenCompleter TokensWithLogprobs",
    "tinker_cookbook.display": "colorize_example format_trajectory to_ints",
    "tinker_cookbook.model_info": "get_deepseek_info get_gpt_oss_info get_llama_info "
    "get_model_attributes get_moonshot_info get_nvidia_info get_qwen_info "
    "get_recommended_renderer_name get_recommended_renderer_names get_zai_info "
    "warn_if_renderer_not_recommended",
    "tinker_cookbook.preference.comparison_policy_evaluator": "ComparisonEvaluator",
    "tinker_cookbook.preference.dpo_datasets": "DPODatasetBuilderFromComparisons",
    "tinker_cookbook.preference.preference_datasets": "ChatDatasetBuilderFromComparisons "
    "ComparisonBuilderFromJsonl ComparisonDatasetBuilder",
    "tinker_cookbook.preference.train_dpo": "Config compute_dpo_loss create_dpo_clients do_update "
    "main print_example",
    "tinker_cookbook.preference.types": "Comparison ComparisonRenderer "
    "ComparisonRendererFromChatRenderer LabeledComparison PreferenceModel PreferenceModelBuilder "
    "PreferenceModelBuilderFromChatRenderer PreferenceModelFromChatRenderer",
    "tinker_cookbook.preference.bradley_terry": "PointwiseDatasetBuilder bradley_terry",
    "tinker_cookbook.preference.judge_quality": "CheckedJudgeBuilder JudgeEvaluatorBuilder "
    "JudgeQuality check_judge measure_judge",
    "tinker_cookbook.preference.judged_policy": "JudgedPolicyEvaluatorBuilder",
    "tinker_cookbook.preference.judges": "JudgeBuilder PairwiseJudge PointwiseJudge",
    "tinker_cookbook.preference.sampled_comparisons": "DistinctPrompts SampledComparisons "
    "SampledReply sample_replies",
    "tinker_cookbook.preference.train_pointwise": "Config main",
    "tinker_cookbook.renderers.base": "ContentPart ImagePart Message RenderContext "
    "RenderedMessage Renderer TextPart ThinkingPart ToolCall ToolSpec TrainOnWhat ensure_list "
    "ensure_text image_to_chunk message_to_jsonable parse_content_blocks "
    "parse_response_for_stop_token remove_thinking tokens_weights_from_strings_weights",
    "tinker_cookbook.renderers.deepseek_v3": "DeepSeekV3DisableThinkingRenderer "
    "DeepSeekV3ThinkingRenderer",
    "tinker_cookbook.renderers.gpt_oss": "GptOssRenderer",
    "tinker_cookbook.renderers.kimi_k2": "KimiK2Renderer",
    "tinker_cookbook.renderers.kimi_k25": "KimiK25DisableThinkingRenderer KimiK25Renderer",
    "tinker_cookbook.renderers.kimi_k26": "KimiK26PreserveThinkingRenderer",
    "tinker_cookbook.renderers.llama3": "Llama3Renderer",
    "tinker_cookbook.renderers.nemotron3": "Nemotron3DisableThinkingRenderer "
    "Nemotron3LowThinkingRenderer Nemotron3PreserveThinkingRenderer Nemotron3Renderer "
    "Nemotron3UltraDisableThinkingRenderer Nemotron3UltraMediumThinkingRenderer "
    "Nemotron3UltraPreserveThinkingRenderer Nemotron3UltraRenderer",
    "tinker_cookbook.renderers.qwen3": "Qwen3DisableThinkingRenderer Qwen3InstructRenderer "
    "Qwen3Renderer Qwen3VLInstructRenderer Qwen3VLRenderer",
    "tinker_cookbook.renderers.qwen3_5": "Qwen3_5DisableThinkingRenderer Qwen3_5Renderer",
    "tinker_cookbook.renderers.qwen3_8": "Qwen3_8DisableThinkingRenderer Qwen3_8Renderer "
    "REASONING_EFFORT_INSTRUCTIONS",
    "tinker_cookbook.renderers.role_colon": "RoleColonRenderer",
    "tinker_cookbook.rl.length_control": "LengthControl",
    "tinker_cookbook.rl.preference_envs": "PairwisePreferenceDataset "
    "PairwisePreferenceGroupBuilder PairwisePreferenceRLDatasetBuilder PreferenceEnv "
    "TournamentPattern get_pairs get_pairs_chunked",
    "tinker_cookbook.rl.problem_env": "ProblemEnv ProblemGroupBuilder logger",
    "tinker_cookbook.rl.rollouts": "do_group_rollout do_single_rollout set_rollout_executor "
    "do_group_rollout_and_filter_constant_reward",
    "tinker_cookbook.rl.train": "AsyncConfig Config KLReferenceConfig StreamMinibatchConfig main "
    "gather_with_progress print_group save_checkpoint_and_get_sampling_client train_step",
    "tinker_cookbook.interrupts": "hide_import_traceback",
    "tinker_cookbook.commands._recipe_files": "refuse_unknown_recipes",
    "tinker_cookbook.run_directory": "default_log_path open_log_dir truncate_metrics",
    "tinker_cookbook.run_options": "LogdirBehavior check_options shared_options",
    "tinker_cookbook.run_report": "report_complete report_run sample_command",
    "tinker_cookbook.utils.logtree": "Formatter Node Theme Trace details flush_trace header "
    "init_trace jinja_context log_formatter log_html log_text optional_enable_logging "
    "render_with_jinja scope_details scope_disable scope_div scope_header "
    "scope_header_decorator table table_from_dict table_from_dict_of_lists "
    "write_html_with_default_style write_trace_json",
    "tinker_cookbook.utils.logtree_formatters": "CONVERSATION_CSS ConversationFormatter",
    "tinker_cookbook.utils.trace": "IterationWindow ScopeContext get_scope_context scope "
    "scope_span scope_span_sync trace_init trace_iteration trace_shutdown update_scope_context",
}
# Recipe: names that outside programs import, from `recipes` and from `tinker_cookbook.recipes`.
RECIPE_NAMES = {
    "chat_sl.chat_datasets": "NoRobotsBuilder Tulu3Builder",
    "code_rl.code_env": "DeepcoderDatasetBuilder DeepcoderEnvGroupBuilder DeepcoderTask",
    "code_rl.code_grading": "extract_code_from_model postprocess_lcb_sample "
    "sandbox_check_correctness taco_to_lcb_format",
    "math_rl.arithmetic_env": "ArithmeticDatasetBuilder ArithmeticEnv",
    "math_rl.math_env": "DeepMathDatasetBuilder Gsm8kDatasetBuilder MathDatasetBuilder MathEnv "
    "PolarisDatasetBuilder ProblemGroupBuilder extract_gsm8k_final_answer "
    "get_math_dataset_builder safe_grade",
    "math_rl.math_grading": "extract_boxed grade_answer grade_answer_math_verify "
    "normalize_answer run_with_timeout_signal",
    "multiplayer_rl.guess_number.env": "GuessNumberDataset GuessNumberDatasetBuilder "
    "GuessNumberEnv GuessNumberEnvGroupBuilder",
    "multiplayer_rl.text_arena.env": "TwoPlayerTextArenaDatasetBuilder",
    "multiplayer_rl.twenty_questions.env": "TwentyQuestionsDatasetBuilder TwentyQuestionsEnv "
    "TwentyQuestionsEnvGroupBuilder",
    "preference.datasets": "ArenaComparisonBuilder HHHComparisonBuilder "
    "HelpSteer2ComparisonBuilder HelpSteer3ComparisonBuilder Tulu38BComparisonBuilder "
    "UltraFeedbackComparisonBuilder",
    "preference.dpo.train": "CLIConfig cli_main get_dataset_builder",
    "preference.rlhf.rlhf_pipeline": "CLIConfig sft_stage train_rl train_rm",
    "preference.shorter.env": "PreferenceModelShorter ShorterComparisonBuilder "
    "ShorterPreferenceModelBuilder",
    "preference.shorter.train": "CLIConfig cli_main",
    "rl_basic": "build_config_blueprint",
    "sl_basic": "build_config_blueprint",
}


def load(path: str):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("package", list(PACKAGES))
def test_a_package_exports_exactly_these_names(package: str):
    module = importlib.import_module(package)
    assert set(module.__all__) == PACKAGES[package]
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("module", list(NAMES))
def test_modules_have_the_names_that_programs_import(module: str):
    found = vars(importlib.import_module(module))
    assert [name for name in NAMES[module].split() if name not in found] == []


@pytest.mark.parametrize("package", ["recipes", "tinker_cookbook.recipes"])
@pytest.mark.parametrize("recipe", list(RECIPE_NAMES))
def test_recipes_have_the_names_that_programs_import(package: str, recipe: str):
    found = vars(importlib.import_module(f"{package}.{recipe}"))
    assert [name for name in RECIPE_NAMES[recipe].split() if name not in found] == []


@pytest.mark.parametrize("path", list(SIGNATURES))
def test_parameters_come_in_this_order_with_these_defaults(path: str):
    wanted = [word.strip() for word in SIGNATURES[path].split(", ") if word]
    parameters = inspect.signature(load(path)).parameters.values()
    found = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    ]
    assert found[: len(wanted)] == wanted
    rest = [p for p in parameters if p.kind is not p.VAR_KEYWORD][len(wanted) :]
    assert all(p.default is not p.empty for p in rest), "a further parameter must be optional"


@pytest.mark.parametrize("path", list(FIELDS))
def test_configs_have_these_fields_and_defaults(path: str):
    target = load(path)
    if dataclasses.is_dataclass(target):
        found = {field.name: field.default for field in dataclasses.fields(target)}
    else:
        found = {name: field._default for name, field in chz.chz_fields(target).items()}
    missing = FIELDS[path].keys() - found.keys()
    assert not missing
    for name, default in FIELDS[path].items():
        if default is not None:
            assert found[name] == default, name
