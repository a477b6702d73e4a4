"""The subject of the checks: a renderer, a tokenizer, and that tokenizer's template as
reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.types import Message, ToolCall, ToolSpec
from tinker_cookbook.replies.json_source import JsonObject, JsonSchema
from tinker_cookbook.tokenizer_utils import Tokenizer

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["Case", "Subject", "TemplateReference"]


@dataclass(frozen=True)
class Case:
    """A conversation with its tools, and its category."""

    category: str
    messages: list[Message]
    tools: tuple[ToolSpec, ...] = ()


class Subject(Protocol):
    """One renderer with the template it must equal, and what that template can express."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def renderer(self) -> Renderer: ...
    @property
    def template_options(self) -> JsonSchema: ...
    @property
    def has_tools(self) -> bool: ...
    @property
    def has_thinking(self) -> bool:
        """Whether a trained reply may have thinking."""
        ...

    @property
    def accepts_thinking(self) -> bool:
        """Whether replies in history may have thinking."""
        ...

    @property
    def text_arguments(self) -> bool:
        """Whether the template writes arguments given as JSON text unchanged."""
        ...

    @property
    def trims(self) -> bool: ...
    @property
    def keeps_newlines(self) -> bool:
        """Whether newlines around reasoning and the text after it are kept."""
        ...

    @property
    def strips(self) -> bool:
        """Whether replies and reasoning lose white space around them."""
        ...

    @property
    def lone_calls(self) -> bool:
        """Whether a reply with a call has exactly one call and no text."""
        ...

    @property
    def trims_end(self) -> bool:
        """Whether replies lose white space at their end, and reasoning of white space only."""
        ...

    @property
    def prompt_tail(self) -> str | None:
        """Text at the end of a prompt, which a template may merge with the reply."""
        ...

    def expresses(self, case: Case) -> bool:
        """Whether the template writes this conversation at all."""
        ...

    def may_refuse(self, messages: Sequence[Message]) -> bool:
        """Whether a reply may be refused for training."""
        ...

    def adjusted(self, expected: list[int], case: Case, *, prompt: bool) -> list[int]:
        """Return the template's tokens, changed by the documented differences of the format."""
        ...

    def reference(
        self, messages: Sequence[Message], *, prompt: bool, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """Return the tokens of the model's own template."""
        ...

    def to_template(self, message: Message) -> JsonObject:
        """Return a message in the form that templates take."""
        ...


class TemplateReference:
    """The template's side of a `Subject`; it shares no code with the renderers."""

    if TYPE_CHECKING:
        accepts_thinking: bool
        text_arguments: bool
        trims: bool
        template_options: JsonObject

        @property
        def tokenizer(self) -> Tokenizer: ...
        @property
        def renderer(self) -> Renderer: ...

    keeps_newlines: bool = False
    strips: bool = False
    lone_calls: bool = False
    trims_end: bool = False
    prompt_tail: str | None = "\n"

    def expresses(self, case: Case) -> bool:
        """Whether the template writes this conversation at all."""
        first = case.messages[0]
        if self.accepts_thinking and not any(m["role"] == "user" for m in case.messages):
            return False  # see the differences in qwen3.py
        # With tools, renderers treat an empty system message as none.
        return not (case.tools and first["role"] == "system" and not first["content"])

    def may_refuse(self, messages: Sequence[Message]) -> bool:
        """Whether a reply cannot be trained: it has reasoning in a format that disables it."""
        replies = [message for message in messages if message["role"] == "assistant"]
        return self.renderer.disables_thinking and any(split_reasoning(m)[0] for m in replies)

    def adjusted(self, expected: list[int], case: Case, *, prompt: bool) -> list[int]:
        """Return the template's tokens, changed by the documented differences of the format."""
        del case, prompt
        return expected

    def reference(
        self, messages: Sequence[Message], *, prompt: bool, tools: Sequence[ToolSpec] = ()
    ) -> list[int]:
        """Return the tokens of the model's own template."""
        converted = [self.to_template(message) for message in messages]
        tokenizer: Any = self.tokenizer  # its stubs do not know what templates take
        return tokenizer.apply_chat_template(
            converted,
            tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=False,
            **self.template_options,
        )

    def to_template(self, message: Message) -> JsonObject:
        """Return a message in the form that templates take; independent of the code under test."""
        result: JsonObject = {"role": message["role"]}
        content = message["content"]
        if isinstance(content, str):
            result["content"] = content
        else:
            result["content"] = "".join(p["text"] for p in content if p["type"] == "text")
            thinking = "".join(p["thinking"] for p in content if p["type"] == "thinking")
            if thinking:
                result["reasoning_content"] = thinking
        calls = message.get("tool_calls")
        if calls:
            result["tool_calls"] = [self._call(call.function) for call in calls]
        return result

    def _call(self, body: ToolCall.FunctionBody) -> JsonObject:
        arguments = body.arguments if self.text_arguments else json.loads(body.arguments)
        return {"type": "function", "function": {"name": body.name, "arguments": arguments}}
