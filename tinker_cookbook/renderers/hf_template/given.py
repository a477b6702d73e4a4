"""The input of a chat template: messages in its form, once as typed and once with marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.hf_template.facts import TemplateFacts
from tinker_cookbook.renderers.hf_template.template_plan import ControlTokens
from tinker_cookbook.renderers.hf_template.text import Conversation, Masker
from tinker_cookbook.renderers.layout import SegmentKind
from tinker_cookbook.renderers.tool_calls import openai_call, tool_declaration
from tinker_cookbook.renderers.types import CallLike, Message
from tinker_cookbook.replies.json_source import JsonObject

__all__ = ["Giver"]


class Giver:
    """Builds the input of one template from messages; it uses the facts found so far."""

    def __init__(self, control: ControlTokens, facts: TemplateFacts) -> None:
        self.control = control
        self.facts = facts

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        masker = Masker(self.control.pattern)
        declared = messages[0].get("tools") if messages else None
        tools: list[JsonObject] = [dict(tool_declaration(tool)) for tool in declared or ()]
        if tools and not self.facts.has_tools:
            raise RendererError("messages[0]: this chat template writes no tool declarations.")
        masked_tools = [masker.data(tool, -1, keep_names=True) for tool in tools]
        offset = int(bool(tools) and not split_reasoning(messages[0])[1].strip())
        plain, masked = [], []
        for index in range(offset, len(messages)):
            given = self._as_given(messages[index], index)
            plain.append(given)
            masked.append(self._masked(given, messages[index], index, masker))
        plain = [self._with_unparsed(g, messages[i + offset]) for i, g in enumerate(plain)]
        return Conversation(
            plain, masked, tools or None, masked_tools or None, masker.values, offset
        )

    def _as_given(self, message: Message, index: int) -> JsonObject:
        """Return the message in the form that the template takes."""
        if message.get("tools") and index:
            raise RendererError(f"messages[{index}]: tools are declared by a first system message.")
        reasoning, text = split_reasoning(message)
        given: JsonObject = {"role": message["role"], "content": self._content(text)}
        if reasoning:
            given["reasoning_content"] = reasoning
        calls = message.get("tool_calls")
        if calls:
            given["tool_calls"] = [self._call(call) for call in calls]
        for key in ("name", "tool_call_id"):
            if message.get(key):
                given[key] = message.get(key)
        return given

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self.facts.content_is_list else text

    def _call(self, call: CallLike) -> JsonObject:
        if self.facts.arguments == "none":
            raise RendererError("this chat template writes no tool_calls.")
        return dict(openai_call(call, as_text=self.facts.arguments == "text"))

    def _masked(
        self, given: JsonObject, message: Message, index: int, masker: Masker
    ) -> JsonObject:
        masked = dict(given)
        if "reasoning_content" in given:
            reasoning = given["reasoning_content"]
            masked["reasoning_content"] = masker.text(reasoning, index, SegmentKind.THINK)
        text = masker.text(split_reasoning(message)[1], index, SegmentKind.CONTENT)
        for call in message.get("unparsed_tool_calls") or ():
            joint = "\n" if text else ""
            text += joint + masker.text(call.raw_text, index, SegmentKind.TOOL, is_markup=True)
        masked["content"] = self._content(text)
        if "tool_calls" in given:
            masked["tool_calls"] = [
                self._masked_call(c, index, masker) for c in given["tool_calls"]
            ]
        for key in ("name", "tool_call_id"):
            if key in given:
                masked[key] = _optional(masker, given[key], index)
        return masked

    def _masked_call(self, call: JsonObject, index: int, masker: Masker) -> JsonObject:
        body = call["function"]
        masked = {
            "name": masker.name(body["name"], index),
            "arguments": masker.data(body["arguments"], index, keep_names=False),
        }
        result = {**call, "function": masked}
        if "id" in call:
            result["id"] = _optional(masker, call["id"], index)
        return result

    def _with_unparsed(self, given: JsonObject, message: Message) -> JsonObject:
        """Return the message with the calls that could not be parsed, as text."""
        unparsed = message.get("unparsed_tool_calls")
        if not unparsed:
            return given
        text = split_reasoning(message)[1]
        for call in unparsed:
            text += ("\n" if text else "") + call.raw_text
        return {**given, "content": self._content(text)}


def _optional(masker: Masker, text: str, index: int) -> str:
    """Mask a name or id. Plain words are not masked, and templates may omit it."""
    if masker.name(text, index) == text:
        return text
    masker.values.pop()
    return masker.text(text, index, SegmentKind.FRAME)
