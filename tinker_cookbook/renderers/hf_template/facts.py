"""What is known about a chat template; learning.py finds it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tinker_cookbook.renderers.hf_template.template_plan import ControlTokens
from tinker_cookbook.renderers.parsing import Grammar

__all__ = ["TemplateFacts"]


@dataclass
class TemplateFacts:
    """Facts about one template."""

    roles: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")
    content_is_list: bool = False
    """Whether the template wants content as a list of parts, not as a string."""
    arguments: Literal["none", "text", "object"] = "none"
    """How the template takes the arguments of calls; "none" if it writes no calls."""
    has_tools: bool = False
    has_thinking: bool = False
    parses_calls: bool = False
    xml_words: Mapping[str, str] | None = None
    """How truth values and null are written, if calls are written as in notations/xml.py."""
    stops: frozenset[int] = frozenset()
    bos_ids: tuple[int, ...] = ()
    extends: bool = False
    grammar: Grammar = field(default_factory=lambda: Grammar(stop=frozenset()))
    is_harmony: bool = False
    """Whether replies are several messages with headers, as in gpt-oss."""
    thought_label: str = ""
    """Text that the template writes between the opening marker of reasoning and the reasoning."""
    may_open_thinking: bool = False
    """Whether some prompts open the reasoning and others do not."""
    call_markers: ControlTokens = field(default_factory=lambda: ControlTokens({}))
    """Tokens around a call."""
