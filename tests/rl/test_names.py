"""Names and parameters that programs use: RL, completers, tools, sandboxes, preferences."""

# pyright: reportArgumentType=false

from __future__ import annotations

import importlib
import inspect

import chz
import pytest

PACKAGES = {
    "tinker_cookbook.rl": "Action ActionExtra Env EnvGroupBuilder Logs Metrics Observation "
    "RLDataset RLDatasetBuilder RolloutError StepResult Trajectory TrajectoryGroup Transition "
    "EpochCycledRLDataset cycle_permutation epoch_batch_index InterleavedRLDatasetBuilder FailFast "
    "RetryOnFailure RolloutStrategy",
    "tinker_cookbook.preference": "Comparison ComparisonDatasetBuilder LabeledComparison",
    "tinker_cookbook.tool_use": "AgentToolMessageEnv build_agent_tool_env FunctionTool Tool "
    "ToolInput ToolResult ToolSpec error_tool_result handle_tool_call simple_tool_result tool",
    "tinker_cookbook.sandbox": "SandboxBackend SandboxFusionClient SandboxInterface SandboxResult "
    "SandboxTerminatedError",
}
# Module: callables with their first parameters, in order; classes stand for their constructors.
CALLS = {
    "tinker_cookbook.completers": """
        TokensWithLogprobs(tokens, maybe_logprobs, stop_reason, sequence_id,
            prompt_cache_hit_tokens)
        TinkerTokenCompleter(sampling_client, max_tokens, temperature, context_window)
        TinkerMessageCompleter(sampling_client, renderer, max_tokens, stop_condition, temperature)
        TokenCompleter.__call__(self, model_input, stop, max_tokens)
        MessageCompleter.__call__(self, messages)""",
    "tinker_cookbook.rl.data_processing": """
        compute_advantages(trajectory_groups_P)
        trajectory_to_data(traj, traj_advantage, include_provenance)
        assemble_training_data(trajectory_groups_P, advantages_P, include_provenance)
        remove_constant_reward_groups(trajectory_groups_P)""",
    "tinker_cookbook.rl.message_env": """
        MessageStepResult(reward, episode_done, next_messages, metrics, logs, next_stop_condition)
        EnvFromMessageEnv(renderer, message_env, failed_parse_reward, terminate_on_parse_error,
            max_trajectory_tokens, max_generation_tokens, context_overflow_reward,
            terminate_on_length, parse_error_policy, rollout_limits)""",
    "tinker_cookbook.rl.metric_util": """
        compute_trajectory_metrics(trajectory_groups_P, taglist_P)
        dataset_to_env_group_builders(dataset)
        RLTestSetEvaluator(dataset, max_tokens, name, num_groups_to_log, strategy)""",
    "tinker_cookbook.rl.metrics": """
        compute_kl_sample_train(data_D, training_logprobs_D)
        compute_post_kl(data_D, post_sampling_client)
        incorporate_kl_penalty(data_D, base_sampling_client, kl_penalty_coef, kl_discount_factor)
        discounted_future_sum_vectorized(x, gamma)""",
    "tinker_cookbook.rl.preference_envs": """
        PreferenceEnv(convo_prefix, policy_renderer)
        get_pairs(n, pattern)
        get_pairs_chunked(n, pattern, chunk_size)
        PairwisePreferenceGroupBuilder(convo_prefix, policy_renderer, tournament_pattern,
            preference_model, num_envs, content_preprocessor, matchup_group_size,
            eval_target_completion_A)
        PairwisePreferenceDataset(comparison_builder, renderer, batch_size, preference_model,
            tournament_pattern, group_size, content_preprocessor)""",
    "tinker_cookbook.rl.problem_env": """
        ProblemEnv(renderer, convo_prefix, format_coef, require_stop_sequence_for_format)
        ProblemGroupBuilder(env_thunk, num_envs, dataset_name)""",
    "tinker_cookbook.rl.problems": """
        Problem(question, answer, tags)
        Grade(reward, metrics, reason, well_formed)
        SingleTurn(grade, system_prompt, examples, format_penalty, in_thread)
        problem_data(problems, grade)
        episode_data(problems, environment)""",
    "tinker_cookbook.rl.rollout_runner": """
        run_rollout(policy, env, limits, hooks, parse_errors, config)""",
    "tinker_cookbook.rl.rollout_strategy": """
        FailFast()
        RetryOnFailure(max_retries, per_rollout_timeout)
        MinViableGroup(min_successful, max_retries, per_rollout_timeout)
        rollout_strategy_from_config(rollout_error_tolerance)""",
    "tinker_cookbook.rl.rollouts": """
        do_single_rollout(policy, env)
        do_group_rollout(env_group_builder, policy, strategy, termination)
        do_group_rollout_and_filter_constant_reward(sampling_client, env_group_builder, max_tokens,
            temperature, do_remove_constant_reward_groups, enable_logging, strategy, termination)
        set_rollout_executor(executor)
        get_rollout_executor()""",
    "tinker_cookbook.rl.train": """
        main(config, rollout_executor)""",
    "tinker_cookbook.rl.types": """
        StepResult(reward, episode_done, next_observation, next_stop_condition, metrics, logs)
        Transition(ob, ac, reward, episode_done, metrics, logs)
        Trajectory(transitions, final_ob, stop_reason)
        TrajectoryGroup(trajectories_G, final_rewards_G, metrics_G, rollout_errors)
        RolloutError(error_type, error_message)
        Env.step(self, action, extra)
        EnvGroupBuilder.compute_group_rewards(self, trajectory_group, env_group)""",
    "tinker_cookbook.preference.types": """
        Comparison(prompt_conversation, completion_A, completion_B)
        LabeledComparison(comparison, label)
        ComparisonRendererFromChatRenderer(convo_renderer)
        PreferenceModelFromChatRenderer(convo_renderer, sampling_client)""",
    "tinker_cookbook.preference.comparison_policy_evaluator": """
        ComparisonEvaluator(preference_model_builder, comparisons, renderer_name,
            model_name_for_tokenizer, both_ways, max_tokens, content_preprocessor)""",
    "tinker_cookbook.tool_use": """
        build_agent_tool_env(renderer, tools, initial_messages, reward_fn, rollout_config,
            model_name, max_turns, failed_parse_reward)
        handle_tool_call(tools, tool_call)
        simple_tool_result(content, call_id, name, should_stop, metrics, metadata)
        error_tool_result(error_msg, call_id, name, error_type, should_stop)""",
    "tinker_cookbook.sandbox": """
        SandboxFusionClient(url, max_concurrency)
        SandboxFusionClient.run(self, code, files, timeout, language)
        SandboxInterface.run_command(self, command, workdir, timeout, max_output_bytes)
        SandboxInterface.read_file(self, path, max_bytes, timeout)
        SandboxInterface.write_file(self, path, content, executable, timeout)
        ModalSandbox.create(app_name, timeout, image, max_stream_output_bytes)""",
}
# Config classes: the fields that programs set.
FIELDS = {
    "tinker_cookbook.rl.train:Config": "learning_rate dataset_builder model_name recipe_name "
    "max_tokens log_path eval_every save_every evaluator_builders load_checkpoint_path "
    "renderer_name wandb_project wandb_name session_name kl_penalty_coef kl_discount_factor "
    "kl_reference_config loss_fn loss_fn_config num_substeps lora_rank temperature compute_post_kl "
    "remove_constant_reward_groups rollout_error_tolerance termination enable_trace "
    "span_chart_every async_config stream_minibatch_config base_url ttl_seconds rolling_save_every "
    "rolling_ttl_seconds num_groups_to_log rollout_json_export num_epochs max_steps",
    "tinker_cookbook.rl.train:AsyncConfig": "max_steps_off_policy groups_per_batch loss_fn",
    "tinker_cookbook.rl.train:StreamMinibatchConfig": "groups_per_batch num_minibatches",
    "tinker_cookbook.rl.rollout_limits:RolloutLimits": "max_turns max_trajectory_tokens "
    "max_sampled_tokens max_tool_calls max_turn_tokens rollout_timeout_seconds "
    "sampling_turn_timeout_seconds",
    "tinker_cookbook.rl.preference_envs:PairwisePreferenceRLDatasetBuilder": "comparison_builder "
    "batch_size policy_renderer_name policy_model_name tournament_pattern group_size "
    "content_preprocessor preference_model_builder",
    "tinker_cookbook.rl.interleaved:InterleavedRLDatasetBuilder": "sources weights "
    "groups_per_batch total_batches seed",
}


def calls() -> list[tuple[str, str, list[str]]]:
    found = []
    for module, text in CALLS.items():
        for call in text.replace("\n", " ").split(")"):
            name, _, parameters = call.strip().partition("(")
            if name:
                found.append(
                    (module, name, [p.strip() for p in parameters.split(",") if p.strip()])
                )
    return found


@pytest.mark.parametrize("package", list(PACKAGES))
def test_packages_export_these_names(package: str):
    module = importlib.import_module(package)
    missing = set(PACKAGES[package].split()) - set(module.__all__)
    assert not missing
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(("module", "name", "wanted"), calls(), ids=lambda value: str(value))
def test_parameters_come_in_this_order(module: str, name: str, wanted: list[str]):
    target = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    parameters = list(inspect.signature(target).parameters.values())
    assert [p.name for p in parameters][: len(wanted)] == wanted
    rest = [p for p in parameters[len(wanted) :] if p.kind is not p.VAR_KEYWORD]
    assert all(p.default is not p.empty for p in rest), "a further parameter must be optional"


@pytest.mark.parametrize("path", list(FIELDS))
def test_configs_have_these_fields(path: str):
    module, _, name = path.partition(":")
    fields = chz.chz_fields(getattr(importlib.import_module(module), name))
    assert not set(FIELDS[path].split()) - set(fields)
