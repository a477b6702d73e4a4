"""Writing and reading tool calls in DeepSeek V4's notation. Here `‖` is the token `｜DSML｜`:

    <‖tool_calls>
    <‖invoke name="get_weather">
    <‖parameter name="city" string="true">Zürich</‖parameter>
    <‖parameter name="days" string="false">2</‖parameter>
    </‖invoke>
    </‖tool_calls>

Strings are bare, all other values are JSON, and each argument says which it is. A call without
arguments has an empty line instead. The token cannot be typed, so a string may contain anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from enum import Enum, auto

from tinker_cookbook.renderers.content import UNTERMINATED_TOOL_BLOCK_ERROR
from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.notations.marked import texts_between_marks
from tinker_cookbook.renderers.parsing import TokenParser
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments, json_text, member_texts
from tinker_cookbook.renderers.types import CallLike, MessageDelta, ToolCall, UnparsedToolCall

__all__ = ["DSML", "DsmlParser", "calls_text", "parse_calls"]

DSML = "｜DSML｜"
_OPENING = f"\n\n<{DSML}tool_calls>\n"
_CLOSING = f"</{DSML}tool_calls>"


def calls_text(calls: Sequence[CallLike], unparsed: Sequence[UnparsedToolCall]) -> list[str]:
    """Return the block of calls as texts to be joined by the token; no texts without calls.

    Args:
        calls: the calls; numbers, lists and objects in arguments given as JSON text are not
            changed.
        unparsed: the rest of a block that could not be parsed, up to its end.
    """
    if not calls and not unparsed:
        return []
    pieces = ["\n\n<", "tool_calls>\n"] if calls or not _opens(unparsed[0]) else ["\n\n"]
    for call in calls:
        _append(pieces, _call_texts(call))
    for broken in unparsed:
        _append(pieces, broken.raw_text.split(DSML))
    if not unparsed:
        _append(pieces, _CLOSING.split(DSML))
    return pieces


def _opens(unparsed: UnparsedToolCall) -> bool:
    return unparsed.raw_text.startswith(_OPENING.strip())


def _append(pieces: list[str], texts: Sequence[str]) -> None:
    pieces[-1] += texts[0]
    pieces += texts[1:]


def _call_texts(call: CallLike) -> list[str]:
    name, arguments = call_name_and_arguments(call)
    texts = ["<", f'invoke name="{name}">\n']
    members = member_texts(arguments)
    for key, source in members:
        is_text = source.startswith('"')
        value = json.loads(source) if is_text else source
        flag = "true" if is_text else "false"
        texts[-1] += "<"
        texts += [f'parameter name="{key}" string="{flag}">{value}</', "parameter>\n"]
    texts[-1] += "</" if members else "\n</"
    return [*texts, "invoke>\n"]


_INVOKE = re.compile(r'invoke name="([^\n]+?)">\n(<|\n</)')
_PARAMETER = re.compile(r'parameter name="(.*?)" string="(true|false)">(.*)</', re.DOTALL)


class _NotACall(Exception):
    """What is wrong with a block of calls."""


def parse_calls(
    texts: Sequence[str], *, is_cut: bool
) -> tuple[list[ToolCall | UnparsedToolCall], str]:
    """Parse a block of calls up to the first text in it that is not a call.

    Args:
        texts: the texts between the tokens of the block; the first one precedes its first token.
        is_cut: whether the reply broke off.

    Returns:
        The calls, then the rest with the reason if something is not a call; and the text after the
        block.
    """
    calls: list[ToolCall | UnparsedToolCall] = []
    position, opening = 1, "<"
    try:
        _expect(texts, 1, "tool_calls>\n<")
        place = 2
        while True:
            call, end = _parse_call(texts, place)
            opening = _either(texts, end, "invoke>\n<", "invoke>\n</")
            calls.append(call)
            position = place = end + 1
            if opening == "</":
                break
        tail = _text_at(texts, place)
        if not tail.startswith("tool_calls>"):
            raise _NotACall("the block of calls is not closed")
        return calls, DSML.join([tail.removeprefix("tool_calls>"), *texts[place + 1 :]])
    except _NotACall as problem:
        raw_text = DSML.join([opening, *texts[position:]])
        error = UNTERMINATED_TOOL_BLOCK_ERROR if is_cut else str(problem)
        return [*calls, UnparsedToolCall(raw_text=raw_text, error=error)], ""


def _parse_call(texts: Sequence[str], place: int) -> tuple[ToolCall, int]:
    """Return the call that starts in a text, and the index of the text that closes it."""
    found = _INVOKE.fullmatch(_text_at(texts, place))
    if found is None:
        raise _NotACall(f'expected invoke name="NAME">, found {_text_at(texts, place)[:60]!r}')
    name, follows = found.groups()
    members: dict[str, str] = {}
    while follows == "<":
        key, source = _parse_parameter(_text_at(texts, place + 1))
        if key in members:
            raise _NotACall(f"parameter {key!r} is given twice")
        members[key] = source
        follows = _either(texts, place + 2, "parameter>\n<", "parameter>\n</")
        place += 2
    arguments = ", ".join(f"{json_text(key)}: {source}" for key, source in members.items())
    body = ToolCall.FunctionBody(name=name, arguments=f"{{{arguments}}}")
    return ToolCall(function=body), place + 1


def _parse_parameter(text: str) -> tuple[str, str]:
    """Return name and value, as JSON text, of one argument."""
    found = _PARAMETER.fullmatch(text)
    if found is None:
        raise _NotACall(f'expected parameter name="NAME" string="true|false">, found {text[:60]!r}')
    key, is_text, value = found.groups()
    if is_text == "true":
        return key, json_text(value)
    try:
        parsed = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _NotACall(f"the value of {key!r} is not valid JSON: {error}") from error
    if isinstance(parsed, str) or value != value.strip():
        raise _NotACall(f'the value of {key!r} is not written as JSON; strings have string="true"')
    return key, value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _text_at(texts: Sequence[str], place: int) -> str:
    if place >= len(texts):
        raise _NotACall("the block of calls is not closed")
    return texts[place]


def _expect(texts: Sequence[str], place: int, text: str) -> None:
    if _text_at(texts, place) != text:
        raise _NotACall(f"expected {text!r}, found {texts[place][:60]!r}")


def _either(texts: Sequence[str], place: int, one: str, other: str) -> str:
    """Return what follows the line break at the start of this text."""
    if _text_at(texts, place) not in (one, other):
        raise _NotACall(f"expected {one!r} or {other!r}, found {texts[place][:60]!r}")
    return texts[place].rpartition("\n")[2]


class _State(Enum):
    TEXT = auto()
    THINK = auto()
    CALLS = auto()


# What may be the start of a block of calls, of which the token comes next.
_MAY_OPEN = re.compile(r"\n{0,2}<\Z|\n{1,2}\Z")


class DsmlParser(TokenParser):
    """Parses a reply of DeepSeek V4."""

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        stop: int,
        dsml: int,
        think: tuple[int, int] | None,
        starts_in_thinking: bool,
    ) -> None:
        """Prepare for a reply.

        Args:
            encoder: of the renderer.
            stop: ends a reply.
            dsml: the token within the markers of calls.
            think: opens and closes reasoning; None if the format has none.
            starts_in_thinking: the prompt has opened it.
        """
        super().__init__(encoder, control=(stop, dsml, *(think or ())), ends=(stop,))
        self._stop, self._dsml = stop, dsml
        self._think_open, self._think_close = think or (None, None)
        self._state = _State.THINK if starts_in_thinking else _State.TEXT
        self._held = ""
        self._parts: list[str | int] = []

    def _text(self, text: str) -> Iterator[MessageDelta]:
        if self._state is _State.CALLS:
            self._parts.append(text)
        elif self._state is _State.THINK:
            yield from self._builder.thinking(text)
        else:
            held = self._held + text
            start = _MAY_OPEN.search(held)
            end = len(held) if start is None else start.start()
            self._held = held[end:]
            yield from self._builder.text(held[:end])

    def _control_token(self, token: int) -> Iterator[MessageDelta]:
        if token == self._stop:
            yield from self._close(is_cut=False)
            self._end(is_eos=False)
        elif token == self._dsml and self._state is _State.CALLS:
            self._parts.append(token)
        elif token == self._dsml and self._state is _State.TEXT and self._held.endswith("<"):
            self._state, self._held = _State.CALLS, ""
            self._parts = [token]
        elif token == self._think_close and self._state is _State.THINK:
            self._state = _State.TEXT
        elif token == self._think_open and self._state is _State.TEXT:
            yield from self._release()
            self._state = _State.THINK
        else:
            yield from self._text(self._encoder.decode([token]))

    def _cut(self) -> Iterator[MessageDelta]:
        return self._close(is_cut=True)

    def _close(self, *, is_cut: bool) -> Iterator[MessageDelta]:
        if self._state is not _State.CALLS:
            yield from self._release()
            return
        calls, after = parse_calls(texts_between_marks(self._parts), is_cut=is_cut)
        for call in calls:
            self._builder.call(call)
        if after.strip():
            yield from self._builder.text(after)

    def _release(self) -> Iterator[MessageDelta]:
        held, self._held = self._held, ""
        yield from self._builder.text(held)
