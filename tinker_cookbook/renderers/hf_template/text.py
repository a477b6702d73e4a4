"""Running a chat template so that typed text can be distinguished from the template's own text.

Every typed text is replaced by a mark (its outer white space stays, because templates trim), the
template runs on the marks, and the texts are inserted afterwards. So the content of a message
cannot affect the template, and the origin of each character of the result is known.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.layout import SegmentKind
from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "Conversation",
    "Masker",
    "TemplateError",
    "TemplateRunner",
    "Value",
    "fill",
    "mark_spans",
]

# U+0001 and U+0002 are escaped by JSON, so a mark also tells how often its text is quoted.
_MARK = re.compile(r"(?P<quotes>\\{0,2})(?:\x01|u0001)(?P<number>\d+)(?P=quotes)(?:\x02|u0002)")
_MAX_CACHED = 2048


class TemplateError(RendererError):
    """The template itself raised."""


class Value(NamedTuple):
    """A typed text that a mark replaces."""

    text: str
    """Without its outer white space."""
    before: str
    """White space before the mark; `after` is the white space after it."""
    after: str
    message: int
    """-1 for tool declarations."""
    kind: SegmentKind
    is_markup: bool = False
    """Whether this is a call that could not be parsed, whose markers become tokens."""


class Conversation(NamedTuple):
    """A conversation in the form that the template takes: as typed and with marks."""

    plain: list[JsonObject]
    masked: list[JsonObject]
    tools: list[JsonObject] | None
    masked_tools: list[JsonObject] | None
    values: list[Value]
    offset: int
    """1 if the first message only declares tools and is not written, else 0."""


class Masker:
    """Replaces texts by marks, numbered in order."""

    def __init__(self, control: re.Pattern[str]) -> None:
        self._control = control
        self.values: list[Value] = []

    def text(self, text: str, message: int, kind: SegmentKind, *, is_markup: bool = False) -> str:
        """Return the text's mark between its outer white space; white space alone is not masked."""
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        before, after = text[:start], text[start + len(core) :]
        number = len(self.values)
        self.values.append(Value(core, before, after, message, kind, is_markup))
        return f"{before}\x01{number}\x02{after}"

    def name(self, text: str, message: int) -> str:
        """Mask like `text`, except a plain word, which templates may compare."""
        if _PLAIN.fullmatch(text) and not self._control.search(text):
            return text
        return self.text(text, message, SegmentKind.TOOL)

    def data(self, value: Any, message: int, *, keep_names: bool) -> Any:
        """Replace all strings in a JSON value; keys that are plain words stay."""
        if isinstance(value, str):
            if keep_names:
                return self.name(value, message)
            return self.text(value, message, SegmentKind.TOOL)
        if isinstance(value, Mapping):
            return {
                self.name(str(key), message): self.data(item, message, keep_names=keep_names)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.data(item, message, keep_names=keep_names) for item in value]
        return value


_PLAIN = re.compile(r"[A-Za-z0-9_ .:\-]*")


class Mark(NamedTuple):
    """The place of a mark in the output of the template."""

    start: int
    end: int
    value: int
    quotes: int
    """How often JSON quotes the text: 0 plain, 1 in a JSON string, 2 in JSON within JSON."""


def mark_spans(text: str) -> list[Mark]:
    """Return the marks in a text, in order."""
    return [
        Mark(match.start(), match.end(), int(match["number"]), len(match["quotes"]))
        for match in _MARK.finditer(text)
    ]


def quoted(text: str, times: int) -> str:
    """Return a text as it is written inside JSON strings."""
    for _ in range(times):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def fill(text: str, values: Sequence[Value]) -> str:
    """Replace the marks by their texts."""
    return _MARK.sub(lambda m: quoted(values[int(m["number"])].text, len(m["quotes"])), text)


class TemplateRunner:
    """Runs one tokenizer's chat template; caches its output by the shape of the conversation."""

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, object]) -> None:
        self._tokenizer: Any = tokenizer  # its stubs do not know what templates take
        self._options = dict(options)
        self._written: dict[str, str | TemplateError] = {}
        self._lock = threading.Lock()

    def run(
        self, messages: list[JsonObject], tools: list[JsonObject] | None, *, prompt: bool
    ) -> str:
        """Return what the template writes.

        Raises:
            TemplateError: if the template refuses the conversation.
        """
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._options,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateError(
                f"the chat template refuses this conversation: {error}. Change the conversation, "
                "or give the renderer another chat_template."
            ) from error

    def run_cached(
        self, messages: list[JsonObject], tools: list[JsonObject] | None, *, prompt: bool
    ) -> str:
        """Run the template, or return the cached output for a conversation of the same shape."""
        key = json.dumps([messages, tools, prompt])
        found = self._written.get(key)
        if found is None:
            try:
                found = self.run(messages, tools, prompt=prompt)
            except TemplateError as error:
                found = error
            self._remember(key, found)
        if isinstance(found, TemplateError):
            raise TemplateError(*found.args)
        return found

    def _remember(self, key: str, written: str | TemplateError) -> None:
        with self._lock:
            if len(self._written) >= _MAX_CACHED:
                self._written.clear()
            self._written[key] = written

    def forget(self) -> None:
        """Clear the cache: templates may write the date."""
        with self._lock:
            self._written.clear()

    def tagged(
        self, messages: list[JsonObject], tools: list[JsonObject] | None
    ) -> list[tuple[int, int]]:
        """Return [start, end) of each `{% generation %}` block."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tokenizer = self._tokenizer
        template: Any = self._options.get("chat_template") or tokenizer.get_chat_template(
            tools=tools
        )
        options = {k: v for k, v in self._options.items() if k != "chat_template"}
        with self._lock:  # all calls share the environment that collects the blocks
            _, spans = render_jinja_template(  # pyright: ignore[reportAssignmentType]
                conversations=[messages],  # pyright: ignore[reportArgumentType]
                tools=tools,  # pyright: ignore[reportArgumentType]
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **options},
            )
        return [(int(start), int(end)) for start, end in spans[0]]
