"""Parts of benchmarks: prompts, names of examples, and answers in replies."""

from __future__ import annotations

import hashlib

from tinker_cookbook.eval.graders.choices import extract_mcq_answer, format_mcq_choices
from tinker_cookbook.eval.graders.code import extract_python_code
from tinker_cookbook.eval.graders.math_answers import extract_boxed
from tinker_cookbook.eval.graders.numbers import (
    check_gsm8k,
    extract_gsm8k_answer,
    extract_number,
)
from tinker_cookbook.renderers.types import Message

__all__ = [
    "build_messages",
    "check_gsm8k",
    "extract_boxed",
    "extract_gsm8k_answer",
    "extract_mcq_answer",
    "extract_number",
    "extract_python_code",
    "format_mcq_choices",
    "make_example_id",
]


def build_messages(user_content: str, system_prompt: str | None = None) -> list[Message]:
    """Return a conversation of a user message, after a system prompt if there is one."""
    user: Message = {"role": "user", "content": user_content}
    return [{"role": "system", "content": system_prompt}, user] if system_prompt else [user]


def make_example_id(prefix: str, seed_text: str) -> str:
    """Return a name for an example that depends only on its text."""
    return f"{prefix}-{hashlib.sha256(seed_text.encode()).hexdigest()[:12]}"
