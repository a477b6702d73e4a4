"""Parts of benchmarks: prompts, names of examples, and answers in replies."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinker_cookbook.eval.benchmarks._code import SandboxMixin, get_sandbox_factory
from tinker_cookbook.eval.graders.choices import extract_mcq_answer, format_mcq_choices
from tinker_cookbook.eval.graders.code import extract_python_code
from tinker_cookbook.eval.graders.math_answers import extract_boxed
from tinker_cookbook.eval.graders.numbers import (
    check_gsm8k,
    extract_gsm8k_answer,
    extract_number,
)
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message

if TYPE_CHECKING:
    from datasets import Dataset

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "SandboxMixin",
    "build_messages",
    "check_gsm8k",
    "decode_response",
    "extract_boxed",
    "extract_command",
    "extract_gsm8k_answer",
    "extract_mcq_answer",
    "extract_number",
    "extract_python_code",
    "format_mcq_choices",
    "get_sandbox_factory",
    "is_task_complete",
    "limit_dataset",
    "load_benchmark_dataset",
    "make_example_id",
    "parse_kwargs",
]

COMMAND_BLOCK = re.compile(r"```(?:bash|sh|shell)[ \t]*\n(.*?)```", re.DOTALL)
TASK_COMPLETE = re.compile(r"^\W*TASK[_ ]COMPLETE\W*$", re.MULTILINE)


def build_messages(user_content: str, system_prompt: str | None = None) -> list[Message]:
    """Return a conversation of a user message, after a system prompt if there is one."""
    user: Message = {"role": "user", "content": user_content}
    return [{"role": "system", "content": system_prompt}, user] if system_prompt else [user]


def make_example_id(prefix: str, seed_text: str) -> str:
    """Return a name for an example that depends only on its text."""
    return f"{prefix}-{hashlib.sha256(seed_text.encode()).hexdigest()[:12]}"


def decode_response(action: Sequence[int], renderer: Renderer) -> str:
    """Return the text of a sampled reply, without thinking and end markers."""
    message, _ = renderer.parse_response(action)
    return get_text_content(message)


def limit_dataset(
    ds: Dataset, max_examples: int | None, shuffle_seed: int | None = None
) -> Dataset:
    """Return the first rows of a data set, in a random order if there is a seed."""
    order = list(range(len(ds)))
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    elif max_examples is None or max_examples >= len(ds):
        return ds
    return ds.select(order[:max_examples])


def load_benchmark_dataset(
    path: str,
    name: str | None = None,
    split: str = "test",
    trust_remote_code: bool | None = None,
) -> Dataset:
    """Load a split of a data set from the Hugging Face hub, its cache, or a folder.

    Args:
        path: Name or folder of the data set.
        name: Configuration of the data set.
        split: The split.
        trust_remote_code: Accepted for older programs; no code of a data set is run.

    Raises:
        ConfigurationError: if the data set cannot be loaded.
    """
    del trust_remote_code
    from tinker_cookbook.hub_datasets import load_hub_table

    advice = "Give the folder of a copy, or the name of a data set on the hub."
    return load_hub_table(path, name, split, advice=advice)


def extract_command(text: str) -> str | None:
    """Return the last shell command of a reply, from a block of bash or sh; None without one."""
    blocks = [block.strip() for block in COMMAND_BLOCK.findall(text)]
    return next((block for block in reversed(blocks) if block), None)


def is_task_complete(text: str) -> bool:
    """Return whether a line of a reply says only TASK_COMPLETE."""
    return TASK_COMPLETE.search(text) is not None


def parse_kwargs(
    raw_kwargs: Sequence[Any], instruction_ids: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return the settings of instructions as objects without empty values.

    Args:
        raw_kwargs: Objects, JSON texts of objects, or None, one per instruction.
        instruction_ids: The instructions; settings that are missing at the end are empty.
    """
    parsed = [json.loads(each) if isinstance(each, str) else each for each in raw_kwargs]
    found = [
        {key: value for key, value in each.items() if value is not None}
        if isinstance(each, Mapping)
        else {}
        for each in parsed
    ]
    return found + [{}] * (len(instruction_ids or ()) - len(found))
