"""Reading replies of any open model: all marks in use, with calls in any notation.

For readers that do not know the format, or do not have to render the reply to the same tokens
again: the local service's endpoint, and text from datasets. Line breaks around marks do not count,
and calls that cannot be read are text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinker_cookbook.replies.grammar import (
    CallParser,
    Grammar,
    TextMark,
    Tolerance,
    WholeCalls,
)
from tinker_cookbook.replies.json_calls import build_call, read_json_calls, read_whole_reply
from tinker_cookbook.replies.json_source import JsonSchema, ends_in_string
from tinker_cookbook.replies.pair_calls import PAIR_MARKS, read_pair_text
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall
from tinker_cookbook.replies.schema import fit_arguments, parameters_of, read_texts
from tinker_cookbook.replies.tag_calls import PYTHON_WORDS, read_tag_calls, tags_are_open

__all__ = [
    "CALL",
    "END_CALL",
    "END_THINK",
    "INNER_MARKS",
    "MARKS",
    "MISTRAL_CALLS",
    "THINK",
    "call_is_open",
    "loose_grammar",
    "read_calls",
    "read_whole",
]

THINK, END_THINK = TextMark("<think>"), TextMark("</think>")
CALL, END_CALL = TextMark("<tool_call>"), TextMark("</tool_call>")
MISTRAL_CALLS = TextMark("[TOOL_CALLS]")
PYTHON_TAG = TextMark("<|python_tag|>")
MARKS = (THINK, END_THINK, CALL, END_CALL, MISTRAL_CALLS, PYTHON_TAG)
"""Texts that structure a reply; vocabularies have tokens for some of them."""
_MISTRAL_ID, _MISTRAL_ARGUMENTS = "[CALL_ID]", "[ARGS]"
INNER_MARKS = (_MISTRAL_ID, _MISTRAL_ARGUMENTS, *PAIR_MARKS)
"""Marks inside a call; they are read from its text."""

_ARGUMENT_KEYS = ("arguments", "parameters")
_ANY_NUMBER = 2**31


def loose_grammar(
    *,
    starts_in_thinking: bool = False,
    parse_call: CallParser | None = None,
    parse_whole: Callable[[str], Sequence[object] | None] | None = None,
) -> Grammar:
    """Return a grammar of all marks, as texts.

    Args:
        starts_in_thinking: the prompt has opened the reasoning.
        parse_call: reads the text between the marks of a call; without it, calls are text.
        parse_whole: reads a reply that may consist of calls without marks; without it, that is
            text.
    """
    reads_calls = parse_call is not None
    any_if_calls = _ANY_NUMBER if reads_calls else 0
    return Grammar(
        think=(THINK, END_THINK),
        starts_in_thinking=starts_in_thinking,
        call=(CALL, END_CALL) if reads_calls else None,
        parse_call=parse_call or (lambda parts, raw_text: []),
        think_newlines=(_ANY_NUMBER, _ANY_NUMBER, _ANY_NUMBER),
        newlines_before_call=any_if_calls,
        calls_on_lines=True,
        newlines_after_call=any_if_calls,
        newlines_at_start=_ANY_NUMBER if starts_in_thinking else 0,
        whole_calls=WholeCalls(parse_whole, ("{",), PYTHON_TAG) if parse_whole else None,
        tolerance=Tolerance(
            thinks_first=True,
            bad_calls_are_text=True,
            other_calls=((MISTRAL_CALLS, None),) if reads_calls else (),
            unclosed_calls_count=True,
            call_is_open=call_is_open,
        ),
    )


def read_calls(body: str, raw_text: str, tools: Sequence[JsonSchema] = ()) -> Sequence[ReadCall]:
    """Read the text between the marks of a call, in any notation: all of it or nothing.

    Args:
        body: the text between the marks.
        raw_text: the whole, with its marks.
        tools: declarations; they give the arguments their types in notations without types.
    """
    start = body.lstrip()
    if raw_text.startswith(MISTRAL_CALLS):
        return _read_mistral(body, raw_text)
    if start.startswith(("{", "[")):
        return _read_json(body, raw_text)
    if start.startswith("<function="):
        calls = read_tag_calls(body, raw_text, PYTHON_WORDS, is_strict=False)
        return [_typed(call, tools, PYTHON_WORDS) for call in calls]
    names = {tool.get("function", tool).get("name") for tool in tools}
    if PAIR_MARKS[0] not in body and body.strip() not in names:
        return [BadCall(raw_text, "a word alone is a call of a declared tool only")]
    return [_typed(read_pair_text(body, raw_text), tools, {})]


def read_whole(text: str) -> list[Call] | None:
    """Read a reply that consists of calls in JSON."""
    return read_whole_reply(text, keys=_ARGUMENT_KEYS, may_hold_more=True)


def call_is_open(body: str) -> bool:
    """Whether an unfinished call ends inside a value, in any notation."""
    if body.lstrip().startswith("<function="):
        return tags_are_open(body)
    last_value, last_end = (body.rfind(mark) for mark in PAIR_MARKS[2:])
    return last_value > last_end if last_value >= 0 else ends_in_string(body)


def _typed(call: ReadCall, tools: Sequence[JsonSchema], words: Mapping[str, str]) -> ReadCall:
    """Return a call in a notation without types, with the types that its tool declares.

    Args:
        words: how the notation writes truth values and null.
    """
    if isinstance(call, BadCall):
        return call
    parameters = parameters_of(tools, call.name)
    fitted = fit_arguments(call.arguments, parameters, words)
    return Call(call.name, read_texts(fitted, parameters, PYTHON_WORDS))


def _read_json(body: str, raw_text: str) -> Sequence[ReadCall]:
    return read_json_calls(body, raw_text, keys=_ARGUMENT_KEYS, may_hold_more=True)


def _read_mistral(body: str, raw_text: str) -> Sequence[ReadCall]:
    """Read a list of calls in JSON, or a name, an optional id, and arguments."""
    name, found, arguments = body.partition(_MISTRAL_ARGUMENTS)
    if not found:
        return _read_json(body, raw_text)
    return [build_call(name.partition(_MISTRAL_ID)[0].strip(), arguments.strip(), raw_text)]
