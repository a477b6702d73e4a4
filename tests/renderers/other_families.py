"""Mistral and SmolLM3."""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from tinker_cookbook.renderers.battery.subject import Case
from tinker_cookbook.renderers.content import split_reasoning

from .family import Family
from .xml_families import EMPTY_SYSTEM

__all__ = ["OTHER_FAMILIES"]


def _roles(case: Case) -> list[str]:
    return [message["role"] for message in case.messages]


@dataclass(frozen=True)
class SmolLM3Family(Family):
    """The template takes reasoning as text only, and looks for modes in the system message."""

    accepts_thinking: bool = True

    def expresses(self, case: Case) -> bool:
        """A system message at the start only; no reasoning where it is disabled."""
        thinks = any(split_reasoning(message)[0] for message in case.messages)
        return (
            "system" not in _roles(case)[1:]
            and "think" not in split_reasoning(case.messages[0])[1]
            and not (thinks and self.renderer.disables_thinking)
        )

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        """Return what the template gives if reasoning is typed."""
        typed = [{**m, "content": _with_typed_reasoning(m)} for m in messages]
        return super().reference(typed, prompt=prompt, tools=tools)


def _with_typed_reasoning(message: Any) -> str:
    reasoning, text = split_reasoning(message)
    reasoning = reasoning.strip("\n")
    return f"<think>\n{reasoning}\n</think>\n" + text.lstrip("\n") if reasoning else text


@dataclass(frozen=True)
class MistralFamily(Family):
    """Calls get the ids that mistral.py gives them; Nemo's system message stays for the reply."""

    prompt_tail: str | None = None

    def expresses(self, case: Case) -> bool:
        """What the template does not raise on, nor drop, nor write without escapes."""
        replies = [m for m in case.messages if m["role"] == "assistant"]
        if any(m.get("tool_calls") and split_reasoning(m)[1] for m in replies):
            return False
        if "system" in _roles(case)[1:] or (case.tools and case.messages[0] == EMPTY_SYSTEM):
            return False
        users = [m["content"] for m in case.messages if m["role"] == "user"]
        if case.tools and (not users or users[-1] in users[:-1]):
            return False  # declared again before each message that reads like the last
        names = [c.function.name for m in replies for c in m.get("tool_calls", [])]
        try:
            self.reference(case.messages, prompt=True, tools=case.tools)
        except TemplateError:
            return False
        return all(name.isascii() for name in names)

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        """Return what the template gives with an id on each call and result."""
        number, waiting, numbered = 0, [], []
        for message in messages:
            copy = dict(message)
            if message.get("tool_calls"):
                copy["tool_calls"] = []
                for call in message["tool_calls"]:
                    number += 1
                    copy["tool_calls"].append(call.model_copy(update={"id": f"{number:09d}"}))
                waiting += [call.id for call in copy["tool_calls"]]
            if message["role"] == "tool":
                copy["tool_call_id"] = waiting.pop(0)
            numbered.append(copy)
        return super().reference(numbered, prompt=prompt, tools=tools)

    def to_template(self, message: Any) -> dict[str, Any]:
        """Return a message with its ids."""
        result = super().to_template(message)
        for call, written in zip(
            message.get("tool_calls", []), result.get("tool_calls", []), strict=True
        ):
            written["id"] = call.id
        if "tool_call_id" in message:
            result["tool_call_id"] = message["tool_call_id"]
        return result

    def adjusted(self, expected: list[int], case: Case, *, prompt: bool) -> list[int]:
        """Put Nemo's system message where the prompt of the last reply has it."""
        messages = case.messages
        asked, reply = messages[:-1], messages[-1]
        if self.name != "mistral_nemo" or reply["role"] != "assistant":
            return expected
        if messages[0]["role"] != "system" or asked[-1]["role"] != "user":
            return expected
        before = self.reference(asked, prompt=True, tools=case.tools)
        return before + expected[len(self.reference(asked[1:], prompt=True, tools=case.tools)) :]


_REPLY = "<think>\n日\n</think>\nHi 👩‍👧<|im_end|>"
_OFF: dict[str, Any] = {"enable_thinking": False}

OTHER_FAMILIES: Sequence[Family] = (
    MistralFamily(
        "mistral_nemo",
        "mistral_nemo",
        "mistral_nemo",
        has_tools=True,
        reply='[TOOL_CALLS][{"name": "f", "arguments": {"a": "日"}, "id": "abc123DEF"}]</s>',
    ),
    MistralFamily(
        "mistral_small",
        "mistral_small",
        "mistral_small",
        has_tools=True,
        reply='[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{"a": "日"}[TOOL_CALLS]g[ARGS]{}</s>',
    ),
    SmolLM3Family("smollm3", "smollm3", "smollm3", has_thinking=True, reply=_REPLY),
    SmolLM3Family(
        "smollm3_disable_thinking", "smollm3_disable_thinking", "smollm3", _OFF, reply=_REPLY
    ),
)
