"""Compare how a renderer and the model's chat template tokenize the same conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from tinker_cookbook.commands.parts.conversation_rows import read_conversation
from tinker_cookbook.exceptions import DataValidationError

if TYPE_CHECKING:
    from tinker_cookbook.renderers import Message, Renderer
    from tinker_cookbook.renderers.battery.differences import Difference
    from tinker_cookbook.renderers.rendering import Rendering
    from tinker_cookbook.supervised.conversations import Conversation, SourceRow

__all__ = ["Comparison", "Outcome", "TemplateOptions", "compare_rows"]

TemplateOptions = Mapping[str, Any]
"""Keyword arguments of a chat template, such as `enable_thinking`."""


class Outcome(StrEnum):
    """Result of comparing one conversation."""

    SAME = "same tokens"
    EXPECTED = "same text, other token borders"
    DIFFERENT = "different"
    REFUSED = "refused"


class Comparison(NamedTuple):
    """The tokens of one conversation from the renderer and from the template."""

    where: str
    ours: list[int]
    theirs: list[int]
    differences: list[Difference]
    refusal: str = ""
    """Message of the renderer or the template that refuses the conversation; empty if accepted."""

    @property
    def outcome(self) -> Outcome:
        """How the two compare."""
        if self.refusal:
            return Outcome.REFUSED
        if not self.differences:
            return Outcome.SAME
        is_expected = all(found.is_meant for found in self.differences)
        return Outcome.EXPECTED if is_expected else Outcome.DIFFERENT

    @property
    def heading(self) -> str:
        """One line that names the conversation and the outcome."""
        if self.refusal:
            return f"{self.where}: {self.refusal}"
        counts = Counter(found.kind.value for found in self.differences)
        reasons = "".join(f"; {count} x {reason}" for reason, count in counts.items())
        return f"{self.where}: {self.outcome} ({len(self.ours)} tokens{reasons})"


class _Rendered(NamedTuple):
    """A conversation that the renderer accepts, ready to be compared."""

    where: str
    conversation: Conversation
    rendering: Rendering


def compare_rows(
    rows: Sequence[SourceRow], renderer: Renderer
) -> tuple[list[Comparison], TemplateOptions]:
    """Compare every row, using the template options that give the fewest differences.

    Renderers are named after choices such as "no thinking" that a template takes as options, so
    every known set of options is tried.

    Raises:
        DataValidationError: if every row is refused.
    """
    from tinker_cookbook.renderers.battery.verify import TEMPLATE_OPTIONS

    rendered = [_render(row, renderer) for row in rows]
    best: tuple[list[Comparison], TemplateOptions] | None = None
    for options in TEMPLATE_OPTIONS:
        found = [
            item if isinstance(item, Comparison) else _compare(item, renderer, options)
            for item in rendered
        ]
        if best is None or _num_bad(found) < _num_bad(best[0]):
            best = found, options
        if not _num_bad(found):
            break
    assert best is not None, "there are options to try"
    if all(comparison.refusal for comparison in best[0]):
        raise DataValidationError(best[0][0].heading)
    return best


def _num_bad(comparisons: Sequence[Comparison]) -> int:
    bad = (Outcome.DIFFERENT, Outcome.REFUSED)
    return sum(comparison.outcome in bad for comparison in comparisons)


def _render(row: SourceRow, renderer: Renderer) -> _Rendered | Comparison:
    """Render a row, or return the renderer's refusal as a comparison."""
    from tinker_cookbook.exceptions import RendererError

    conversation = read_conversation(row)
    try:
        messages = renderer.declare_tools(conversation.messages, conversation.tools)
        return _Rendered(row.where, conversation, renderer.render(messages))
    except RendererError as error:
        return Comparison(row.where, [], [], [], refusal=f"the renderer refuses it: {error}")


def _compare(rendered: _Rendered, renderer: Renderer, options: TemplateOptions) -> Comparison:
    import jinja2

    from tinker_cookbook.renderers.battery.differences import differences, tokens_with_pads

    where, conversation, rendering = rendered
    try:
        theirs = _apply_template(conversation, renderer, options)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        return Comparison(where, [], [], [], refusal=f"the template refuses it: {error}")
    ours, _ = tokens_with_pads(rendering, renderer.encoder)
    return Comparison(where, ours, theirs, differences(rendering, theirs, renderer.encoder))


def _apply_template(
    conversation: Conversation, renderer: Renderer, options: TemplateOptions
) -> list[int]:
    from tinker_cookbook.renderers.battery.verify import DATE_STRING
    from tinker_cookbook.renderers.tool_calls import tool_declaration

    tokens = renderer.tokenizer.apply_chat_template(
        _template_messages(conversation.messages, renderer),
        tools=[dict(tool_declaration(tool)) for tool in conversation.tools] or None,
        tokenize=True,
        return_dict=False,
        date_string=DATE_STRING,
        **options,
    )
    return cast("list[int]", tokens)


def _template_messages(messages: Sequence[Message], renderer: Renderer) -> list[dict[str, Any]]:
    """Return messages as inference servers pass them to templates: call arguments as objects."""
    import json

    from tinker_cookbook.renderers.images import has_images

    records: list[dict[str, Any]] = []
    for message in messages:
        parts = message["content"]
        if has_images(message) and not isinstance(parts, str):
            texts_only: Message = {**message, "content": ""}
            pieces = [{"type": "image"} if part["type"] == "image" else part for part in parts]
            record: dict[str, Any] = {**renderer.to_openai_message(texts_only), "content": pieces}
        else:
            record = {**renderer.to_openai_message(message)}
        for call in record.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                call["function"]["arguments"] = json.loads(arguments)
        records.append(record)
    return records
