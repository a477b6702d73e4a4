"""The three stages of the pipeline. Each is a run with its own directory, and resumes by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import chz

from tinker_cookbook import recipe, recipe_runner
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.judges import JudgeKind
from tinker_cookbook.rl.length_control import LengthControl
from tinker_cookbook.runs.options import (
    CheckpointOptions,
    ModelOptions,
    TrackingOptions,
    check_options,
)

from .manifest import Manifest, StageRecord

if TYPE_CHECKING:
    from tinker_cookbook.runs.open_run import RunResult

    from .stages import Policy

__all__ = ["CLIConfig", "run_pipeline", "sft_stage", "train_rl", "train_rm"]


@chz.chz
class CLIConfig(TrackingOptions, CheckpointOptions, ModelOptions):
    """The settings of the pipeline."""

    run_sft: bool = chz.field(default=True, doc="Whether to run the supervised stage.")
    run_rm: bool = chz.field(default=True, doc="Whether to train the reward model.")
    run_rl: bool = chz.field(default=True, doc="Whether to train the policy against it.")
    sft_data: str | None = chz.field(
        default=None, doc="File of conversations for the first stage; default: generated opinions."
    )
    comparisons: str | None = chz.field(
        default=None,
        doc="File of comparisons; default: replies of the first stage, labelled by a rule.",
    )
    test_size: int = chz.field(default=64, doc="Comparisons held out from that file.")
    sft_learning_rate: float = chz.field(default=1e-3, doc="Peak rate of the supervised stage.")
    rm_learning_rate: float = chz.field(default=5e-4, doc="Peak rate of the reward model.")
    rl_learning_rate: float = chz.field(default=3e-4, doc="Rate of the policy.")
    sft_steps: int = chz.field(default=14, doc="Steps of the supervised stage.")
    rm_steps: int = chz.field(default=20, doc="Steps of the reward model.")
    rl_steps: int = chz.field(default=12, doc="Steps of the policy.")
    sft_batch_size: int = chz.field(default=16, doc="Conversations per supervised step.")
    rm_batch_size: int = chz.field(default=8, doc="Comparisons per step of the reward model.")
    rl_groups_per_batch: int = chz.field(default=6, doc="Questions per step of the policy.")
    rl_group_size: int = chz.field(default=4, doc="Replies per question, which play a tournament.")
    rl_max_tokens: int = chz.field(default=32, doc="Maximum tokens per reply.")
    rm_kind: JudgeKind = chz.field(
        default="pairwise",
        doc="Kind of reward model: pairwise sees two replies; pointwise scores one.",
    )
    rm_path: str | None = chz.field(
        default=None, doc="Sampler weights of a judge trained elsewhere; no judge is trained then."
    )
    min_judge_auc: float = chz.field(
        default=0.75, doc="AUC on held-out comparisons below which RL refuses the judge."
    )
    kl_penalty_coef: float = chz.field(
        default=0.02, doc="Coefficient of the KL penalty to the supervised model; 0: none."
    )
    length_method: Literal["penalty", "residual", "none"] = chz.field(
        default="penalty",
        doc="How the length of a reply counts: penalty per token above length_free_tokens, "
        "residual (less what length explains of the reward), or none.",
    )
    length_coef: float = chz.field(
        default=0.02, doc="Reward that a token costs (penalty), or share taken away (residual)."
    )
    length_free_tokens: int = chz.field(default=0, doc="Tokens that cost nothing (penalty).")
    rl_name: str = chz.field(
        default="rl", doc="Folder of the RL stage, so that several settings can be compared."
    )
    lora_rank: int = 16
    eval_every: int = 5

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        if self.rl_group_size < 2:
            raise ConfigurationError(
                f"rl_group_size={self.rl_group_size} must be 2 or greater, so that replies can be "
                "compared."
            )
        _ = self.length_control  # checks its settings

    @property
    def rm_name(self) -> str:
        """Name of the reward model's stage; judges of both kinds can be trained side by side."""
        return f"rm_{self.rm_kind}"

    @property
    def length_control(self) -> LengthControl | None:
        """The guard against rewards that grow with the length."""
        if self.length_method == "none":
            return None
        return LengthControl(
            method=self.length_method, coef=self.length_coef, free_tokens=self.length_free_tokens
        )

    def folder(self, stage: str) -> str:
        """Return the run directory of a stage."""
        return str(Path(str(self.log_path)) / stage)


def run_pipeline(config: CLIConfig) -> None:
    """Run the stages that are asked for; the same command again resumes a stopped pipeline."""
    config = recipe.complete(config)
    recipe_runner.check_lengths_fit(config, "rl_max_tokens")
    if config.dry_run:
        _describe(config)
        return
    Path(str(config.log_path)).mkdir(parents=True, exist_ok=True)
    if config.run_sft:
        sft_stage(config)
    if config.run_rm and config.rm_path is None:
        train_rm(config)
    if config.run_rl:
        train_rl(config)


def _describe(config: CLIConfig) -> None:
    """Print the work of the stages. Only that of the first is known before it has run."""
    from tinker_cookbook.commands.parts.dry_run import print_dry_run

    from . import stages

    replies = config.rl_groups_per_batch * config.rl_group_size
    print(
        f"stages   rm: {config.rm_steps} steps of {config.rm_batch_size} comparisons; rl: "
        f"{config.rl_steps} steps of {replies} replies of at most {config.rl_max_tokens} tokens; "
        "sft:"
    )
    print_dry_run(stages.build_sft(config))


def sft_stage(config: CLIConfig) -> RunResult:
    """Train on examples of replies, and record the weights."""
    from . import stages

    print("\nstage    sft: supervised training on examples")
    result = recipe_runner.train_supervised(stages.build_sft(config))
    _record(config, "sft", result, {"start": config.load_checkpoint_path})
    return result


def train_rm(config: CLIConfig) -> RunResult:
    """Train the reward model on comparisons of the first stage's replies."""
    from . import stages

    policy = _find_policy(config)
    print(f"\nstage    rm: a {config.rm_kind} reward model on comparisons")
    result = recipe_runner.train_judge(stages.build_rm(config, policy))
    _record(config, config.rm_name, result, {"replies_of": policy.sampler_path})
    return result


def train_rl(config: CLIConfig) -> RunResult:
    """Train the policy by tournaments that the reward model judges."""
    from . import stages

    policy = _find_policy(config)
    judge_path = _find_judge(config, policy)
    print("\nstage    rl: tournaments judged by the reward model")
    result = recipe_runner.train_rl(stages.build_rl(config, policy, judge_path))
    inputs = {
        "policy": policy.state_path,
        "reference": policy.sampler_path,
        "judge": judge_path,
    }
    _record(config, config.rl_name, result, inputs)
    return result


def _find_policy(config: CLIConfig) -> Policy:
    """Return the weights of the first stage; the base model if that stage is switched off."""
    from .stages import Policy

    record = Manifest(str(config.log_path)).get("sft")
    if record is not None:
        return Policy(record.state_path, record.sampler_path)
    if config.run_sft:
        raise ConfigurationError(
            f"{config.log_path} has no record of the supervised stage; run it first (run_sft=true)."
        )
    if config.load_checkpoint_path is not None:
        raise ConfigurationError(
            "load_checkpoint_path is where the supervised stage starts, and run_sft=false leaves "
            "that stage out; use run_sft=true."
        )
    return Policy(None, None)


def _find_judge(config: CLIConfig, policy: Policy) -> str:
    """Return the sampler weights of the judge that was trained for this policy."""
    if config.rm_path is not None:
        return config.rm_path
    manifest = Manifest(str(config.log_path))
    record = manifest.check_inputs(config.rm_name, replies_of=policy.sampler_path)
    if record is None:
        raise ConfigurationError(
            f"{config.log_path} has no record of a {config.rm_kind} reward model; train it first "
            "(run_rm=true), or name one (rm_path=tinker://...)."
        )
    return record.sampler_path


def _record(
    config: CLIConfig, stage: str, result: RunResult, inputs: dict[str, str | None]
) -> None:
    record = StageRecord(result.log_path, result.state_path, result.sampler_path, inputs)
    Manifest(str(config.log_path)).record(stage, record)
