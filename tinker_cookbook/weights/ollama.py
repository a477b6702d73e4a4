"""An Ollama Modelfile for an exported model, with the chat format of a renderer.

Ollama writes a prompt with a Go template. The template is learned from the renderer: `learn_pieces`
renders a few conversations and looks at what is written around the texts of the messages. Then
prompts of other conversations are compared, text by text and token by token. A format that writes
messages differently from turn to turn is refused, because a template made this way would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.gguf_file import GgufFile, Metadata

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message, Renderer

__all__ = ["ChatPieces", "adds_bos", "learn_pieces", "render_modelfile", "write_modelfile"]

MAX_CONTEXT = 8192
"""Ollama reserves memory for the whole context, so models with a longer one get this much."""
MODELFILE = "Modelfile"
_BOS_BY_DEFAULT = ("llama-bpe", "tekken", "gemma4")
"""Pre-tokenizers whose texts llama.cpp begins with that token, if the file does not say."""
_SYSTEM, _USER, _REPLY, _NEXT = "Obey.", "Which one?", "That one.", "And then?"
_TEXTS = (
    ("Be brief.", "What is 2 + 2?", "4", "Why?"),
    ("You know Zürich.\nAnswer in German.", "def f(x):\n    return x", "1. Äpfel\n2. 梨", "ok…"),
)
"""System message, question, reply, next question."""


@dataclass(frozen=True)
class ChatPieces:
    """What a chat format writes around the texts of a conversation."""

    system_head: str
    system_tail: str
    no_system: str
    """Written in front of a conversation without a system message."""
    user_head: str
    user_tail: str
    assistant_head: str
    assistant_tail: str
    prompt: str
    """Written after the last message, where the reply begins."""
    joins_system: bool = False
    """Whether the system text is part of the first user turn; `system_tail` then opens its text."""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a reply, as Ollama writes it with `go_template`."""
        system = "".join(str(m["content"]) for m in messages if m["role"] == "system")
        parts = [self.system_head, system, self.system_tail] if system else [self.no_system]
        is_joined = bool(system) and self.joins_system
        for message in messages:
            text = str(message["content"])
            if message["role"] == "user":
                head = "" if is_joined else self.user_head
                parts += [head, text, self.user_tail]
                is_joined = False
            elif message["role"] == "assistant":
                parts += [self.assistant_head, text, self.assistant_tail]
        return "".join([*parts, self.prompt])

    def go_template(self) -> str:
        """Return the Go template.

        An unfinished reply at the end is continued: it follows `prompt` and gets no tail.
        """
        user_head = _go_text(self.user_head)
        if self.joins_system:
            user_head = f"{{{{ if not (and $.System (eq $i 1)) }}}}{user_head}{{{{ end }}}}"
        prompt = _go_text(self.prompt)
        return (
            f"{{{{ if .System }}}}{_go_text(self.system_head)}{{{{ .System }}}}"
            f"{_go_text(self.system_tail)}{{{{ else }}}}{_go_text(self.no_system)}{{{{ end }}}}"
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{user_head}{{{{ .Content }}}}{_go_text(self.user_tail)}'
            f"{{{{ if $last }}}}{prompt}{{{{ end }}}}"
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ if $last }}}}{prompt}{{{{ .Content }}}}'
            f"{{{{ else }}}}{_go_text(self.assistant_head)}{{{{ .Content }}}}"
            f"{_go_text(self.assistant_tail)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        )


def _go_text(text: str) -> str:
    """Return text as it is written in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def write_modelfile(file: Path, renderer: Renderer) -> Path:
    """Write a Modelfile next to a GGUF file and return its path.

    Args:
        file: The GGUF file of a model.
        renderer: The renderer that the model was trained with.

    Raises:
        RendererError: if the format cannot be written as a template; says why.
    """
    with GgufFile(file) as opened:
        metadata = opened.metadata
    context = metadata[f"{metadata['general.architecture']}.context_length"]
    text = render_modelfile(renderer, file.name, context=context, adds_bos=adds_bos(metadata))
    target = file.parent / MODELFILE
    write_atomically(target, text)
    return target


def adds_bos(metadata: Metadata) -> bool:
    """Whether llama.cpp writes the begin-of-sequence token before texts for this GGUF file."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return stated
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    return is_sentencepiece or metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT


def render_modelfile(renderer: Renderer, file_name: str, *, context: int, adds_bos: bool) -> str:
    """Return the text of a Modelfile.

    Sampling is unfiltered at temperature 1, as in the service; Ollama's own defaults are not.

    Args:
        renderer: The renderer that the model was trained with.
        file_name: The GGUF file, next to the Modelfile.
        context: Longest sequence of the model.
        adds_bos: Whether llama.cpp writes the begin-of-sequence token before a prompt.

    Raises:
        RendererError: if the format cannot be written as a template; says why.
    """
    template = learn_pieces(renderer, adds_bos=adds_bos).go_template()
    if '"""' in template:
        raise _refusal(renderer, 'it writes """, which ends a template in a Modelfile')
    stops = [
        renderer.encoder.decode([stop]) if isinstance(stop, int) else stop
        for stop in renderer.get_stop_sequences()
    ]
    settings = [
        *(f"stop {_quote(stop)}" for stop in stops),
        f"num_ctx {min(context, MAX_CONTEXT)}",
        *("temperature 1", "top_k 0", "top_p 1", "min_p 0", "repeat_penalty 1"),
    ]
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{template}"""']
    return "\n".join([*lines, *(f"PARAMETER {setting}" for setting in settings)]) + "\n"


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def learn_pieces(renderer: Renderer, *, adds_bos: bool) -> ChatPieces:
    """Return what a renderer writes around messages, after comparing it on other conversations.

    Args:
        renderer: The renderer.
        adds_bos: Whether llama.cpp writes the begin-of-sequence token before a prompt.

    Raises:
        RendererError: if no template describes the format; says where it differs.
    """
    prober = _Prober(renderer, adds_bos=adds_bos)
    pieces = prober.learn()
    for system, question, reply, following in _TEXTS:
        asked, answered = _message("user", question), _message("assistant", reply)
        turns = [asked, answered, _message("user", following), answered, asked]
        first = _message("system", system)
        for messages in (turns[:1], turns, [first, asked], [first, *turns]):
            prober.compare(pieces, messages)
    return pieces


class _Prober:
    """Renders conversations as text."""

    def __init__(self, renderer: Renderer, *, adds_bos: bool) -> None:
        self._renderer = renderer
        bos = list(renderer.bos_ids)
        if adds_bos and not bos:
            raise _refusal(renderer, "llama.cpp adds a begin-of-sequence token before its prompts")
        self._num_skipped = len(bos) if adds_bos else 0

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._renderer.render_prompt(messages).tokens()[self._num_skipped :]

    def _gaps(self, *turns: tuple[str, str]) -> list[str]:
        """Return what is written before, between and after the texts of a conversation."""
        tokens = self._prompt([_message(role, text) for role, text in turns])
        rest, gaps = self._renderer.encoder.decode(tokens), []
        for _, text in turns:
            gap, found, rest = rest.partition(text)
            if not found:
                raise _refusal(self._renderer, f"it does not write a message's text as {text!r}")
            gaps.append(gap)
        return [*gaps, rest]

    def learn(self) -> ChatPieces:
        user, reply, after = ("user", _USER), ("assistant", _REPLY), ("user", _NEXT)
        before, between, behind, end = self._gaps(user, reply, after)
        system_head, system_gap, system_end = self._gaps(("system", _SYSTEM), user)
        if self._gaps(user) != [before, end] or system_end != end:
            raise _refusal(self._renderer, "it writes a message differently from turn to turn")
        user_tail = self._user_tail(between, end)
        user_head = self._user_head(before, behind)
        joins_system = not system_gap.endswith(user_head)
        return ChatPieces(
            system_head=system_head,
            system_tail=system_gap if joins_system else system_gap.removesuffix(user_head),
            no_system=before.removesuffix(user_head),
            user_head=user_head,
            user_tail=user_tail,
            assistant_head=between.removeprefix(user_tail),
            assistant_tail=behind.removesuffix(user_head),
            prompt=end.removeprefix(user_tail),
            joins_system=joins_system,
        )

    def _user_head(self, before: str, behind: str) -> str:
        """Return what opens a user message: the renderer's frame, or the common end of both."""
        frame = self._frame(_message("user", _USER))[0]
        if frame and before.endswith(frame) and behind.endswith(frame):
            return frame
        return before[len(before) - _common_length(before[::-1], behind[::-1]) :]

    def _user_tail(self, between: str, end: str) -> str:
        """Return what closes a user message."""
        frame = self._frame(_message("user", _USER))[1]
        is_common = between.startswith(frame) and end.startswith(frame)
        return frame if is_common else ""

    def _frame(self, message: Message) -> tuple[str, str]:
        """Return what the renderer counts as parts of one message around its text."""
        segments = self._renderer.render_prompt([message]).segments
        tokens = [token for s in segments if s.message == 0 for token in s.tokens]
        text = self._renderer.encoder.decode(tokens)
        before, _, after = text.partition(str(message["content"]))
        return before, after

    def compare(self, pieces: ChatPieces, messages: Sequence[Message]) -> None:
        """Refuse pieces that write a conversation differently from the renderer."""
        encoder = self._renderer.encoder
        tokens = self._prompt(messages)
        written, needed = pieces.render(messages), encoder.decode(tokens)
        if written != needed:
            place = _common_length(written, needed)
            raise _refusal(
                self._renderer,
                f"after {needed[max(0, place - 30) : place]!r} it writes "
                f"{needed[place : place + 30]!r}, a template {written[place : place + 30]!r}",
            )
        if encoder.encode_markup(written) != tokens:
            raise _refusal(self._renderer, "the tokens of its prompts are not those of their text")


def _common_length(first: str, second: str) -> int:
    """Return the length of the longest common beginning."""
    pairs = zip(first, second, strict=False)
    different = (index for index, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(first), len(second)))


def _message(role: str, text: str) -> Message:
    from tinker_cookbook.renderers import Message

    return Message(role=role, content=text)


def _refusal(renderer: Renderer, reason: str) -> RendererError:
    name = renderer._renderer_name or type(renderer).__name__
    return RendererError(
        f"renderer={name} cannot be written as an Ollama template: {reason}. Use llama.cpp with "
        "prompts from this renderer, or another renderer with --renderer."
    )
