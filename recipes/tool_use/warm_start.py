"""Supervised steps on solved questions, for models that never call a tool without them.

Reinforcement learning can only strengthen behavior that is sampled now and then. A small model
does not call a tool until it has seen tool calls.
"""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

from .corpus import Person
from .envs import SYSTEM, ToolUseDatasetBuilder, make_question, solved_example

BATCH_SIZE = 8
LEARNING_RATE = 5e-4


def train_on_examples(config: rl_train.Config, num_examples: int, people: list[Person]) -> str:
    """Train on generated conversations; a second call returns the finished run.

    Args:
        config: Settings of the RL run that follows; model, adapter and chat format are the same.
        num_examples: Number of conversations; each is trained once.
        people: People of the training questions.

    Returns:
        Path (tinker://...) of the trained weights.
    """
    folder = Path(config.log_path) / "warm_start"
    folder.mkdir(parents=True, exist_ok=True)
    data = config.dataset_builder
    assert isinstance(data, ToolUseDatasetBuilder)
    file = folder / "conversations.jsonl"
    rows = [json.dumps(row) for row in conversations(data, num_examples, people)]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=data.model_name,
        renderer_name=data.renderer_name,
        max_length=None,  # solved questions are short
        batch_size=BATCH_SIZE,
    )
    print("supervised steps on solved questions first (warm_start_examples=0 leaves them out)")
    result = asyncio.run(
        train.main(
            train.Config(
                log_path=str(folder / "run"),
                model_name=config.model_name,
                renderer_name=data.renderer_name,
                base_url=config.base_url,
                recipe_name="tool_use_warm_start",
                dataset_builder=FromConversationFileBuilder(
                    common_config=common, file_path=str(file)
                ),
                learning_rate=LEARNING_RATE,
                lora_rank=config.lora_rank,
                seed=config.seed,
                behavior_if_log_dir_exists=config.behavior_if_log_dir_exists,
            )
        )
    )
    return result.state_path


def conversations(
    data: ToolUseDatasetBuilder, num_examples: int, people: list[Person]
) -> list[dict[str, Any]]:
    """Return the rows of a file of conversations."""
    rng = random.Random(f"{data.seed}/warm start")
    tools = [tool.to_spec() for tool in data.tools()]
    rows = []
    for _ in range(num_examples):
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        for message in solved_example(make_question(data.tasks, rng, people)):
            row: dict[str, Any] = dict(message)
            if "tool_calls" in message:
                row["tool_calls"] = [call.model_dump() for call in message["tool_calls"]]
            messages.append(row)
        rows.append({"messages": messages, "tools": tools})
    return rows
