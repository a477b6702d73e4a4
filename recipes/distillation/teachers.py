"""Train the teachers of these recipes: by rewards, or on solved examples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from tinker_cookbook import recipe
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.problems import ProblemDatasetBuilder
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.supervised import train as sl_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

__all__ = ["train_by_examples", "train_by_rewards"]

GROUPS_PER_BATCH, GROUP_SIZE, TEST_GROUP_SIZE = 4, 8, 2
BATCH_SIZE, MAX_LENGTH = 16, 256
LEARNING_RATE = 5e-4
LORA_RANK = 32


def train_by_rewards(
    student: SharedOptions,
    data: type[ProblemDatasetBuilder],
    *,
    steps: int,
    max_tokens: int,
    eval_every: int,
) -> str:
    """Train a teacher by reinforcement learning; a second call returns the finished run.

    Args:
        student: Settings of the distillation that follows; the run is in its directory.
        data: Class of the data set builder.
        steps: Number of steps.
        max_tokens: Maximum tokens per reply.
        eval_every: Steps between evaluations.

    Returns:
        Sampler weights (tinker://...) of the teacher.
    """
    model, renderer = str(student.model_name), str(student.renderer_name)
    builder = recipe.fill(
        data,
        student,
        groups_per_batch=GROUPS_PER_BATCH,
        group_size=GROUP_SIZE,
        test_group_size=TEST_GROUP_SIZE,
    )
    print("teacher  trained by rewards first (teacher=tinker://... takes another one)")
    result = asyncio.run(
        rl_train.main(
            rl_train.Config(
                log_path=str(_folder(student, builder.name)),
                model_name=model,
                renderer_name=renderer,
                base_url=student.base_url,
                recipe_name="distillation_teacher",
                dataset_builder=builder,
                learning_rate=LEARNING_RATE,
                lora_rank=LORA_RANK,
                max_tokens=max_tokens,
                max_steps=steps,
                eval_every=eval_every,
                save_every=student.save_every,
                remove_constant_reward_groups=True,
                seed=student.seed,
                behavior_if_log_dir_exists=student.behavior_if_log_dir_exists,
            )
        )
    )
    return result.best_sampler_path


def train_by_examples(
    student: SharedOptions, name: str, examples: Sequence[list[Message]], *, steps: int
) -> str:
    """Train a teacher on solved examples; a second call returns the finished run.

    Args:
        student: Settings of the distillation that follows; the run is in its directory.
        name: Names the folder of the run.
        examples: Conversations; the last message of each is trained.
        steps: Number of steps.

    Returns:
        Sampler weights (tinker://...) of the teacher.
    """
    model, renderer = str(student.model_name), str(student.renderer_name)
    folder = _folder(student, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".jsonl")
    file.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in examples),
        encoding="utf-8",
    )
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model,
        renderer_name=renderer,
        max_length=MAX_LENGTH,
        batch_size=BATCH_SIZE,
    )
    print(f"teacher  {name}: trained on {len(examples)} solved examples first")
    result = asyncio.run(
        sl_train.main(
            sl_train.Config(
                log_path=str(folder),
                model_name=model,
                renderer_name=renderer,
                base_url=student.base_url,
                recipe_name="distillation_teacher",
                dataset_builder=FromConversationFileBuilder(
                    common_config=common, file_path=str(file)
                ),
                learning_rate=LEARNING_RATE,
                lora_rank=LORA_RANK,
                num_epochs=-(-steps * BATCH_SIZE // len(examples)),
                max_steps=steps,
                seed=student.seed,
                behavior_if_log_dir_exists=student.behavior_if_log_dir_exists,
            )
        )
    )
    return result.sampler_path


def _folder(student: SharedOptions, name: str) -> Path:
    return Path(str(student.log_path)) / "teachers" / name
