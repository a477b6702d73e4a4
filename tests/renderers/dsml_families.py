"""DeepSeek V4, whose calls are written with the token `｜DSML｜`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.renderers.battery.subject import Case

from .family import Family

_CALL = (
    'Hi 日\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" '
    'string="true">日</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    "<｜end▁of▁sentence｜>"
)


@dataclass(frozen=True)
class DeepSeekV4Family(Family):
    """Its template takes everything but a late system message, which it moves to the front."""

    has_tools: bool = True
    accepts_thinking: bool = True
    keeps_newlines: bool = True
    prompt_tail: str | None = None
    reply: str = _CALL

    def expresses(self, case: Case) -> bool:
        roles = itertools.pairwise(message["role"] for message in case.messages)
        return not any(after == "system" != before for before, after in roles)


def _thinks(name: str, **options: Any) -> DeepSeekV4Family:
    return DeepSeekV4Family(
        name,
        name,
        "deepseek_v4",
        {"thinking": True, **options},
        has_thinking=True,
        reply="well 日本</think>" + _CALL,
    )


DSML_FAMILIES = (
    DeepSeekV4Family("deepseekv4", "deepseekv4", "deepseek_v4"),
    _thinks("deepseekv4_thinking"),
)
DSML_VARIANTS = (
    DeepSeekV4Family("deepseekv4_disable_thinking", "deepseekv4_disable_thinking", "deepseek_v4"),
    _thinks("deepseekv4_high_reasoning", reasoning_effort="high"),
    _thinks("deepseekv4_max_reasoning", reasoning_effort="max"),
    _thinks("deepseekv4_preserve_thinking", drop_thinking=False),
)
