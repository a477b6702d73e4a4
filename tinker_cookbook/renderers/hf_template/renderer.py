"""Any model by its own chat template, with masks found from what the template writes.

    get_renderer("hf_template", tokenizer)

For models without a renderer of their own here. Everything is learnt from the template, by running
it on marks in place of texts (see template_text.py):

 - What is sampled of a reply is what the template writes after its own generation prompt, up to
   the token that ends the turn. Where the template has `{% generation %}` blocks, only what stands
   in them is trained.
 - A conversation trains in one example if every trained reply stands there as it was sampled, after
   the same prompt; else in one example per reply. This is decided anew for each conversation.
 - Typed text is encoded without control tokens, and cannot act on the template: what the template
   would read from a string (`</think>`, say) stays text.
 - Replies are parsed by the markers that the template puts around reasoning and calls, where these
   are tokens of the tokenizer and calls are JSON or as in xml_calls.py; else they stay text. The
   words of the format around them are none of the reply: gpt-oss's headers, the label of Gemma 4's
   reasoning, and the empty block that Kimi K2 Thinking's and K2.5's templates write for reasoning.

Refused, with the reason: templates without an exact mask (the reply is not what follows the prompt,
or nothing ends it), messages that the template drops or rewrites, and tokenizers that encode text
next to a control token in another way. Not protected: words that templates compare (tool names,
call ids and JSON keys of letters, digits, `_ . : -` and spaces) reach the template as they are;
they hold no control token, and the template could only make one by writing the rest around them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.gemma4_parsing import LabelledParser
from tinker_cookbook.renderers.harmony_parsing import HARMONY_MARKS, HarmonyParser, HarmonyTokens
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser
from tinker_cookbook.renderers.rendering import Layout, SegmentKind
from tinker_cookbook.renderers.template_facts import TemplateFacts, learn
from tinker_cookbook.renderers.template_plan import (
    ControlTokens,
    Plan,
    Reply,
    build_atoms,
    lay_out_atoms,
)
from tinker_cookbook.renderers.template_text import (
    Conversation,
    Masker,
    TemplateError,
    TemplateRunner,
    Value,
    fill,
    mark_spans,
)
from tinker_cookbook.renderers.tool_calls import (
    bare_calls_as_text,
    call_name_and_arguments,
    tool_declaration,
)
from tinker_cookbook.renderers.types import Message, Role, ToolSpec
from tinker_cookbook.renderers.xml_calls import fit_calls
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["HFTemplateRenderer"]

logger = logging.getLogger(__name__)

_MAX_PLANS = 512
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What may be absent without harm: reasoning in history, a speaker's name, a call's id.
_MAY_BE_DROPPED = frozenset({SegmentKind.THINK, SegmentKind.FRAME})


class HFTemplateRenderer(Renderer):
    """Renders with the tokenizer's own chat template."""

    roles = ("system", "developer", "user", "assistant", "tool")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Learn the template.

        Args:
            tokenizer: a fast transformers tokenizer.
            chat_template: another template than the tokenizer's own.
            template_options: variables that the template reads, such as `enable_thinking=False` or
                `date_string="26 Jul 2024"`.

        Raises:
            RendererError: if there is no template, or no exact mask for it.
        """
        super().__init__(tokenizer)
        options = dict(template_options or {})
        if chat_template is not None:
            options["chat_template"] = chat_template
        template = _template_source(tokenizer, chat_template)
        if "strftime_now" in template and not {"date_string", "strftime_now"} & set(options):
            logger.warning(
                "this chat template may write today's date, so the same data gives other tokens on "
                "another day; a fixed date is an option of HFTemplateRenderer(template_options=...)"
            )
        self._control = ControlTokens(tokenizer.added_tokens_decoder)
        self._runner = TemplateRunner(tokenizer, options)
        self._has_blocks = bool(_GENERATION_BLOCK.search(template))
        self._structure = _structural_strings(template)
        self._plans: dict[tuple[str, bool], Plan] = {}
        self._facts = TemplateFacts()
        self._stops: frozenset[int] = frozenset()
        self._facts = learn(self)
        self.roles = self._facts.roles
        self.bos_ids = self._facts.bos_ids

    @property
    def takes_text_arguments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._facts.arguments != "object"

    @property
    def facts(self) -> TemplateFacts:
        """What was learnt about the template."""
        return self._facts

    # ---- what the template is given ----

    def _conversation(self, messages: Sequence[Message]) -> Conversation:
        masker = Masker(self._control.pattern)
        declared = messages[0].get("tools") if messages else None
        tools = [tool_declaration(tool) for tool in declared or ()]
        if tools and not self._facts.has_tools:
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

    def _as_given(self, message: Message, index: int) -> dict[str, Any]:
        """Return the message as the template takes it."""
        if message.get("tools") and index:
            raise RendererError(f"messages[{index}]: tools are declared by a first system message.")
        reasoning, text = split_reasoning(message)
        given: dict[str, Any] = {"role": message["role"], "content": self._content(text)}
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
        return [{"type": "text", "text": text}] if self._facts.content_is_list else text

    def _call(self, call: Any) -> dict[str, Any]:
        if self._facts.arguments == "none":
            raise RendererError("this chat template writes no tool_calls.")
        name, arguments = call_name_and_arguments(call)
        given: Any = arguments if self._facts.arguments == "text" else json.loads(arguments)
        record: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "arguments": given},
        }
        call_id = call.get("id") if isinstance(call, Mapping) else call.id
        return record if call_id is None else {"id": call_id, **record}

    def _masked(
        self, given: dict[str, Any], message: Message, index: int, masker: Masker
    ) -> dict[str, Any]:
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

    def _masked_call(self, call: dict[str, Any], index: int, masker: Masker) -> dict[str, Any]:
        body = call["function"]
        masked = {
            "name": masker.name(body["name"], index),
            "arguments": masker.data(body["arguments"], index, keep_names=False),
        }
        result = {**call, "function": masked}
        if "id" in call:
            result["id"] = _optional(masker, call["id"], index)
        return result

    def _with_unparsed(self, given: dict[str, Any], message: Message) -> dict[str, Any]:
        """Return the message with the calls that could not be parsed, as text."""
        unparsed = message.get("unparsed_tool_calls")
        if not unparsed:
            return given
        text = split_reasoning(message)[1]
        for call in unparsed:
            text += ("\n" if text else "") + call.raw_text
        return {**given, "content": self._content(text)}

    # ---- plans ----

    def _written(self, talk: Conversation, count: int, *, prompt: bool) -> str:
        """Return what the template writes of the first `count` messages, with marks."""
        messages = talk.masked[: max(0, count - talk.offset)]
        return self._runner.run_cached(messages, talk.masked_tools, prompt=prompt)

    def _plan(self, talk: Conversation, *, prompt: bool) -> Plan:
        key = (json.dumps([talk.masked, talk.masked_tools]), prompt)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(talk, prompt=prompt)
        return plan

    def _make_plan(self, talk: Conversation, *, prompt: bool) -> Plan:
        count = len(talk.masked) + talk.offset
        text = self._written(talk, count, prompt=prompt)
        self._refuse_dropped(talk, text)
        replies: dict[int, Reply] = {}
        for index in range(talk.offset, count):
            if talk.masked[index - talk.offset]["role"] == "assistant":
                replies[index] = self._reply(talk, index)
        standing = {
            index: reply
            for index, reply in replies.items()
            if reply.problem is None and text.startswith(reply.written)
        }
        atoms = build_atoms(
            text,
            talk.values,
            self._control,
            replies=standing,
            cuts=self._cuts(talk, replies, text),
            stops=self._stops,
        )
        return Plan(text, atoms, replies, frozenset(standing))

    def _cuts(self, talk: Conversation, replies: Mapping[int, Reply], text: str) -> frozenset[int]:
        """Return where sampling starts: the ends of all prompts that the text starts with."""
        cuts = set()
        for index in replies:
            try:
                prompt = self._written(talk, index, prompt=True)
            except TemplateError:
                continue
            if text.startswith(prompt):
                cuts.add(len(prompt))
        return frozenset(cuts)

    def _refuse_dropped(self, talk: Conversation, text: str) -> None:
        present = {mark.value for mark in mark_spans(text)}
        for number, value in enumerate(talk.values):
            if number in present or value.kind in _MAY_BE_DROPPED:
                continue
            where = "tools" if value.message < 0 else f"messages[{value.message}]"
            raise RendererError(
                f"{where}: the chat template does not write {value.text[:60]!r}; leave it out, or "
                "use a renderer whose format has a place for it."
            )

    def _reply(self, talk: Conversation, index: int) -> Reply:
        """Return what sampling writes of message `index`, found by rendering prefixes."""
        try:
            prompt = self._written(talk, index, prompt=True)
            whole = self._written(talk, index + 1, prompt=False)
        except TemplateError as error:
            return Reply(problem=str(error))
        if not whole.startswith(prompt):
            return Reply(problem=_prompt_problem(prompt, whole, talk.values))
        marks = [m for m in mark_spans(whole) if talk.values[m.value].message == index]
        own = {n for n, value in enumerate(talk.values) if value.message == index}
        missing = [n for n in own - {m.value for m in marks} if _is_reasoning(talk.values[n])]
        if missing:
            return Reply(problem="the chat template drops the reasoning of this reply")
        start = len(prompt)
        after = max([start, *(mark.end for mark in marks)])
        end = self._end_of_turn(whole, after)
        if end is None or self._end_of_turn(whole[:after], start) is not None:
            reason = "nothing in the chat template ends this reply"
            if end is not None:
                reason = "a token that ends the turn stands within this reply"
            return Reply(problem=reason)
        tagged = None
        if self._has_blocks:
            messages = talk.masked[: index + 1 - talk.offset]
            tagged = tuple(self._runner.tagged(messages, talk.masked_tools))
        return Reply(start, end, whole[:end], tagged=tagged)

    def _end_of_turn(self, text: str, start: int) -> int | None:
        """Return the end of the first token from `start` on that ends a turn."""
        for match in self._control.pattern.finditer(text, start):
            if self._control.id_of(match) in self._stops:
                return match.end()
        return None

    # ---- rendering ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        del forms
        self._lay_out(layout, messages, prompt=False)

    def _prompt_layout(self, messages: Sequence[Message], role: Role) -> Layout:
        if role != "assistant":
            raise RendererError(
                f"role={role!r} cannot be opened: chat templates open turns of the assistant only."
            )
        layout = Layout()
        self._lay_out(layout, messages, prompt=True)
        return layout

    def _lay_out(self, layout: Layout, messages: Sequence[Message], *, prompt: bool) -> None:
        talk = self._conversation(messages)
        plan = self._plan(talk, prompt=prompt)
        if not self._is_as_typed(talk, plan, prompt=prompt):
            self._runner.forget()  # it may write the date
            self._plans.clear()
            plan = self._plan(talk, prompt=prompt)
            if not self._is_as_typed(talk, plan, prompt=prompt):
                raise self._rewriting_error(talk, plan, prompt=prompt)
        lay_out_atoms(layout, plan.atoms, talk.values, self._facts.call_markers)

    def _is_as_typed(self, talk: Conversation, plan: Plan, *, prompt: bool) -> bool:
        """Whether the template writes the typed texts as they are, or may be kept from acting."""
        if self._acts_on_template(talk.values):
            return True
        try:
            written = self._runner.run(talk.plain, talk.tools, prompt=prompt)
        except TemplateError:
            return False
        return written == fill(plan.text, talk.values)

    def _acts_on_template(self, values: Sequence[Value]) -> bool:
        """Whether a text holds what the template, or the tokenizer, takes for structure."""
        return any(
            self._structure.search(value.text) or self._control.pattern.search(value.text)
            for value in values
        )

    def _rewriting_error(self, talk: Conversation, plan: Plan, *, prompt: bool) -> RendererError:
        theirs = self._runner.run(talk.plain, talk.tools, prompt=prompt)
        ours = fill(plan.text, talk.values)
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        return RendererError(
            f"the chat template rewrites the text of a message near {theirs[place : place + 40]!r} "
            f"(expected {ours[place : place + 40]!r}), so what is typed cannot be told from what "
            "it writes; a renderer of its own is needed for this model."
        )

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        talk = self._conversation(messages[: index + 1])
        problem = self._plan(talk, prompt=False).replies[index].problem
        if problem is not None:
            raise RendererError(
                f"messages[{index}]: no exact mask: {problem}. Train other replies, or use a "
                "renderer made for this model."
            )

    def _trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        return self._rewritten_turn(messages, trained) is None

    def _rewritten_turn(self, messages: Sequence[Message], trained: Sequence[int]) -> int | None:
        faithful = self._plan(self._conversation(messages), prompt=False).faithful
        for index in trained:
            if messages[index]["role"] == "assistant" and index not in faithful:
                return index
        return None

    @property
    def has_extension_property(self) -> bool:
        return self._facts.extends

    def create_conversation_prefix_with_tools(
        self, tools: list[ToolSpec], system_prompt: str = ""
    ) -> list[Message]:
        if not self._facts.has_tools:
            return super().create_conversation_prefix_with_tools(tools, system_prompt)
        return [Message(role="system", content=system_prompt, tools=list(tools))]

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return sorted(self._facts.stops)

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        words, whole = self._facts.xml_words, self._facts.grammar.whole_calls
        if whole is not None:
            return bare_calls_as_text(message, tools, "parameters")
        return message if words is None else fit_calls(message, tools, words)

    def grammar(self) -> Grammar:
        return self._facts.grammar

    def response_parser(self) -> ReplyParser:
        facts = self._facts
        if facts.is_harmony:
            ids = self._control.ids
            return HarmonyParser(self.encoder, HarmonyTokens(*(ids[m] for m in HARMONY_MARKS)))
        if facts.thought_label:
            return LabelledParser(
                self.encoder,
                facts.grammar,
                may_be_open=facts.may_open_thinking,
                label=facts.thought_label,
            )
        return super().response_parser()


def _template_source(tokenizer: Any, chat_template: str | None) -> str:
    found = chat_template or getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = "\n".join(map(str, found.values()))
    if not found or not hasattr(tokenizer, "added_tokens_decoder"):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise RendererError(
            f"tokenizer={name!r} has no chat template; give one with chat_template=..., or use "
            "role_colon for a base model."
        )
    return str(found)


def _structural_strings(template: str) -> re.Pattern[str]:
    """Match the strings that a template may look for in texts: its literals with a bracket."""
    import jinja2

    tokens = jinja2.Environment().lex(template)
    strings = {value[1:-1].strip() for _, kind, value in tokens if kind == "string"}
    structural = sorted(s for s in strings if len(s) > 2 and re.search(r"[<>\[\]|]", s))
    return re.compile("|".join(map(re.escape, structural)) or r"(?!)")


def _optional(masker: Masker, text: str, index: int) -> str:
    """Mask a name or id; plain words stay, and templates may leave it out."""
    if masker.name(text, index) == text:
        return text
    masker.values.pop()
    return masker.text(text, index, SegmentKind.FRAME)


def _is_reasoning(value: Value) -> bool:
    return value.kind is SegmentKind.THINK


def _prompt_problem(prompt: str, whole: str, values: Sequence[Value]) -> str:
    ours, theirs = fill(prompt, values), fill(whole, values)
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return (
        f"the chat template does not write this reply after its own generation prompt: the prompt "
        f"ends in {ours[max(0, place - 20) :][:60]!r}, the conversation has "
        f"{theirs[max(0, place - 20) :][:60]!r} there"
    )
