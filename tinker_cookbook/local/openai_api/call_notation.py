"""How a model's chat template writes a tool call, found by rendering one.

A forced call is constrained to the notation that the model was trained on. If the template does not
write tools, or writes arguments not as JSON, the call is a JSON object with `name` and `arguments`,
which the reader of replies understands for every model.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.chat_template import ChatTemplate
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.reply import ReplyReader
from tinker_cookbook.local.openai_api.reply_shape import ReplyShape, parameters_of, tool_name
from tinker_cookbook.local.openai_api.structured import json_term, literal_term, token_term
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.replies.loose import END_THINK

__all__ = ["PLAIN_NOTATION", "CallNotation", "find_notation", "grammar_of"]

_NAME, _KEY, _VALUE = "probe_5081724", "key_8203", "value_9917"
_TOOL: JsonObject = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}
_ARGUMENTS = re.compile(r'\{\s*"' + _KEY + r'"\s*:\s*"' + _VALUE + r'"\s*\}')


@dataclass(frozen=True)
class CallNotation:
    """The texts around the name and the arguments of a call."""

    before: str
    between: str
    after: str
    is_marked: bool = True
    """Whether marks tell a call from other JSON."""

    def fit(self, *, after_thinking: bool, end_names: Collection[str]) -> CallNotation:
        """Return what remains to be written.

        Args:
            after_thinking: whether a reasoning block was written before.
            end_names: tokens that end the reply; the sampler draws them after the call.
        """
        before, after = self.before, self.after
        if after_thinking:
            before = before.rpartition(END_THINK)[2]
        for name in end_names:
            after = after.removesuffix(name)
        return replace(self, before=before, after=after)


PLAIN_NOTATION = CallNotation('{"name": "', '", "arguments": ', "}", is_marked=False)


_known: weakref.WeakKeyDictionary[ChatTemplate, CallNotation] = weakref.WeakKeyDictionary()


def find_notation(codec: TextCodec, template: ChatTemplate) -> CallNotation:
    """Return the notation of a template, or the plain one if it cannot be found."""
    known = _known.get(template)
    if known is None:
        known = _known[template] = _find(codec, template)
    return known


def _find(codec: TextCodec, template: ChatTemplate) -> CallNotation:
    asked: list[JsonObject] = [{"role": "user", "content": "hello"}]
    call = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    answered: JsonObject = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_00000", "type": "function", "function": call}],
    }
    try:
        start = template.reveal(template.render(asked, tools=[_TOOL]))
        whole = template.reveal(
            template.render([*asked, answered], tools=[_TOOL], add_generation_prompt=False)
        )
    except UserError:
        return PLAIN_NOTATION
    if not whole.startswith(start):
        return PLAIN_NOTATION
    found = _split(_without_end(whole[len(start) :], codec, template))
    return found if found is not None and _is_readable(found, codec) else PLAIN_NOTATION


def grammar_of(
    shape: ReplyShape,
    tools: Sequence[Mapping[str, object]],
    notation: CallNotation,
    control_ids: Mapping[str, int],
) -> str:
    """Return the grammar of the replies that have a shape.

    Args:
        shape: what the reply must be.
        tools: the tools that may be called.
        notation: how calls are written.
        control_ids: names of control tokens -> their ids.

    Raises:
        UserError: JSON and calls cannot be told apart in this notation.
    """
    choices = []
    if shape.schema is not None and not shape.must_call:
        choices.append(json_term(shape.schema))
        if tools and not notation.is_marked:
            raise UserError(
                "response_format cannot be combined with optional tools for this model, whose chat "
                "format has no marks for calls; set tool_choice to 'none' or 'required'"
            )
    for tool in tools:
        choices.append(_call_term(tool, notation, control_ids))
    return (
        "start: "
        + " | ".join(f"c{at}" for at in range(len(choices)))
        + "".join(f"\nc{at}: {choice}" for at, choice in enumerate(choices))
    )


def _call_term(
    tool: Mapping[str, object], notation: CallNotation, control_ids: Mapping[str, int]
) -> str:
    head = notation.before + tool_name(tool) + notation.between
    terms = _literal_terms(head, control_ids)
    terms.append(json_term(parameters_of(tool)))
    terms += _literal_terms(notation.after, control_ids)
    return " ".join(terms)


def _literal_terms(text: str, control_ids: Mapping[str, int]) -> list[str]:
    names = sorted(control_ids, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [
        token_term(control_ids[part]) if part in control_ids else literal_term(part)
        for part in parts
        if part
    ]


def _without_end(text: str, codec: TextCodec, template: ChatTemplate) -> str:
    """Return a rendered reply without what the template writes after it."""
    ends = [name for name, i in codec.control_ids.items() if i in template.turn_end_ids]
    for name in ends:
        text = text.partition(name)[0] if name in text else text
    return text


def _split(text: str) -> CallNotation | None:
    arguments = _ARGUMENTS.search(text)
    if text.count(_NAME) != 1 or arguments is None:
        return None
    name = text.index(_NAME)
    if name > arguments.start():
        return None
    between = text[name + len(_NAME) : arguments.start()]
    return CallNotation(text[:name], between, text[arguments.end() :].rstrip("\n"))


def _is_readable(notation: CallNotation, codec: TextCodec) -> bool:
    """Return whether the reader of replies finds the call."""
    marks = codec.mark_texts
    reader = ReplyReader(starts_in_thinking=False, tools=[_TOOL], token_marks=marks.values())
    arguments = json.dumps({_KEY: _VALUE})
    text = f"{notation.before}{_NAME}{notation.between}{arguments}{notation.after}"
    names = sorted(marks.values(), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    pieces = []
    for part in parts:
        if part:
            pieces += reader.mark(part) if part in names else reader.push(part)
    pieces += reader.finish()
    calls = [piece.call for piece in pieces if piece.kind == "tool_call"]
    shown = [call["function"] for call in calls]
    return len(pieces) == len(calls) == 1 and shown == [{"name": _NAME, "arguments": arguments}]
