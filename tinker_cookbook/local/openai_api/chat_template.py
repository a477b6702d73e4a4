"""A model's own chat template, rendered so that no text of a message can become a control token.

The template comes with the model and may write control tokens. The messages that it renders may
not. Before rendering, a marker is put inside every name of a control token in a message. After
rendering, names without a marker can only come from the template. They are replaced by secret
names, the markers are removed, and a tokenizer that knows only the secret names encodes the whole
text at once. So texts are split by the same rules (pre-tokenization, prefix space) as in the
model's own tokenizer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.json_body import JsonObject

if TYPE_CHECKING:
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer

__all__ = ["ChatTemplate", "SafeEncoder", "encode"]

_ASSISTANT_PROBE = "7294016583"


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of a text. Unlike `tokenizer.encode`, this lets other threads run."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


class SafeEncoder:
    """Encodes untrusted texts inside trusted markup."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Make a copy of the tokenizer that knows only the secret names."""
        from tokenizers import AddedToken, Tokenizer

        added = tokenizer.get_added_tokens_decoder()
        # Some models have added tokens for runs of blanks or newlines; they are not control tokens.
        self.control_ids = {t.content: i for i, t in added.items() if t.content.strip()}
        self._marker = "".join(secrets.choice("0123456789") for _ in range(24))
        self._names = {text: f"\ue000{secrets.token_hex(12)}\ue001" for text in self.control_ids}
        blank = [token for token in added.values() if not token.content.strip()]
        description = json.loads(tokenizer.to_str())
        description["added_tokens"] = []
        self._plain = Tokenizer.from_str(json.dumps(description))
        self._plain.add_tokens(blank)
        flags = {token.content: token for token in added.values()}
        self._plain.add_special_tokens(
            [
                AddedToken(
                    name, lstrip=flags[text].lstrip, rstrip=flags[text].rstrip, normalized=False
                )
                for text, name in self._names.items()
            ]
        )
        self._true_ids = {
            self._plain.token_to_id(name): self.control_ids[text]
            for text, name in self._names.items()
        } | {self._plain.token_to_id(t.content): i for i, t in added.items() if t in blank}
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def protect(self, text: str) -> str:
        """Put a marker inside the names of control tokens in a text."""
        return self._control.sub(lambda m: m[0][0] + self._marker + m[0][1:], text)

    def reveal(self, text: str) -> str:
        """Remove the markers of `protect`."""
        return text.replace(self._marker, "")

    def encode(self, text: str) -> list[int]:
        """Encode a rendered text; control tokens are those without a marker."""
        named = self._control.sub(lambda match: self._names[match[0]], text)
        ids = encode(self._plain, self.reveal(named), add_special_tokens=False)
        return [self._true_ids.get(token, token) for token in ids]


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, source: str, encoder: SafeEncoder, *, names: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template in Jinja.
            encoder: encoder of the model's tokenizer.
            names: variables for the names of special tokens, such as `bos_token`.

        Raises:
            UserError: the template is not valid Jinja.
        """
        import jinja2

        self.source = source
        self._encoder = encoder
        self._names = dict(names)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template cannot be used: {error}") from error
        self.turn_end_ids = self._find_turn_end()
        self._joins_system = not self._takes_two_system_messages()

    @classmethod
    def load(
        cls, folder: Path, encoder: SafeEncoder, *, for_tools: bool = False
    ) -> ChatTemplate | None:
        """Load the template of a model folder; None if it has none.

        Raises:
            UserError: the template cannot be read or compiled.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        source = _find_source(folder, settings, for_tools=for_tools)
        if source is None:
            return None
        names = {
            key: value if isinstance(value, str) else value.get("content", "")
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        return cls(source, encoder, names=names)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt as text, with markers in the names of control tokens in messages.

        Args:
            messages: objects with `role`, `content` (a text) and other keys that the template
                uses. Consecutive system messages are joined if the template does not write each.
            tools: tool declarations as in the OpenAI API.
            options: further template variables, such as `enable_thinking`.
            add_generation_prompt: whether to end with the start of the assistant's turn.

        Raises:
            UserError: the template refuses these messages; the message is the template's.
        """
        import jinja2

        values = self._protect_object(options or {}) | self._names
        given = _join_system(messages) if self._joins_system else list(messages)
        values |= {"messages": self._protect(given), "documents": None}
        values |= {"tools": self._protect(list(tools)) if tools else None}
        try:
            return self._template.render(**values, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            problem = self._encoder.reveal(str(error))
            raise UserError(f"messages do not fit the model's chat template: {problem}") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            problem = self._encoder.reveal(f"{type(error).__name__}: {error}")
            raise UserError(
                f"messages cannot be rendered by the chat template: {problem}"
            ) from error

    def encode(self, rendered: str) -> list[int]:
        """Return the token ids of a rendered prompt."""
        return self._encoder.encode(rendered)

    def reveal(self, rendered: str) -> str:
        """Return a rendered prompt without markers, as the model sees it."""
        return self._encoder.reveal(rendered)

    def _protect(self, value: object) -> object:
        if isinstance(value, str):
            return self._encoder.protect(value)
        if isinstance(value, Mapping):
            return self._protect_object(value)
        if isinstance(value, list):
            return [self._protect(item) for item in value]
        return value

    def _protect_object(self, value: Mapping[str, object]) -> dict[str, object]:
        protect = self._encoder.protect
        return {protect(key): self._protect(item) for key, item in value.items()}

    _joins_system = False

    def _takes_two_system_messages(self) -> bool:
        """Return whether the template writes each of two consecutive system messages."""
        probes = [_ASSISTANT_PROBE, _ASSISTANT_PROBE[::-1]]
        turns = [{"role": "system", "content": probe} for probe in probes]
        try:
            text = self.render([*turns, {"role": "user", "content": "hello"}])
        except UserError:
            return False
        return all(probe in text for probe in probes)

    def _find_turn_end(self) -> tuple[int, ...]:
        """Return the control token that the template writes after an answer, if any."""
        turns = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": _ASSISTANT_PROBE},
        ]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except UserError:
            return ()
        behind = text.rpartition(_ASSISTANT_PROBE)[2].lstrip()
        found = [name for name in self._encoder.control_ids if behind.startswith(name)]
        return (self._encoder.control_ids[max(found, key=len)],) if found else ()


def _join_system(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Join consecutive system messages, with a blank line between their texts."""
    joined: list[Mapping[str, object]] = []
    for message in messages:
        before = joined[-1] if joined else {}
        if before.get("role") == message["role"] == "system":
            texts = [str(text) for text in (before["content"], message["content"]) if text]
            joined[-1] = {**before, "content": "\n\n".join(texts)}
        else:
            joined.append(message)
    return joined


def _read_json(path: Path) -> JsonObject:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} of the model cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _find_source(folder: Path, settings: JsonObject, *, for_tools: bool) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = settings.get("chat_template")
    if source is None:
        source = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several templates, each with a name
        named = {item.get("name"): item.get("template") for item in source}
        source = (named.get("tool_use") if for_tools else None) or named.get("default")
    return source if isinstance(source, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """Return a sandboxed Jinja environment with the functions that chat templates use."""
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _generation_tag() -> type[Extension]:
    """Return the tag `{% generation %}`. It marks text to train on and has no effect here."""
    import jinja2.ext

    class GenerationTag(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag
