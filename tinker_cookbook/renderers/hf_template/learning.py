"""Finding out what a chat template does by running it: roles, stops, reasoning, calls, history."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.hf_template.facts import TemplateFacts
from tinker_cookbook.renderers.hf_template.template_plan import (
    Atom,
    ControlTokens,
    build_atoms,
    lay_out_atoms,
)
from tinker_cookbook.renderers.hf_template.text import (
    Conversation,
    TemplateError,
    fill,
    mark_spans,
)
from tinker_cookbook.renderers.hf_template.writer import TemplateWriter
from tinker_cookbook.renderers.notations.xml import PYTHON_WORDS, parse_xml_call
from tinker_cookbook.renderers.parsing import CallParser, Grammar, parse_json_call
from tinker_cookbook.renderers.rendering import Layout, encode_layouts
from tinker_cookbook.renderers.tool_calls import parse_call_json
from tinker_cookbook.renderers.types import Message, ToolCall, ToolSpec
from tinker_cookbook.replies.grammar import WholeCalls
from tinker_cookbook.replies.harmony import HARMONY_MARKS
from tinker_cookbook.replies.json_calls import read_whole_reply
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["learn"]

_CALL_NAME = "probe_tool"
_ARGUMENTS = '{"probe_key": "probe value!"}'
_TYPED_ARGUMENTS = '{"a": true, "b": false, "c": null, "d": 1.5, "e": ["x", {"y": 2}], "f": "z"}'
_TOOL: ToolSpec = {
    "name": _CALL_NAME,
    "description": "Probes; nothing else.",
    "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
}


def learn(writer: TemplateWriter, encoder: TextEncoder, tokenizer: Tokenizer) -> TemplateFacts:
    """Run the template on probes.

    Raises:
        RendererError: if even the simplest conversation has no exact mask.
    """
    return _Probe(writer, encoder, tokenizer).learn()


def _user(text: str = "Probe question.") -> Message:
    return Message(role="user", content=text)


def _reply(text: str = "Probe answer.", **more: Any) -> Message:
    return Message(role="assistant", content=text, **more)


def _call(text: str = "", arguments: str = _ARGUMENTS) -> Message:
    body = ToolCall.FunctionBody(name=_CALL_NAME, arguments=arguments)
    return _reply(text, tool_calls=[ToolCall(id="probecall", function=body)])


def _result() -> Message:
    return Message(role="tool", content="Probe result.", tool_call_id="probecall", name=_CALL_NAME)


class _Probe:
    """Finds the facts step by step; each step uses the facts found before, through the writer."""

    def __init__(self, writer: TemplateWriter, encoder: TextEncoder, tokenizer: Tokenizer) -> None:
        self._writer = writer
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._facts = writer.facts
        self._control = writer.control

    def learn(self) -> TemplateFacts:
        """Return the facts."""
        self._learn_content()
        self._learn_plain_reply()
        self._learn_calls()
        self._learn_thinking()
        self._learn_tools_and_roles()
        self._check_tokens()
        facts = self._facts
        self._learn_headers()
        facts.extends = all(self._extends(talk) for talk in self._talks())
        return facts

    def _written(
        self, messages: list[Message], *, prompt: bool = False
    ) -> tuple[str, Conversation]:
        """Return what the template writes, with marks, and the conversation."""
        talk = self._writer.conversation(messages)
        return self._writer.written(talk, len(messages), prompt=prompt), talk

    def _learn_content(self) -> None:
        reasons = []
        for is_list in (False, True):
            self._facts.content_is_list = is_list
            try:
                written, _ = self._written([_user()], prompt=True)
            except TemplateError as error:
                reasons.append(str(error))
                continue
            if mark_spans(written):
                bos = getattr(self._tokenizer, "bos_token", None)
                if bos and written.startswith(bos):
                    self._facts.bos_ids = (self._control.ids[bos],)
                return
        raise self._refusal(
            "it does not write a user's message" + "".join(f"; {r}" for r in reasons)
        )

    def _learn_plain_reply(self) -> None:
        prompt, _ = self._written([_user()], prompt=True)
        silent, _ = self._written([_user()])
        whole, talk = self._written([_user(), _reply()])
        marks = mark_spans(whole)
        if len(marks) != 2:
            raise self._refusal("it does not write the assistant's reply once")
        stop = self._control.pattern.search(whole, marks[1].end)
        if stop is None:
            raise self._refusal(
                "no token ends a reply, so training could not teach the model to stop"
            )
        self._add_stop(self._control.id_of(stop))
        reply = self._writer.reply(talk, 1)
        if reply.problem is not None:
            raise self._refusal(reply.problem)
        before = whole[len(prompt) : marks[1].start]
        last = max((m.end() for m in self._control.pattern.finditer(prompt)), default=0)
        self._encoder.replies_follow_text = last < len(prompt)
        if prompt == silent and before.strip():
            raise self._refusal(
                f"it has no generation prompt, and writes {before!r} before a reply, which would "
                "have to be sampled"
            )
        if before and not before.strip("\n"):
            self._facts.grammar = Grammar(stop=self._facts.stops, newlines_at_start=len(before))

    def _add_stop(self, token: int) -> None:
        facts = self._facts
        facts.stops |= {token}
        eos = getattr(self._tokenizer, "eos_token_id", None)
        others = {eos} - facts.stops - {None}
        facts.grammar = Grammar(
            stop=facts.stops,
            eos=frozenset(others),  # pyright: ignore[reportArgumentType]
            newlines_at_start=facts.grammar.newlines_at_start,
        )

    def _learn_calls(self) -> None:
        facts = self._facts
        for way in ("text", "object"):
            facts.arguments = way
            try:
                whole, talk = self._written([_user(), _call()])
            except RendererError:
                continue
            marks = [m for m in mark_spans(whole) if talk.values[m.value].message == 1]
            is_plain = way == "object" or (len(marks) == 1 and marks[0].quotes == 0)
            named = fill(whole, talk.values)
            if marks and is_plain and _CALL_NAME in named and "probe_key" in named:
                self._learn_call_format(whole, talk, marks[-1].end)
                return
        facts.arguments = "none"

    def _learn_call_format(self, whole: str, talk: Conversation, after: int) -> None:
        facts, control = self._facts, self._control
        rest = list(control.pattern.finditer(whole, after))
        stops = [m for m in rest if control.id_of(m) in facts.stops] or rest[-1:]
        if not stops:
            facts.arguments = "none"
            return
        self._add_stop(control.id_of(stops[0]))
        prompt = self._writer.written(talk, 1, prompt=True)
        written = fill(whole[len(prompt) : stops[0].start()], talk.values)
        name_at = written.find(_CALL_NAME)
        markers = list(control.pattern.finditer(written))
        opened = [m for m in markers if m.end() <= name_at][-1:]
        closed = [m for m in markers if m.start() > name_at][:1]
        if opened and closed:
            body = written[opened[0].end() : closed[0].start()]
            self._accept_call(body, "arguments", opened[0], closed[0])
        elif not markers:
            self._accept_call(written, "parameters", None, None)

    def _accept_call(
        self,
        body: str,
        key: str,
        opened: re.Match[str] | None,
        closed: re.Match[str] | None,
    ) -> None:
        facts, control = self._facts, self._control
        old = facts.grammar
        is_json = body.strip().startswith('{"name":') and _reads_back(
            parse_call_json(body, body, arguments_key=key), _ARGUMENTS
        )
        if opened is None or closed is None:
            facts.parses_calls = is_json
            if is_json:
                whole = WholeCalls(partial(read_whole_reply, keys=(key,), is_exact=True))
                facts.grammar = Grammar(stop=old.stop, eos=old.eos, whole_calls=whole)
            return
        parse_call: CallParser = parse_json_call
        if not is_json:
            facts.xml_words = self._xml_words(opened.group(), closed.group())
            if facts.xml_words is None:
                return
            parse_call = partial(parse_xml_call, words=facts.xml_words)
        facts.parses_calls = True
        pair = (control.id_of(opened), control.id_of(closed))
        added = self._tokenizer.added_tokens_decoder
        facts.call_markers = ControlTokens({token: added[token] for token in pair})
        facts.grammar = replace(
            old,
            call=pair,
            parse_call=parse_call,
            newlines_before_call=self._newlines_before_call(opened.group()),
        )

    def _xml_words(self, opened: str, closed: str) -> Mapping[str, str] | None:
        """Return how truth values are written in calls as in notations/xml.py, None for other
        notations.

        Every probe must be read back unchanged, so templates that write values differently are
        excluded.
        """
        bodies = []
        for arguments in (_ARGUMENTS, _TYPED_ARGUMENTS):
            try:
                whole, talk = self._written([_user(), _call(arguments=arguments)])
            except TemplateError:
                return None
            written = fill(whole, talk.values).rpartition(opened)[2].partition(closed)[0]
            bodies.append((written, arguments))
        for words in ({}, PYTHON_WORDS):
            read = (parse_xml_call([body], body, words) for body, _ in bodies)
            if all(_reads_back(call, a) for (call,), (_, a) in zip(read, bodies, strict=True)):
                return words
        return None

    def _newlines_before_call(self, opened: str) -> int:
        """Return the number of newlines that the template writes between text and call."""
        try:
            whole, talk = self._written([_user(), _call("Probe answer.")])
        except TemplateError:
            return 1
        before = fill(whole, talk.values).rpartition(opened)[0].rpartition("Probe answer.")[2]
        return 1 if before.strip("\n") else len(before)

    def _learn_thinking(self) -> None:
        facts, control = self._facts, self._control
        reply = _reply(reasoning_content="Probe reasoning.")
        try:
            whole, talk = self._written([_user(), reply])
            prompt, _ = self._written([_user()], prompt=True)
            header, _ = self._written([_user()])
        except TemplateError:
            return
        kinds = {talk.values[m.value].text: m for m in mark_spans(whole)}
        thought, answer = kinds.get("Probe reasoning."), kinds.get("Probe answer.")
        if thought is None and answer is not None:
            self._learn_empty_block(prompt, whole[len(prompt) : answer.start])
        if thought is None or answer is None or thought.start > answer.start:
            return
        if self._writer.reply(talk, 1).problem is not None:
            return
        facts.has_thinking = True
        before = list(control.pattern.finditer(whole[: thought.start]))
        after = control.pattern.search(whole[: answer.start], thought.end)
        if not before or after is None or control.id_of(after) in facts.stops:
            return
        opening = control.id_of(before[-1])
        if opening in map(control.id_of, control.pattern.finditer(header)):
            return
        facts.grammar = replace(
            facts.grammar,
            think=(opening, control.id_of(after)),
            starts_in_thinking=before[-1].start() < len(prompt),
        )
        self._learn_label(whole[before[-1].end() : thought.start], opening)
        if facts.thought_label:
            gaps = (whole[thought.end : after.start()], whole[after.end() : answer.start])
            self._set_newlines("", *gaps)

    def _learn_empty_block(self, prompt: str, before: str) -> None:
        """Use the only two tokens before an answer as reasoning markers, if reasoning is not
        written.

        The prompt may end with the first one if its name says that the second one closes it.
        """
        pattern = self._control.pattern
        found = list(pattern.finditer(before))
        if pattern.sub("", before).strip():
            return
        opened = list(pattern.finditer(prompt))[-1:]
        is_open = (
            len(found) == len(opened) == 1
            and not prompt[opened[0].end() :].strip()
            and found[0].group() == opened[0].group().replace("<", "</", 1)
        )
        if not is_open and len(found) != 2:
            return
        opening, closing = map(self._control.id_of, [*opened, *found] if is_open else found)
        grammar = self._facts.grammar
        self._facts.grammar = replace(grammar, think=(opening, closing), starts_in_thinking=is_open)
        self._set_newlines("", "", before[found[-1].end() :])

    def _set_newlines(self, *gaps: str) -> None:
        """Record the newlines around reasoning; other text there counts as no newline."""
        first, second, third = (0 if gap.strip("\n") else len(gap) for gap in gaps)
        grammar = self._facts.grammar
        self._facts.grammar = replace(grammar, think_newlines=(first, second, third))

    def _learn_label(self, between: str, opening: int) -> None:
        """Record text before the reasoning, and whether the prompt after a result writes it."""
        facts = self._facts
        if not between.strip():
            return
        facts.thought_label = between
        try:
            prompt, _ = self._written([_user(), _call(), _result()], prompt=True)
        except RendererError:
            return
        last = list(self._control.pattern.finditer(prompt))[-1:]
        facts.may_open_thinking = [self._control.id_of(match) for match in last] == [opening]

    def _learn_headers(self) -> None:
        """Recognize gpt-oss's format, in which a reply is several messages, by an answer's
        header."""
        facts, ids = self._facts, self._control.ids
        if not all(mark in ids for mark in HARMONY_MARKS):
            return
        prompt, _ = self._written([_user()], prompt=True)
        whole, talk = self._written([_user(), _reply()])
        header = "<|channel|>final<|message|>Probe answer."
        facts.is_harmony = fill(whole[len(prompt) :], talk.values).startswith(header)
        facts.parses_calls = facts.parses_calls or facts.is_harmony

    def _learn_tools_and_roles(self) -> None:
        facts = self._facts
        facts.has_tools = True
        system = Message(role="system", content="", tools=[_TOOL])
        try:
            written, talk = self._written([system, _user()], prompt=True)
            facts.has_tools = _CALL_NAME in fill(written, talk.values)
        except TemplateError:
            facts.has_tools = False
        roles = ["user", "assistant"]
        for role in ("system", "developer"):
            if self._is_written([Message(role=role, content="Probe rule."), _user()], 0):
                roles.append(role)
        called = [_user(), _call()] if facts.arguments != "none" else [_user(), _reply()]
        if self._is_written([*called, _result()], len(called)):
            roles.append("tool")
        facts.roles = tuple(roles)

    def _is_written(self, messages: list[Message], index: int) -> bool:
        try:
            written, talk = self._written(messages)
        except RendererError:
            return False
        return any(talk.values[m.value].message == index for m in mark_spans(written))

    def _talks(self) -> list[list[Message]]:
        facts = self._facts
        talks = [[_user(), _reply(), _user(), _reply()]]
        if facts.has_thinking:
            thought = _reply(reasoning_content="Probe reasoning.")
            talks.append([_user(), thought, _user(), thought])
        if facts.arguments != "none" and "tool" in facts.roles:
            talks.append([_user(), _call(), _result(), _reply(), _user(), _reply()])
        return talks

    def _extends(self, talk: list[Message]) -> bool:
        replies = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        try:
            return self._writer.rewritten_turn(talk, replies) is None
        except RendererError:
            return False

    def _check_tokens(self) -> None:
        """Refuse tokenizers that encode text between control tokens differently than alone."""
        writer = self._writer
        first, second = "Hello, wörld!  12\n3 日本", " Fine.\n\n\tOk 👍 don't "
        talk = writer.conversation([_user(first), _reply(second), _user("x"), _reply("\ny")])
        written = writer.written(talk, 4, prompt=False)
        atoms = build_atoms(
            written,
            talk.values,
            self._control,
            replies={},
            cuts=frozenset(),
            stops=self._facts.stops,
        )
        ours = self._encoded(atoms, talk)
        text = fill(written, talk.values)
        theirs = self._tokenizer.encode(text, add_special_tokens=False)
        if ours != theirs:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0
            )
            raise self._refusal(
                "the tokenizer encodes text next to control tokens in another way: "
                f"{theirs[place : place + 6]}, expected {ours[place : place + 6]}"
            )
        decode = self._encoder.decode
        apart = decode(self._encoded(writer.plan(talk, prompt=False).atoms, talk))
        if apart != decode(theirs):
            raise self._refusal(
                "the tokenizer encodes a reply by itself in another way than after its prompt: "
                f"the text becomes {apart!r}, expected {decode(theirs)!r}"
            )

    def _encoded(self, atoms: Sequence[Atom], talk: Conversation) -> list[int]:
        layout = Layout()
        lay_out_atoms(layout, atoms, talk.values, self._facts.call_markers)
        return encode_layouts([layout], self._encoder)[0].tokens()

    def _refusal(self, reason: str) -> RendererError:
        name = getattr(self._tokenizer, "name_or_path", "") or "this tokenizer"
        return RendererError(
            f"the chat template of {name!r} cannot be rendered with exact masks: {reason}. Use a "
            "renderer made for the model, or give HFTemplateRenderer another chat_template."
        )


def _reads_back(call: object, arguments: str) -> bool:
    """Whether a probe's call was read back unchanged."""
    return (
        isinstance(call, ToolCall)
        and call.function.name == _CALL_NAME
        and json.loads(call.function.arguments) == json.loads(arguments)
    )
