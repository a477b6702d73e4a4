"""DeepSeek, Kimi, gpt-oss and Nemotron: formats whose control tokens are their own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.assets_readback import stored_template
from tinker_cookbook.renderers.battery.subject import Case
from tinker_cookbook.renderers.content import split_reasoning

from .family import Family
from .xml_families import arguments_are_plain

_ALL: dict[str, Any] = {"has_tools": True, "accepts_thinking": True, "prompt_tail": None}
_THINKS: dict[str, Any] = {**_ALL, "has_thinking": True}


@dataclass(frozen=True)
class SampledFamily(Family):
    """A template that drops even the last reply's reasoning.

    The last reply is then compared with the template's prompt, and after it the reply's text as the
    model writes it, encoded by itself.
    """

    def think_text(self, reasoning: str) -> str:
        """Return the reasoning as the model writes it after the prompt."""
        raise NotImplementedError

    def is_sampled(self, messages: Sequence[Any]) -> bool:
        """Whether the last message is a reply as it is sampled."""
        return self.has_thinking and bool(messages) and messages[-1]["role"] == "assistant"

    def reply_text(self, message: Any) -> str:
        """Return the template's text of a reply without its prompt."""
        raise NotImplementedError

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        if prompt or not self.is_sampled(messages):
            return super().reference(messages, prompt=prompt, tools=tools)
        before = super().reference(messages[:-1], prompt=True, tools=tools)
        reasoning, _ = split_reasoning(messages[-1])
        reply = self.think_text(reasoning) + self.reply_text(messages[-1])
        return before + self.tokenizer.encode(reply, add_special_tokens=False)


# ---- DeepSeek ----

_DEEPSEEK_WORDS = """## Tools
You have access to the following tools:
{declared}
IMPORTANT: ALWAYS adhere to this exact format for tool use:
{call}

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces
"""
_BARE = "tool_call_name<｜tool▁sep｜>tool_call_arguments"
_FENCED = "function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```"


@dataclass(frozen=True)
class DeepSeekFamily(SampledFamily):
    """Its templates do not declare tools, so the system message contains the declarations."""

    is_v3_1: bool = True
    opens: bool = False
    """The prompt opens the think block."""

    def expresses(self, case: Case) -> bool:
        roles = [message["role"] for message in case.messages]
        pairs = list(itertools.pairwise(roles))
        if any(after == "system" and before != "system" for before, after in pairs):
            return False
        if self.opens and (roles[-1] == "tool" or ("tool", "assistant") in pairs):
            return False
        num_calling = sum(bool(message.get("tool_calls")) for message in case.messages)
        if not self.is_v3_1 and (num_calling > 1 or ("tool", "user") in pairs):
            return False
        return super().expresses(case)

    def may_refuse(self, messages: Sequence[Any]) -> bool:
        pairs = itertools.pairwise([None, *(message["role"] for message in messages)])
        before = {before for before, role in pairs if role == "assistant"}
        if self.opens and before - ({"user"} if self.is_v3_1 else {None, "user", "assistant"}):
            return True
        return super().may_refuse(messages)

    def think_text(self, reasoning: str) -> str:
        if self.is_v3_1:
            return f"{reasoning}</think>"
        opening = "" if self.opens else "<think>\n"
        return opening + reasoning.strip("\n") + "\n</think>\n\n"

    def is_sampled(self, messages: Sequence[Any]) -> bool:
        before = messages[-2]["role"] if len(messages) > 1 else None
        if self.opens and before != "user" and (self.is_v3_1 or before == "tool"):
            return False
        return super().is_sampled(messages)

    def reply_text(self, message: Any) -> str:
        message = self.to_template(message)
        if not self.is_v3_1:
            message["content"] = message["content"].lstrip("\n")
        text = self.tokenizer.apply_chat_template([message], tokenize=False)
        return text.removeprefix("<｜begin▁of▁sentence｜>").removeprefix("<｜Assistant｜>")

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        if tools:
            has_system = bool(messages) and messages[0]["role"] == "system"
            text = messages[0]["content"] if has_system else ""
            text += ("\n\n" if text else "") + self._declared(tools)
            messages = [{"role": "system", "content": text}, *messages[has_system:]]
        return super().reference(messages, prompt=prompt)

    def _declared(self, tools: Sequence[Any]) -> str:
        declared = "".join(
            f"\n### {tool['name']}\nDescription: {tool['description']}\n\n"
            f"Parameters: {json.dumps(tool['parameters'], ensure_ascii=False)}\n"
            for tool in tools
        )
        call = (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
            + (_BARE if self.is_v3_1 else _FENCED)
            + "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
        )
        return _DEEPSEEK_WORDS.replace("{declared}", declared).replace("{call}", call)


_BARE_CALL = (
    'Hi 日<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "日"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
_FENCED_CALL = (
    'Hi 日<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "日"}'
    "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
_DEEPSEEK: dict[str, Any] = {"text_arguments": True}
_V3 = {**_DEEPSEEK, "is_v3_1": False}
# V3's template closes a reply at its second call, and knows calls by content that is none, which
# transformers drops. Here every reply with calls is closed and its text is written, as R1's is.
_V3_CALLS_END = "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}"
_V3_REPAIRS = (
    (_V3_CALLS_END + "{%- endif %}{%- endfor %}", "{%- endif %}{%- endfor %}" + _V3_CALLS_END),
    ("message['content'] is none", "message['tool_calls'] is defined"),
    ("message['content'] is not none", "message['tool_calls'] is not defined"),
    ("'<｜Assistant｜><｜tool", "'<｜Assistant｜>' + message['content'] + '<｜tool"),
)


def _v3_template() -> str:
    template = stored_template("deepseek_v3")
    for before, after in _V3_REPAIRS:
        assert template.count(before) == 1, before
        template = template.replace(before, after)
    return template


_DEEPSEEK_FAMILIES = (
    DeepSeekFamily(
        "deepseekv3",
        "deepseekv3",
        "deepseek_v3_1",
        **_ALL,
        **_DEEPSEEK,
        keeps_newlines=True,
        reply=_BARE_CALL,
    ),
    DeepSeekFamily(
        "deepseekv3_thinking",
        "deepseekv3_thinking",
        "deepseek_v3_1",
        {"thinking": True},
        **_THINKS,
        **_DEEPSEEK,
        keeps_newlines=True,
        opens=True,
        reply="well 日本</think>" + _BARE_CALL,
    ),
    DeepSeekFamily(
        "deepseekv3_chat",
        "deepseekv3_chat",
        "deepseek_v3",
        {"chat_template": _v3_template()},
        **_ALL,
        **_V3,
        keeps_newlines=True,
        reply=_FENCED_CALL,
    ),
    DeepSeekFamily(
        "deepseek_r1",
        "deepseek_r1",
        "deepseek_r1",
        **_THINKS,
        **_V3,
        opens=True,
        reply="well 日本\n</think>\n\n" + _FENCED_CALL,
    ),
    DeepSeekFamily(
        "deepseek_r1_0528",
        "deepseek_r1_0528",
        "deepseek_r1_0528",
        **_THINKS,
        **_V3,
        reply="<think>\nwell 日本\n</think>\n\n" + _FENCED_CALL,
    ),
)

# ---- gpt-oss ----

_DATE = "2025-08-05"
_TODAY = 'strftime_now("%Y-%m-%d")'


@dataclass(frozen=True)
class GptOssFamily(Family):
    """Reasoning has another key; a system message must come first, and a call has no text next to
    it."""

    has_system_block: bool = True

    def expresses(self, case: Case) -> bool:
        if any(message["role"] == "system" for message in case.messages[1:]):
            return False
        calling = [message for message in case.messages if message.get("tool_calls")]
        if any(len(m.get("tool_calls", ())) > 1 or split_reasoning(m)[1] for m in calling):
            return False
        return bool(case.messages)

    def to_template(self, message: Any) -> dict[str, Any]:
        result = super().to_template(message)
        if "reasoning_content" in result:
            result["thinking"] = result.pop("reasoning_content")
        return result

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        template = self.tokenizer.chat_template
        assert _TODAY in template
        tokens = self.tokenizer.apply_chat_template(
            [self.to_template(message) for message in messages],
            tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
            add_generation_prompt=prompt,
            return_dict=False,
            chat_template=template.replace(_TODAY, f'"{_DATE}"'),
            **self.template_options,
        )
        if self.has_system_block:
            return tokens
        return tokens[tokens.index(self.tokenizer.convert_tokens_to_ids("<|end|>")) + 1 :]


def _gpt_oss(name: str, effort: str, *, has_system_block: bool = True) -> GptOssFamily:
    return GptOssFamily(
        name,
        name,
        "gpt_oss",
        {"reasoning_effort": effort},
        **_THINKS,
        keeps_newlines=True,
        lone_calls=True,
        has_system_block=has_system_block,
        header_words="assistantto=functions.fcommentaryjsonanalysisfinal ",
        reply=(
            "<|channel|>analysis<|message|>well 日本<|end|><|start|>assistant to=functions.f"
            '<|channel|>commentary json<|message|>{"a": "日"}<|call|>'
        ),
    )


_GPT_OSS_FAMILIES = (
    _gpt_oss("gpt_oss_medium_reasoning", "medium"),
    _gpt_oss("gpt_oss_no_sysprompt", "medium", has_system_block=False),
)
_GPT_OSS_VARIANTS = (
    _gpt_oss("gpt_oss_low_reasoning", "low"),
    _gpt_oss("gpt_oss_high_reasoning", "high"),
)

# ---- Kimi ----

_KIMI_TOOLS = """# Tools

## functions
namespace functions {
// Weather in a city — °C, “today” 天気.
type get_weather = (_: {
  // Name, e.g. "Zürich"
  city: string,
  // minimum: 1
  days?: number
}) => any;
type search = (_: {
  q?: string
}) => any;
}
"""


@dataclass(frozen=True)
class KimiFamily(Family):
    """Calls and results need ids; the template drops the last reply's reasoning."""

    def expresses(self, case: Case) -> bool:
        first = case.messages[0]
        return not (case.tools and first["role"] == "system" and not first["content"])

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        template = self.tokenizer.chat_template
        tokens = self.tokenizer.apply_chat_template(
            self._numbered(messages),
            tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
            add_generation_prompt=prompt,
            return_dict=False,
            chat_template=template.replace("tool_call_id }}\\n", "tool_call_id }}\n"),
            **self.template_options,
        )
        last = messages[-1]
        if prompt or last["role"] != "assistant" or not self.has_thinking:
            return tokens
        think, think_end = self.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        place = len(tokens) - tokens[::-1].index(think)
        reasoning = self.tokenizer.encode(split_reasoning(last)[0], add_special_tokens=False)
        return tokens[:place] + reasoning + tokens[tokens.index(think_end, place) :]

    def _numbered(self, messages: Sequence[Any]) -> list[dict[str, Any]]:
        number, waiting, converted = 0, [], []
        for message in messages:
            result = self.to_template(message)
            if message["role"] == "assistant":
                waiting = []
                number = number if self.has_ids else 0
            for call in result.get("tool_calls", []):
                call["id"] = f"functions.{call['function']['name']}:{number}"
                waiting.append(call["id"])
                number += 1
            if message["role"] == "tool":
                last = f"functions.unknown:{max(0, number - 1)}"
                result["tool_call_id"] = waiting.pop(0) if waiting else last
            converted.append(result)
        return converted

    has_ids: bool = True
    """The template writes the ids it is given; else it numbers the calls of a reply from 0."""


_KIMI_CALL = (
    "Hi 👩‍👧<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    '<|tool_call_argument_begin|>{"a": "日"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
_KIMI: dict[str, Any] = {"prompt_tail": None, "has_tools": True, "keeps_newlines": True}
_KIMI_THINKS: dict[str, Any] = {
    **_KIMI,
    "has_thinking": True,
    "accepts_thinking": True,
    "text_arguments": True,
}
_K25 = {"tools_ts_str": _KIMI_TOOLS}
_K25_OFF = {**_K25, "thinking": False}
_KIMI_OFF: dict[str, Any] = {**_KIMI, "text_arguments": True, "reply": _KIMI_CALL}
_KIMI_REPLY: dict[str, Any] = {"reply": "well 日本</think>" + _KIMI_CALL}
_KIMI_FAMILIES = (
    KimiFamily(
        "kimi_k2_instruct", "kimi_k2_instruct", "kimi_k2", **_KIMI, reply=_KIMI_CALL, has_ids=False
    ),
    KimiFamily(
        "kimi_k2",
        "kimi_k2",
        "kimi_k2_thinking",
        **_KIMI_THINKS,
        reply="<think>well 日本</think>" + _KIMI_CALL,
    ),
    KimiFamily("kimi_k25", "kimi_k25", "kimi_k2_5", _K25, **_KIMI_THINKS, **_KIMI_REPLY),
    KimiFamily(
        "kimi_k25_disable_thinking", "kimi_k25_disable_thinking", "kimi_k2_5", _K25_OFF, **_KIMI_OFF
    ),
    KimiFamily(
        "kimi_k26_preserve_thinking",
        "kimi_k26_preserve_thinking",
        "kimi_k2_6",
        _K25,
        **_KIMI_THINKS,
        **_KIMI_REPLY,
    ),
)
_KIMI_VARIANTS = (
    KimiFamily("kimi_k26", "kimi_k26", "kimi_k2_5", _K25, **_KIMI_THINKS, **_KIMI_REPLY),
    KimiFamily(
        "kimi_k26_disable_thinking", "kimi_k26_disable_thinking", "kimi_k2_5", _K25_OFF, **_KIMI_OFF
    ),
)

# ---- Nemotron ----


@dataclass(frozen=True)
class NemotronFamily(Family):
    """A last reply without reasoning has the block that the prompt opens, not the template's."""

    is_ultra: bool = False
    preserves: bool = False
    trims_end: bool = True
    keeps_newlines: bool = True

    def expresses(self, case: Case) -> bool:
        replies = [m for m in case.messages if m["role"] == "assistant"]
        last = case.messages[-1]
        if case.messages == replies[:1]:
            return False  # the prompt of a reply alone: transformers renders no empty conversation
        for message in replies:
            reasoning, text = split_reasoning(message)
            if self.preserves and not reasoning.strip():
                return False
            if reasoning[:1].isspace() and message is not last:
                return False  # merges with the line break that the prompt ends in
            if (
                self.renderer.disables_thinking
                and message.get("tool_calls")
                and text.strip() != text
            ):
                return False
        return arguments_are_plain(case)

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        tokens = super().reference(messages, prompt=prompt, tools=tools)
        if prompt or messages[-1]["role"] != "assistant" or not self.has_thinking:
            return tokens
        before = super().reference(messages[:-1], prompt=True, tools=tools)
        alone = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}, self.to_template(messages[-1])], tokenize=False
        )
        reasoning, text = split_reasoning(messages[-1])
        if reasoning.strip():
            reply = alone.partition("<|im_start|>assistant\n<think>\n")[2]
        else:
            ends = ("", "") if self.is_ultra else ("\n", "\n" if text.strip() else "")
            reply = "</think>".join(ends)
            reply += alone.partition("<|im_start|>assistant\n<think></think>")[2]
        return before + self.tokenizer.encode(reply, add_special_tokens=False)


_XML_CALL = (
    "Hi 👩‍👧\n<tool_call>\n<function=f>\n<parameter=a>\n日\n</parameter>\n</function>\n"
    "</tool_call>\n<|im_end|>"
)
_NEMOTRON: dict[str, Any] = {"has_tools": True, "reply": _XML_CALL}
_NEMOTRON_THINKS: dict[str, Any] = {
    "has_tools": True,
    "has_thinking": True,
    "accepts_thinking": True,
    "reply": "well 日本\n</think>\n" + _XML_CALL,
}
_ULTRA: dict[str, Any] = {
    **_NEMOTRON_THINKS,
    "is_ultra": True,
    "reply": "well 日本</think>" + _XML_CALL,
}
_OFF = {"enable_thinking": False}
_KEEP = {"truncate_history_thinking": False}


def _nemotron(name: str, size: str, options: dict[str, Any], **flags: Any) -> NemotronFamily:
    return NemotronFamily(name, name, f"nemotron3_{size}", options, **flags)


_NEMOTRON_FAMILIES = (
    _nemotron("nemotron3", "nano", {}, **_NEMOTRON_THINKS),
    _nemotron("nemotron3_disable_thinking", "nano", _OFF, **_NEMOTRON),
    _nemotron("nemotron3_preserve_thinking", "nano", _KEEP, **_NEMOTRON_THINKS, preserves=True),
    _nemotron("nemotron3_low_thinking", "super", {"low_effort": True}, **_NEMOTRON_THINKS),
    _nemotron("nemotron3_ultra", "ultra", {}, **_ULTRA),
)
_NEMOTRON_VARIANTS = (
    _nemotron("nemotron3_ultra_disable_thinking", "ultra", _OFF, **_NEMOTRON, is_ultra=True),
    _nemotron("nemotron3_ultra_medium_thinking", "ultra", {"medium_effort": True}, **_ULTRA),
    _nemotron("nemotron3_ultra_preserve_thinking", "ultra", _KEEP, **_ULTRA, preserves=True),
)

MARKER_FAMILIES = (*_DEEPSEEK_FAMILIES, *_GPT_OSS_FAMILIES, *_KIMI_FAMILIES, *_NEMOTRON_FAMILIES)
MARKER_VARIANTS = (
    replace(
        _DEEPSEEK_FAMILIES[0],
        name="deepseekv3_disable_thinking",
        renderer_name="deepseekv3_disable_thinking",
    ),
    *_GPT_OSS_VARIANTS,
    *_KIMI_VARIANTS,
    *_NEMOTRON_VARIANTS,
)
"""Formats that differ from one above in a word or in their name alone."""
