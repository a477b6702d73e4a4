"""gpt-oss (Harmony): `<|start|>role<|channel|>channel<|message|>` text `<|end|>`.

| renderer                                        | system block                           |
|-------------------------------------------------|----------------------------------------|
| `gpt_oss_low_reasoning`, `_medium_`, `_high_`   | identity, date and the effort          |
| `gpt_oss_no_sysprompt`                          | none                                   |

A reply reasons in the channel `analysis`, answers in `final` and calls tools in `commentary`, one
message each. The model ends its turn with `<|return|>` or `<|call|>`. In history an answer ends
with `<|end|>`, and reasoning is kept only before calls that no answer has followed yet. Replies are
therefore written differently in later prompts, and training makes one example per reply.

Deliberate differences from the template:
 1. Typed control tokens stay text; the template raises on some of them and writes the others as
    control tokens.
 2. The date is 2025-08-05, the day of the release; the template writes the day of the call, which
    would make every day's training data different. `current_date` sets another one.
 3. Text next to a call is a preamble in the channel `commentary`, as in the format's documentation,
    and stays in history. The template writes it as reasoning, and raises if there are both.
 4. System messages after the first become developer messages; the template drops them.
 5. Several calls in one reply are refused: `<|call|>` ends the turn, and the template drops all but
    the first. Give each call a separate message, followed by its result.
 6. Arguments given as JSON text are not changed; the template would quote them again.
 7. Empty reasoning counts as none; the template writes an empty analysis message.
 8. A result is written with its `name` if it has one, else with the name of the last call.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.harmony import namespace_text
from tinker_cookbook.renderers.notations.harmony_parser import (
    CALL_TEXT,
    HarmonyParser,
    HarmonyTokens,
)
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments, json_text
from tinker_cookbook.renderers.types import Message, Role, ToolSpec
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "GptOssRenderer"]

RELEASE_DATE = "2025-08-05"
_SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: {date}\n\nReasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
_SYSTEM_TOOLS = "\nCalls to these tools must go to the commentary channel: 'functions'."
_EFFORTS = ("low", "medium", "high")
_SAMPLED, _HISTORY, _SILENT = "sampled", "history", "silent"


class GptOssRenderer(Renderer):
    """OpenAI's Harmony format."""

    takes_text_arguments = False
    writes_tools = True
    roles = ("system", "developer", "user", "assistant", "tool")

    def __init__(
        self,
        tokenizer: Tokenizer,
        use_system_prompt: bool = False,
        reasoning_effort: str | None = None,
        current_date: str | None = None,
    ) -> None:
        """Prepare the frames.

        Args:
            tokenizer: gpt-oss's.
            use_system_prompt: write the system block at the start.
            reasoning_effort: low, medium (default) or high; needs the system block.
            current_date: date in the system block, as YYYY-MM-DD.
        """
        super().__init__(tokenizer)
        effort = reasoning_effort or "medium"
        if effort not in _EFFORTS or (reasoning_effort and not use_system_prompt):
            raise RendererError(
                f"reasoning_effort={reasoning_effort!r}, use_system_prompt={use_system_prompt}: "
                f"use one of {', '.join(_EFFORTS)}, with use_system_prompt=True."
            )
        self.use_system_prompt = use_system_prompt
        self.current_date = current_date or RELEASE_DATE
        self._system = _SYSTEM.format(date=self.current_date, effort=effort)
        names = ("start", "message", "end", "channel", "constrain", "call", "return")
        start, message, end, channel, constrain, call, stop = (
            self.control_token(f"<|{name}|>") for name in names
        )
        self._tokens = HarmonyTokens(start, message, end, channel, constrain, call, stop)
        roles = ("system", "developer", "user", "assistant")
        role_ids = dict(zip(roles, self.encoder.encode_batch(list(roles)), strict=True))
        self._frames = {
            role: (start, *ids, message) for role, ids in role_ids.items() if role != "assistant"
        }
        self._opening = (start, *role_ids["assistant"])
        channels = ("analysis", "final", "commentary", "commentary json")
        channel_ids = self.encoder.encode_batch(list(channels))
        self._channels = {
            name: (channel, *ids, message) for name, ids in zip(channels, channel_ids, strict=True)
        }

    @property
    def has_extension_property(self) -> bool:
        return False

    # ---- forms ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return for each reply: `sampled`, `history`, or `silent` (a call without reasoning)."""
        forms = list(self.prompt_forms(messages))
        if messages and messages[-1]["role"] == "assistant":
            forms[-1] = _SAMPLED
        return forms

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        answers = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and not _has_call(message)
        ]
        last_answer = answers[-1] if answers else -1
        return [
            _HISTORY
            if not _has_call(message)
            else _SILENT
            if index < last_answer and split_reasoning(message)[0]
            else _SAMPLED
            for index, message in enumerate(messages)
        ]

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        tools = messages[0].get("tools") if messages else None
        if self.use_system_prompt:
            layout.ids(self._frames["system"], SegmentKind.FRAME, -1)
            text = self._system + (_SYSTEM_TOOLS if tools else "")
            layout.text(text, SegmentKind.CONTENT, -1)
            layout.ids((self._tokens.end,), SegmentKind.STOP, -1)
        call_name: str | None = None
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self._lay_out_reply(layout, message, index, forms[index])
                call_name = _called_name(message)
            elif role == "tool":
                self._lay_out_result(layout, message, index, call_name)
            else:
                self._lay_out_plain(layout, message, index)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        if role == "assistant":
            layout.ids(self._opening, SegmentKind.FRAME, len(messages))
        elif role in self._frames:
            layout.ids(self._frames[role], SegmentKind.FRAME, len(messages))

    def _lay_out_plain(self, layout: Layout, message: Message, index: int) -> None:
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant thinks and makes tool_calls; role is "
                f"{message['role']!r}."
            )
        tools = message.get("tools")
        if message["role"] == "user":
            layout.ids(self._frames["user"], SegmentKind.FRAME, index)
            layout.text(text, SegmentKind.CONTENT, index)
        elif text or tools:
            if tools and index:
                raise RendererError(f"messages[{index}]: tools are declared by the first message.")
            layout.ids(self._frames["developer"], SegmentKind.FRAME, index)
            self._lay_out_developer(layout, text, tools or (), index)
        else:
            return
        layout.ids((self._tokens.end,), SegmentKind.STOP, index)

    def _lay_out_developer(
        self, layout: Layout, text: str, tools: Sequence[ToolSpec], index: int
    ) -> None:
        if text:
            layout.text("# Instructions\n\n", SegmentKind.FRAME, index)
            layout.text(text, SegmentKind.CONTENT, index)
            layout.text("\n\n", SegmentKind.FRAME, index)
        if tools:
            declared = "# Tools\n\n" + namespace_text(tools)
            layout.text(declared, SegmentKind.TOOL, index)

    def _lay_out_result(
        self, layout: Layout, message: Message, index: int, call_name: str | None
    ) -> None:
        name = message.get("name") or call_name
        if not name:
            raise RendererError(
                f"messages[{index}]: a tool result needs a call before it, or a name, since this "
                "format writes the name of the tool."
            )
        tokens = self._tokens
        layout.ids((tokens.start,), SegmentKind.FRAME, index)
        layout.text(f"functions.{name} to=assistant", SegmentKind.FRAME, index)
        layout.ids(self._channels["commentary"], SegmentKind.FRAME, index)
        layout.text(json_text(split_reasoning(message)[1]), SegmentKind.TOOL, index)
        layout.ids((tokens.end,), SegmentKind.STOP, index)

    def _lay_out_reply(self, layout: Layout, message: Message, index: int, form: Hashable) -> None:
        reasoning, text = split_reasoning(message)
        has_call = _has_call(message)
        layout.ids(self._opening, SegmentKind.FRAME, index)
        if reasoning and form == _SAMPLED:
            self._lay_out_part(layout, "analysis", reasoning, index)
        if not has_call:
            layout.ids(self._channels["final"], SegmentKind.CONTENT, index, sampled=True)
            layout.text(text, SegmentKind.CONTENT, index, sampled=True)
            end = self._tokens.stop if form == _SAMPLED else self._tokens.end
            layout.ids((end,), SegmentKind.STOP, index, sampled=True)
            return
        if text:
            self._lay_out_part(layout, "commentary", text, index)
        self._lay_out_call(layout, message, index)
        layout.ids((self._tokens.call,), SegmentKind.STOP, index, sampled=True)

    def _lay_out_part(self, layout: Layout, channel: str, text: str, index: int) -> None:
        """Append a message that does not end the turn."""
        kind = SegmentKind.THINK if channel == "analysis" else SegmentKind.CONTENT
        layout.ids(self._channels[channel], kind, index, sampled=True)
        layout.text(text, kind, index, sampled=True)
        layout.ids((self._tokens.end, *self._opening), kind, index, sampled=True)

    def _lay_out_call(self, layout: Layout, message: Message, index: int) -> None:
        calls = message.get("tool_calls") or []
        unparsed = message.get("unparsed_tool_calls") or []
        if len(calls) + len(unparsed) > 1:
            raise RendererError(
                f"messages[{index}]: this format ends the turn with each call; give every call a "
                "separate message, followed by its result."
            )
        if calls:
            name, arguments = call_name_and_arguments(calls[0])
            recipient, channel, body = f" to=functions.{name}", "commentary json", arguments
        else:
            found = CALL_TEXT.fullmatch(unparsed[0].raw_text)
            if found is None:
                layout.text(unparsed[0].raw_text, SegmentKind.TOOL, index, sampled=True)
                return
            recipient, channel, body = found["recipient"], found["channel"], found["body"]
        layout.cut()
        layout.text(recipient, SegmentKind.TOOL, index, sampled=True)
        self._lay_out_channel(layout, channel, index)
        layout.text(body, SegmentKind.TOOL, index, sampled=True)

    def _lay_out_channel(self, layout: Layout, channel: str, index: int) -> None:
        """Append the channel of a call; its text may contain `<|constrain|>`."""
        tokens = self._tokens
        layout.ids((tokens.channel,), SegmentKind.TOOL, index, sampled=True)
        for place, words in enumerate(channel.split("<|constrain|>")):
            if place:
                layout.ids((tokens.constrain,), SegmentKind.TOOL, index, sampled=True)
            layout.text(words, SegmentKind.TOOL, index, sampled=True)
        layout.ids((tokens.message,), SegmentKind.TOOL, index, sampled=True)

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return [self._tokens.stop, self._tokens.call]

    def response_parser(self) -> HarmonyParser:
        return HarmonyParser(self.encoder, self._tokens)


def _has_call(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("unparsed_tool_calls"))


def _called_name(message: Message) -> str | None:
    calls = message.get("tool_calls")
    return call_name_and_arguments(calls[0])[0] if calls else None


RENDERERS = [
    NamedRenderer(
        "gpt_oss_low_reasoning",
        lambda tokenizer, _: GptOssRenderer(
            tokenizer, use_system_prompt=True, reasoning_effort="low"
        ),
        "gpt-oss",
        "Harmony, with effort `low` in the system block; tools",
    ),
    NamedRenderer(
        "gpt_oss_medium_reasoning",
        lambda tokenizer, _: GptOssRenderer(
            tokenizer, use_system_prompt=True, reasoning_effort="medium"
        ),
        "gpt-oss",
        "Harmony, with effort `medium` in the system block; tools",
    ),
    NamedRenderer(
        "gpt_oss_high_reasoning",
        lambda tokenizer, _: GptOssRenderer(
            tokenizer, use_system_prompt=True, reasoning_effort="high"
        ),
        "gpt-oss",
        "Harmony, with effort `high` in the system block; tools",
    ),
    NamedRenderer(
        "gpt_oss_no_sysprompt",
        lambda tokenizer, _: GptOssRenderer(tokenizer),
        "gpt-oss",
        "without the system block",
    ),
]
