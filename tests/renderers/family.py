"""One format under test: a renderer, a real tokenizer, and the template to equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.assets import load_tokenizer
from tinker_cookbook.renderers import Renderer, get_renderer
from tinker_cookbook.renderers.battery.subject import TemplateReference


@dataclass(frozen=True)
class Family(TemplateReference):
    """One renderer with the template it must equal."""

    name: str
    renderer_name: str
    tokenizer_name: str
    template_options: dict[str, Any] = field(default_factory=dict)
    has_tools: bool = False
    has_thinking: bool = False
    """Whether a trained reply may have thinking."""
    accepts_thinking: bool = False
    """Whether replies in history may have thinking."""
    text_arguments: bool = False
    """Whether the template writes arguments given as JSON text unchanged."""
    trims: bool = False
    keeps_newlines: bool = False
    """Whether newlines around reasoning and the text after it are kept."""
    prompt_tail: str | None = "\n"
    """Text at the end of a prompt, which a template may merge with the reply; None if there is
    none."""
    lone_calls: bool = False
    """Whether a reply with a call has exactly one call and no text."""
    trims_end: bool = False
    """Whether replies lose white space at their end, and reasoning of white space only."""
    header_words: str = ""
    """Text between control tokens of a reply that is not part of the message."""
    strips: bool = False
    """Whether replies and reasoning lose white space around them."""
    reply: str = ""
    """A reply that uses all features of the format, as markup; empty for a default by the flags
    above."""

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_name)

    @property
    def renderer(self) -> Renderer:
        return _renderer(self.renderer_name, self.tokenizer_name)


@cache
def _renderer(renderer_name: str, tokenizer_name: str) -> Renderer:
    return get_renderer(renderer_name, load_tokenizer(tokenizer_name))
