"""Renderer for any model: it runs the model's chat template and derives exact masks from its
output.

    get_renderer("hf_template", tokenizer)

For models without a renderer in this package. All facts are found by running the template on marks
instead of texts (see text.py):

 - The sampled part of a reply is what the template writes after its own generation prompt, up to
   the token that ends the turn. If the template has `{% generation %}` blocks, only text inside
   them is trained.
 - A conversation trains in one example if every trained reply is written as it was sampled, after
   the same prompt; else in one example per reply. This is decided for each conversation.
 - Typed text is encoded without control tokens and cannot affect the template: markers that the
   template looks for in strings (`</think>`, say) stay text.
 - Replies are parsed by the markers that the template puts around reasoning and calls, if these are
   tokens of the tokenizer and calls are JSON or as in notations/xml.py; else they stay text. The
   format's words around them are not part of the reply: gpt-oss's headers, the label of Gemma 4's
   reasoning, and the empty block that the templates of Kimi K2 Thinking and K2.5 write for
   reasoning.

Refused, with the reason: templates without an exact mask (the reply is not what follows the prompt,
or nothing ends it), messages that the template drops or rewrites, and tokenizers that encode text
next to a control token in another way. Words that templates compare (tool names, call ids and JSON
keys of letters, digits, `_ . : -` and spaces) reach the template unchanged. They contain no control
token; the template could only complete one by writing the rest around them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.hf_template.facts import TemplateFacts
from tinker_cookbook.renderers.hf_template.learning import learn
from tinker_cookbook.renderers.hf_template.writer import TemplateWriter
from tinker_cookbook.renderers.layout import Layout
from tinker_cookbook.renderers.notations.harmony_parser import (
    HARMONY_MARKS,
    HarmonyParser,
    HarmonyTokens,
)
from tinker_cookbook.renderers.notations.labelled import LabelledParser
from tinker_cookbook.renderers.notations.xml import fit_calls
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser
from tinker_cookbook.renderers.tool_calls import bare_calls_as_text
from tinker_cookbook.renderers.types import Message, Role, ToolSpec
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "HFTemplateRenderer"]

logger = logging.getLogger(__name__)


class HFTemplateRenderer(Renderer):
    """Renders with the tokenizer's own chat template."""

    roles = ("system", "developer", "user", "assistant", "tool")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        template_options: Mapping[str, object] | None = None,
    ) -> None:
        """Learn the template.

        Args:
            tokenizer: a fast transformers tokenizer.
            chat_template: template to use instead of the tokenizer's.
            template_options: variables that the template reads, such as `enable_thinking=False` or
                `date_string="26 Jul 2024"`.

        Raises:
            RendererError: if the tokenizer has no template, or the template has no exact mask.
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
        self._writer = TemplateWriter(tokenizer, template, options)
        self._facts = learn(self._writer, self.encoder, tokenizer)
        self.roles = self._facts.roles
        self.bos_ids = self._facts.bos_ids
        self.writes_tools = self._facts.has_tools

    @property
    def takes_text_arguments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._facts.arguments != "object"

    @property
    def facts(self) -> TemplateFacts:
        """The facts found about the template."""
        return self._facts

    # ---- rendering ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        del forms
        self._writer.lay_out(layout, messages, prompt=False)

    def _prompt_layout(self, messages: Sequence[Message], role: Role) -> Layout:
        if role != "assistant":
            raise RendererError(
                f"role={role!r} cannot be opened: chat templates open turns of the assistant only."
            )
        layout = Layout()
        self._writer.lay_out(layout, messages, prompt=True)
        return layout

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        talk = self._writer.conversation(messages[: index + 1])
        problem = self._writer.plan(talk, prompt=False).replies[index].problem
        if problem is not None:
            raise RendererError(
                f"messages[{index}]: no exact mask: {problem}. Train other replies, or use a "
                "renderer made for this model."
            )

    def trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        return self.rewritten_turn(messages, trained) is None

    def rewritten_turn(self, messages: Sequence[Message], trained: Sequence[int]) -> int | None:
        return self._writer.rewritten_turn(messages, trained)

    @property
    def has_extension_property(self) -> bool:
        return self._facts.extends

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
            ids = self._writer.control.ids
            return HarmonyParser(self.encoder, HarmonyTokens(*(ids[m] for m in HARMONY_MARKS)))
        if facts.thought_label:
            return LabelledParser(
                self.encoder,
                facts.grammar,
                may_be_open=facts.may_open_thinking,
                label=facts.thought_label,
            )
        return super().response_parser()


def _template_source(tokenizer: Tokenizer, chat_template: str | None) -> str:
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


RENDERERS = [
    NamedRenderer(
        "hf_template",
        lambda tokenizer, _: HFTemplateRenderer(tokenizer),
        "any model with a chat template",
        "driven by that template; see above",
    ),
]
