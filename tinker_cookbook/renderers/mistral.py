"""Mistral Nemo and Mistral Small 3.2: `[INST]` text `[/INST]`, reply, `</s>`.

| renderer        | system message                             | tool calls                     |
|-----------------|--------------------------------------------|--------------------------------|
| `mistral_nemo`  | in the last message, if that is the user's | a list in JSON                 |
| `mistral_small` | at the start; with a default               | name, id and JSON, one by one  |

A prompt ends in `[/INST]` or `[/TOOL_RESULTS]`: replies have no header. Tools are declared before
the last user message, and so is Nemo's system message. A new user message therefore changes how
earlier messages are written, and prompts do not extend each other. A conversation in which nothing
is rewritten still trains in one example.

Deliberate differences from the templates (those in llama.cpp):
 1. Typed control tokens stay text.
 2. A conversation that ends in a reply is written as the prompt of that reply, then the reply.
    Nemo's template omits the system message as soon as there is a reply.
 3. Small's default system message names a fixed date, 20 June 2025, the day of the model's release;
    the template writes the current day. `date_string` sets another one.
 4. Ids of calls are nine letters or digits. Other ids, and missing ones, become the number of the
    call in the conversation, in nine digits; the templates raise.
 5. A reply with both text and calls is refused: the templates drop the text.
 6. Roles do not have to alternate. A system message must be the first message; with tools, an empty
    one counts as none.
 7. Tools are declared once. The templates declare them again before every user message that is
    equal to the last one.
 8. Arguments given as JSON text are not changed, and declarations are valid JSON. Nemo's template
    writes the texts of a declaration without escapes.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import Grammar, ParsedCall
from tinker_cookbook.renderers.tool_calls import (
    as_tool_call,
    call_name_and_arguments,
    json_text,
    parse_call_json,
    tool_declaration,
)
from tinker_cookbook.renderers.train_on_what import last_user_index
from tinker_cookbook.renderers.types import CallLike, Message, Role, ToolCall, UnparsedToolCall
from tinker_cookbook.replies.json_calls import read_json_calls
from tinker_cookbook.replies.pieces import BadCall
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["MISTRAL_SMALL_SYSTEM", "RENDERERS", "MistralRenderer"]

MISTRAL_SMALL_SYSTEM = (
    "You are Mistral Small 3, a Large Language Model (LLM) created by Mistral AI, a French "
    "startup headquartered in Paris.\nYour knowledge base was last updated on 2023-10-01. The "
    "current date is {date}.\n\n"
    "When you're not sure about some information or when the user's request requires up-to-date "
    "or specific data, you must use the available tools to fetch the information. Do not "
    "hesitate to use tools whenever they can provide a more accurate or complete response. If no "
    "relevant tools are available, then clearly state that you don't have the information and "
    "avoid making up anything.\n\n"
    "If the user's question is not clear, ambiguous, or does not provide enough context for you "
    "to accurately answer the question, you do not try to answer it right away and you rather "
    'ask the user to clarify their request (e.g. "What are some good restaurants around me?" '
    '=> "Where are you?" or "When is the next flight to Tokyo" => "Where do you travel '
    'from?").\nYou are always very attentive to dates, and when asked about information at '
    "specific dates, you discard information that is at another date.\nYou follow these "
    "instructions in all languages, and always respond to the user in the language they use or "
    "request.\nNext sections describe the capabilities that you have.\n\n"
    "# WEB BROWSING INSTRUCTIONS\n\n"
    "You cannot perform any web search or access internet to open URLs, links etc. If it seems "
    "like the user is expecting you to do so, you clarify the situation and ask the user to copy "
    "paste the text directly in the chat.\n\n"
    "# MULTI-MODAL INSTRUCTIONS\n\n"
    "You have the ability to read images, but you cannot generate images. You also cannot "
    "transcribe audio files or videos.\nYou cannot read nor transcribe audio files or videos.\n\n"
    "# TOOL CALLING INSTRUCTIONS\n\n"
    "You may have access to tools that you can use to fetch information or perform actions. You "
    "must use these tools in the following situations:\n\n"
    "1. When the request requires up-to-date information.\n2. When the request requires specific "
    "data that you do not have in your knowledge base.\n3. When the request involves actions "
    "that you cannot perform without tools.\n\n"
    "Always prioritize using tools to provide the most accurate and helpful response. If tools "
    "are not available, inform the user that you cannot perform the requested action at the "
    "moment."
)
"""What Small 3.2's template writes without a system message."""

_ID = re.compile(r"[A-Za-z0-9]{9}")
_MARKS = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_SMALL_MARKS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]")


class MistralRenderer(Renderer):
    """Mistral Nemo, or Mistral Small 3.2."""

    takes_text_arguments = False
    writes_tools = True

    def __init__(
        self, tokenizer: Tokenizer, *, is_small: bool = False, date_string: str = "2025-06-20"
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: must have Mistral's control tokens.
            is_small: write as Mistral Small 3.2.
            date_string: current date in Small's default system message.
        """
        super().__init__(tokenizer)
        self.is_small = is_small
        self._default_system = MISTRAL_SMALL_SYSTEM.format(date=date_string) if is_small else ""
        self.bos_ids = (self.control_token("<s>"),)
        self._eos = (self.control_token("</s>"),)
        marks = (*_MARKS, *_SMALL_MARKS) if is_small else _MARKS
        self._marks = {mark: (self.control_token(mark),) for mark in marks}

    @property
    def has_extension_property(self) -> bool:
        return False

    def trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        return self.rewritten_turn(messages, trained) is None

    # ---- layout ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return (declares tools, holds the system message) of each user message."""
        prompt = messages
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
        forms: list[Hashable] = [None] * len(messages)
        user = last_user_index(prompt)
        if user >= 0:
            has_system = messages[0]["role"] == "system" and not self.is_small
            has_tools = bool(messages[0].get("tools"))
            forms[user] = (has_tools, has_system and user == len(prompt) - 1)
        return forms

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        system = messages[0] if messages and messages[0]["role"] == "system" else None
        self._lay_out_system(layout, system)
        ids = _call_ids(messages)
        for index, message in enumerate(messages):
            text = self._text(message, index)
            if message["role"] == "assistant":
                self._lay_out_reply(layout, message, index, ids[index])
            elif message["role"] == "tool":
                self._lay_out_result(layout, text, index, ids[index][0])
            elif message["role"] == "user":
                self._lay_out_user(layout, messages, index, forms[index])
            elif index:
                raise RendererError(
                    f"messages[{index}]: a system message must be the first message in this "
                    "format; join it with the first message, or make it a user message."
                )

    def _mark(self, layout: Layout, mark: str, index: int, *, sampled: bool = False) -> None:
        kind = SegmentKind.TOOL if sampled else SegmentKind.FRAME
        layout.ids(self._marks[mark], kind, index, sampled=sampled)

    def _lay_out_system(self, layout: Layout, system: Message | None) -> None:
        if not self.is_small:
            return
        text = "" if system is None else self._text(system, 0)
        is_default = system is None or (not text and bool(system.get("tools")))
        index = -1 if system is None else 0
        self._mark(layout, "[SYSTEM_PROMPT]", index)
        if is_default:
            layout.text(self._default_system, SegmentKind.FRAME, index)
        layout.text(text, SegmentKind.CONTENT, index)
        self._mark(layout, "[/SYSTEM_PROMPT]", index)

    def _lay_out_user(
        self, layout: Layout, messages: Sequence[Message], index: int, form: Hashable
    ) -> None:
        declares_tools, holds_system = form if isinstance(form, tuple) else (False, False)
        if declares_tools:
            tools = [tool_declaration(tool) for tool in messages[0].get("tools", [])]
            self._mark(layout, "[AVAILABLE_TOOLS]", index)
            layout.text(json_text(tools), SegmentKind.TOOL, index)
            self._mark(layout, "[/AVAILABLE_TOOLS]", index)
        self._mark(layout, "[INST]", index)
        system = self._text(messages[0], 0) if holds_system else ""
        if holds_system and (system or not declares_tools):
            layout.text(system + "\n\n", SegmentKind.CONTENT, 0)
        layout.text(self._text(messages[index], index), SegmentKind.CONTENT, index)
        self._mark(layout, "[/INST]", index)

    def _lay_out_reply(
        self, layout: Layout, message: Message, index: int, ids: Sequence[str]
    ) -> None:
        text = self._text(message, index)
        calls = message.get("tool_calls") or ()
        unparsed = message.get("unparsed_tool_calls") or ()
        if text and (calls or unparsed):
            raise RendererError(
                f"messages[{index}]: a reply holds text or tool_calls in this format, not both; "
                "move the text into a separate message."
            )
        layout.text(text, SegmentKind.CONTENT, index, sampled=True)
        if calls and not self.is_small:
            self._mark(layout, "[TOOL_CALLS]", index, sampled=True)
            pairs = zip(calls, ids, strict=True)
            body = ", ".join(_nemo_call(call, call_id) for call, call_id in pairs)
            layout.text(f"[{body}]", SegmentKind.TOOL, index, sampled=True)
        elif calls:
            for call, call_id in zip(calls, ids, strict=True):
                self._lay_out_small_call(layout, call, index, call_id)
        for call in unparsed:
            tokens = self.encoder.encode_markup(call.raw_text)
            layout.ids(tokens, SegmentKind.TOOL, index, sampled=True)
        layout.ids(self._eos, SegmentKind.STOP, index, sampled=True)

    def _lay_out_small_call(self, layout: Layout, call: CallLike, index: int, call_id: str) -> None:
        name, arguments = call_name_and_arguments(call)
        texts = {"[TOOL_CALLS]": name, "[CALL_ID]": call_id, "[ARGS]": arguments}
        for mark, text in texts.items():
            self._mark(layout, mark, index, sampled=True)
            layout.text(text, SegmentKind.TOOL, index, sampled=True)

    def _lay_out_result(self, layout: Layout, text: str, index: int, call_id: str) -> None:
        self._mark(layout, "[TOOL_RESULTS]", index)
        if self.is_small:
            layout.text(call_id, SegmentKind.TOOL, index)
            self._mark(layout, "[TOOL_CONTENT]", index)
            layout.text(text, SegmentKind.TOOL, index)
        else:
            body = f'{{"content": {text}, "call_id": "{call_id}"}}'
            layout.text(body, SegmentKind.TOOL, index)
        self._mark(layout, "[/TOOL_RESULTS]", index)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        if role == "user":
            self._mark(layout, "[INST]", len(messages))

    @staticmethod
    def _text(message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning:
            raise RendererError(
                f"messages[{index}]: this format has no place for thinking; remove the thinking "
                "parts, or use the renderer of a thinking model."
            )
        if message.get("tools") and (index or message["role"] != "system"):
            raise RendererError(
                f"messages[{index}]: tools are declared by a first system message in this format."
            )
        return text

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return list(self._eos)

    def grammar(self) -> Grammar:
        inner = ("[CALL_ID]", "[ARGS]") if self.is_small else ()
        return Grammar(
            stop=frozenset(self._eos),
            call=(*self._marks["[TOOL_CALLS]"], None),
            parse_call=self._parse_small_call if self.is_small else _parse_nemo_calls,
            call_marks=frozenset(token for mark in inner for token in self._marks[mark]),
            newlines_before_call=0,
        )

    def _parse_small_call(
        self, parts: Sequence[str | int], raw_text: str
    ) -> Sequence[ToolCall | UnparsedToolCall]:
        """Parse name, id and arguments of one call; the id may be missing."""
        call_id, arguments = (self._marks[mark][0] for mark in ("[CALL_ID]", "[ARGS]"))
        texts: dict[int, str] = {0: ""}
        mark = 0
        for part in parts:
            if isinstance(part, str):
                texts[mark] += part
            elif part in texts:
                return [UnparsedToolCall(raw_text=raw_text, error="a mark is given twice")]
            else:
                mark = part
                texts[mark] = ""
        if mark != arguments:
            return [UnparsedToolCall(raw_text=raw_text, error="expected name[ARGS]{arguments}")]
        members = f'"name": {json_text(texts[0].strip())}, "arguments": {texts[arguments]}'
        parsed = parse_call_json(f"{{{members}}}", raw_text)
        if isinstance(parsed, ToolCall) and texts.get(call_id):
            parsed = parsed.model_copy(update={"id": texts[call_id]})
        return [parsed]


def _nemo_call(call: CallLike, call_id: str) -> str:
    name, arguments = call_name_and_arguments(call)
    return f'{{"name": {json_text(name)}, "arguments": {arguments}, "id": "{call_id}"}}'


def _parse_nemo_calls(parts: Sequence[str | int], raw_text: str) -> Sequence[ParsedCall]:
    """Parse a list of calls. If one is wrong, all of them are one unparsed call."""
    body = "".join(map(str, parts))
    calls = read_json_calls(body, raw_text)
    if body.lstrip().startswith("{"):
        calls = [BadCall(raw_text, "expected a list of calls")]
    return [as_tool_call(call) for call in calls]


def _call_ids(messages: Sequence[Message]) -> list[list[str]]:
    """Return the ids that each message writes: the ids of its calls, or the id of the call it
    answers."""
    number = 0
    written: list[list[str]] = []
    by_given: dict[str, str] = {}
    unanswered: list[str] = []
    for message in messages:
        ids = []
        for call in message.get("tool_calls") or ():
            number += 1
            given = call.id if isinstance(call, ToolCall) else call.get("id")
            ids.append(given if given and _ID.fullmatch(given) else f"{number:09d}")
            by_given[given or ids[-1]] = ids[-1]
        unanswered += ids
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            first = unanswered[0] if unanswered else f"{number:09d}"
            ids = [by_given.get(given, first) if given else first]
            unanswered = [call_id for call_id in unanswered if call_id != ids[0]]
        written.append(ids)
    return written


RENDERERS = [
    NamedRenderer(
        "mistral_nemo",
        lambda tokenizer, _: MistralRenderer(tokenizer),
        "Mistral Nemo Instruct",
        "system message in the last user message; tools",
    ),
    NamedRenderer(
        "mistral_small",
        lambda tokenizer, _: MistralRenderer(tokenizer, is_small=True),
        "Mistral Small 3.2",
        "its default system message, dated 2025-06-20; tools",
    ),
]
