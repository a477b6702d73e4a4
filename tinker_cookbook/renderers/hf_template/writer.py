"""How one chat template writes conversations, and which part of each reply is sampled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.hf_template.facts import TemplateFacts
from tinker_cookbook.renderers.hf_template.given import Giver
from tinker_cookbook.renderers.hf_template.template_plan import (
    ControlTokens,
    Plan,
    Reply,
    build_atoms,
    lay_out_atoms,
)
from tinker_cookbook.renderers.hf_template.text import (
    Conversation,
    TemplateError,
    TemplateRunner,
    Value,
    fill,
    mark_spans,
)
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["TemplateWriter"]

_MAX_PLANS = 512
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template may leave out without harm: reasoning in history, a speaker's name, a call's id.
_MAY_BE_DROPPED = frozenset({SegmentKind.THINK, SegmentKind.FRAME})


class TemplateWriter(Giver):
    """Runs one template and finds in its output which message each character comes from.

    Conversations of the same shape (equal except for their texts) share a plan.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, options: Mapping[str, object]) -> None:
        super().__init__(ControlTokens(tokenizer.added_tokens_decoder), TemplateFacts())
        self._runner = TemplateRunner(tokenizer, options)
        self._has_blocks = bool(_GENERATION_BLOCK.search(template))
        self._structure = _structural_strings(template)
        self._plans: dict[tuple[str, bool], Plan] = {}

    def lay_out(self, layout: Layout, messages: Sequence[Message], *, prompt: bool) -> None:
        talk = self.conversation(messages)
        plan = self.plan(talk, prompt=prompt)
        if not self._is_as_typed(talk, plan, prompt=prompt):
            self._runner.forget()  # it may write the date
            self._plans.clear()
            plan = self.plan(talk, prompt=prompt)
            if not self._is_as_typed(talk, plan, prompt=prompt):
                raise self._rewriting_error(talk, plan, prompt=prompt)
        lay_out_atoms(layout, plan.atoms, talk.values, self.facts.call_markers)

    def written(self, talk: Conversation, count: int, *, prompt: bool) -> str:
        """Return what the template writes of the first `count` messages, with marks."""
        messages = talk.masked[: max(0, count - talk.offset)]
        return self._runner.run_cached(messages, talk.masked_tools, prompt=prompt)

    def plan(self, talk: Conversation, *, prompt: bool) -> Plan:
        key = (json.dumps([talk.masked, talk.masked_tools]), prompt)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._make_plan(talk, prompt=prompt)
        return plan

    def _make_plan(self, talk: Conversation, *, prompt: bool) -> Plan:
        count = len(talk.masked) + talk.offset
        text = self.written(talk, count, prompt=prompt)
        self._refuse_dropped(talk, text)
        replies: dict[int, Reply] = {}
        for index in range(talk.offset, count):
            if talk.masked[index - talk.offset]["role"] == "assistant":
                replies[index] = self.reply(talk, index)
        standing = {
            index: reply
            for index, reply in replies.items()
            if reply.problem is None and text.startswith(reply.written)
        }
        atoms = build_atoms(
            text,
            talk.values,
            self.control,
            replies=standing,
            cuts=self._cuts(talk, replies, text),
            stops=self.facts.stops,
        )
        return Plan(text, atoms, replies, frozenset(standing))

    def _cuts(self, talk: Conversation, replies: Mapping[int, Reply], text: str) -> frozenset[int]:
        """Return where sampling starts: the ends of all prompts that are prefixes of the text."""
        cuts = set()
        for index in replies:
            try:
                prompt = self.written(talk, index, prompt=True)
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

    def reply(self, talk: Conversation, index: int) -> Reply:
        """Return the part of message `index` that sampling writes, found by rendering prefixes."""
        try:
            prompt = self.written(talk, index, prompt=True)
            whole = self.written(talk, index + 1, prompt=False)
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
                reason = "a token that ends the turn is within this reply"
            return Reply(problem=reason)
        tagged = None
        if self._has_blocks:
            messages = talk.masked[: index + 1 - talk.offset]
            tagged = tuple(self._runner.tagged(messages, talk.masked_tools))
        return Reply(start, end, whole[:end], tagged=tagged)

    def _end_of_turn(self, text: str, start: int) -> int | None:
        """Return the end of the first token at or after `start` that ends a turn."""
        for match in self.control.pattern.finditer(text, start):
            if self.control.id_of(match) in self.facts.stops:
                return match.end()
        return None

    def _is_as_typed(self, talk: Conversation, plan: Plan, *, prompt: bool) -> bool:
        """Whether the template writes the typed texts unchanged, or they contain structure to
        protect."""
        if self._acts_on_template(talk.values):
            return True
        try:
            written = self._runner.run(talk.plain, talk.tools, prompt=prompt)
        except TemplateError:
            return False
        return written == fill(plan.text, talk.values)

    def _acts_on_template(self, values: Sequence[Value]) -> bool:
        """Whether a text contains a string that the template or the tokenizer treats as
        structure."""
        return any(
            self._structure.search(value.text) or self.control.pattern.search(value.text)
            for value in values
        )

    def _rewriting_error(self, talk: Conversation, plan: Plan, *, prompt: bool) -> RendererError:
        theirs = self._runner.run(talk.plain, talk.tools, prompt=prompt)
        ours = fill(plan.text, talk.values)
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        return RendererError(
            f"the chat template rewrites the text of a message near {theirs[place : place + 40]!r} "
            f"(expected {ours[place : place + 40]!r}), so what is typed cannot be told from what "
            "its own text; this model needs a separate renderer."
        )

    def rewritten_turn(self, messages: Sequence[Message], trained: Sequence[int]) -> int | None:
        """Return the first trained reply that is not written as it is sampled, after its prompt."""
        faithful = self.plan(self.conversation(messages), prompt=False).faithful
        for index in trained:
            if messages[index]["role"] == "assistant" and index not in faithful:
                return index
        return None


def _structural_strings(template: str) -> re.Pattern[str]:
    """Match the strings that a template may look for in texts: its literals that contain a
    bracket."""
    import jinja2

    tokens = jinja2.Environment().lex(template)
    strings = {value[1:-1].strip() for _, kind, value in tokens if kind == "string"}
    structural = sorted(s for s in strings if len(s) > 2 and re.search(r"[<>\[\]|]", s))
    return re.compile("|".join(map(re.escape, structural)) or r"(?!)")


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
