"""Finding the renderer that fits a model: comparing every one with the model's own chat template.

for report in verify(tokenizer): print(report.renderer_name, report.verdict)
"""

from __future__ import annotations

import datetime
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.battery import properties
from tinker_cookbook.renderers.battery.cases import fixed_cases
from tinker_cookbook.renderers.battery.checks import (
    consistency_problem,
    extension_problem,
    with_tools,
)
from tinker_cookbook.renderers.battery.subject import Case, TemplateReference
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.replies.json_source import JsonObject, JsonSchema
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["TEMPLATE_OPTIONS", "Candidate", "Report", "verify", "verify_renderer"]

DATE_STRING = "26 Jul 2024"
# The options by which templates choose what renderers have separate names for.
TEMPLATE_OPTIONS: tuple[JsonObject, ...] = (
    {},
    {"enable_thinking": False, "thinking": False},
    {"enable_thinking": True, "thinking": True},
    {"preserve_thinking": True, "clear_thinking": False},
    *({"reasoning_effort": effort} for effort in ("low", "medium", "high")),
)
_NUM_QUICK = 4
_NEAR = 0.9
_ASKS_THE_DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MAX_INJECTED_MARKERS = 40


@dataclass(frozen=True)
class Candidate(TemplateReference):
    """A renderer and a tokenizer, with the template options for the comparison."""

    name: str
    tokenizer: Tokenizer  # pyright: ignore[reportIncompatibleMethodOverride] -- a field is a property too
    renderer: Renderer  # pyright: ignore[reportIncompatibleMethodOverride]
    template_options: JsonObject = field(default_factory=dict)
    has_tools: bool = True
    has_thinking: bool = True
    accepts_thinking: bool = True
    text_arguments: bool = False
    trims: bool = False

    def may_refuse(self, messages: Sequence[Message]) -> bool:
        """Whether a reply may be refused. Refusals are counted, but are not errors."""
        del messages
        return True


@dataclass
class Report:
    """Result of checking one renderer."""

    renderer_name: str
    template_options: JsonObject = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: dict[str, str] = field(default_factory=dict)
    """The first problem of each kind."""

    @property
    def fits(self) -> bool:
        """Whether nothing differs from the template or from what sampling sees."""
        return not self.problems and bool(self.counts["same tokens"])

    @property
    def is_near(self) -> bool:
        """Whether nearly all prompts equal the template's and the other checks pass.

        This is the best result for templates that cannot be followed exactly: a template that has
        no token at the end of a reply, or does not write the reasoning that its prompt opens.
        """
        good = self.counts["same prompts"]
        needed = _NEAR * (good + self.counts["other prompts"])
        return bool(good) and good >= needed and set(self.problems) <= {"differs"}

    @property
    def share(self) -> float:
        """Share of the template's conversations that the renderer writes with the same text."""
        good = self.counts["same tokens"] + self.counts["same text"]
        total = good + self.counts["differs"] + self.counts["refused"]
        return good / total if total else 0.0

    def add(self, what: str, problem: str | None) -> None:
        """Count one check."""
        self.counts[what + (": good" if problem is None else ": bad")] += 1
        if problem is not None:
            self.problems.setdefault(what, problem)


def verify(tokenizer: Tokenizer, names: Sequence[str] | None = None) -> Iterator[Report]:
    """Yield a report for each renderer.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        names: renderers to check; default: all known ones.
    """
    from tinker_cookbook.renderers import get_renderer, get_renderer_names

    abilities = _abilities(tokenizer)
    for name in names or get_renderer_names():
        try:
            renderer = get_renderer(name, tokenizer)
        except RendererError as error:
            yield Report(name, problems={"cannot be made": str(error)})
            continue
        yield verify_renderer(name, renderer, tokenizer, abilities=abilities)


def verify_renderer(
    name: str,
    renderer: Renderer,
    tokenizer: Tokenizer,
    *,
    abilities: Mapping[str, bool] | None = None,
) -> Report:
    """Compare one renderer with the template, on a few conversations and, if they agree, on all.

    Args:
        name: the renderer's name.
        renderer: the renderer, made with this tokenizer.
        tokenizer: a transformers tokenizer with a chat template.
        abilities: whether the template has tools, thinking, and takes arguments as text; default:
            determined by running it.
    """
    flags = dict(_abilities(tokenizer) if abilities is None else abilities)
    best: Report | None = None
    for options in TEMPLATE_OPTIONS:
        candidate = Candidate(
            name, tokenizer, renderer, _dated(tokenizer, renderer, options), **flags
        )
        report = Report(name, options)
        for case in _cases(candidate)[:_NUM_QUICK]:
            _compare(candidate, case, report)
        if best is None or report.fits or report.share > best.share:
            best = report
        if report.fits:
            break
    assert best is not None, "there are options to try"
    if not best.fits and not best.is_near:
        return best
    options = best.template_options
    candidate = Candidate(name, tokenizer, renderer, _dated(tokenizer, renderer, options), **flags)
    return _full_report(candidate, options)


def _dated(tokenizer: Tokenizer, renderer: Renderer, options: JsonSchema) -> JsonObject:
    """Return a template's options with the renderer's date as the current date."""
    dated = {"date_string": DATE_STRING, **options}
    today = getattr(renderer, "current_date", None)
    if today is not None:
        day = datetime.date.fromisoformat(today)
        template: Any = tokenizer.chat_template
        dated["chat_template"] = _ASKS_THE_DAY.sub(
            lambda found: json.dumps(day.strftime(found[2])), template
        )
    return dated


def _abilities(tokenizer: Tokenizer) -> dict[str, bool]:
    """Return what the template can write."""
    from tinker_cookbook.renderers.hf_template.renderer import HFTemplateRenderer

    try:
        renderer = HFTemplateRenderer(tokenizer)
    except RendererError:
        return {}
    facts = renderer.facts
    has_thinking = facts.has_thinking
    return {
        "has_tools": facts.has_tools and facts.arguments != "none",
        "has_thinking": has_thinking,
        "accepts_thinking": has_thinking,
        "text_arguments": facts.arguments == "text",
    }


def _cases(candidate: Candidate) -> list[Case]:
    markers = [*candidate.tokenizer.get_added_vocab(), "</think>", "<think>"]
    cases = []
    for case in fixed_cases(candidate):
        text = json.dumps(
            [candidate.to_template(m) for m in case.messages], ensure_ascii=False, default=str
        )
        if not any(marker in text for marker in markers):
            cases.append(case)
    return cases


def _full_report(candidate: Candidate, options: JsonObject) -> Report:
    report = Report(candidate.name, options)
    choose = random.Random(0)
    replies: list[list[int]] = []
    for case in _cases(candidate):
        if not _compare(candidate, case, report):
            continue
        report.add("trained = sampled", consistency_problem(candidate, case))
        reply = _last_reply(candidate, case)
        if reply is not None:
            replies.append(reply)
            report.add("parses back", _round_trip_problem(candidate, case, reply))
            report.add("ends", properties.stop_problem(candidate.renderer, reply))
        if sum(m["role"] == "assistant" for m in case.messages) > 1:
            problem = extension_problem(candidate, case)
            claimed = candidate.renderer.has_extension_property
            report.add("extends", problem if claimed else None)
    for _ in range(100 if replies else 0):
        tokens = properties.random_reply(candidate.renderer, choose, replies)
        report.add("any tokens", properties.parse_problem(candidate.renderer, tokens, choose))
    _check_injection(candidate, report)
    return report


def _compare(candidate: Candidate, case: Case, report: Report) -> bool:
    """Compare prompt and conversation; False if the renderer or the template refuses them."""
    import jinja2

    for prompt, messages in ((True, _question(case.messages)), (False, case.messages)):
        if not messages:
            continue
        part = Case(case.category, list(messages), case.tools)
        try:
            expected = candidate.reference(part.messages, prompt=prompt, tools=part.tools)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            report.counts["template refuses"] += 1
            return False
        try:
            given = with_tools(candidate, part)
            renderer = candidate.renderer
            ours = renderer.render_prompt(given) if prompt else renderer.render(given)
        except RendererError as error:
            report.counts["refused"] += 1
            report.counts[f"refused: {str(error)[:90]}"] += 1
            return False
        same = _count(candidate, report, ours.tokens(), expected)
        if prompt:
            report.counts["same prompts" if same else "other prompts"] += 1
    return True


def _question(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the conversation before its last reply."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _count(candidate: Candidate, report: Report, ours: list[int], expected: list[int]) -> bool:
    """Count a comparison and return whether the texts are the same."""
    decode = candidate.renderer.encoder.decode
    if ours == expected:
        report.counts["same tokens"] += 1
    elif decode(ours) == decode(expected):
        report.counts["same text"] += 1
    else:
        report.counts["differs"] += 1
        report.problems.setdefault("differs", first_difference(decode(ours), decode(expected)))
        return False
    return True


def first_difference(ours: str, theirs: str) -> str:
    """Describe the first difference between two texts."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    start = max(0, place - 30)
    return (
        f"after {ours[start:place]!r}: the renderer writes {ours[place : place + 40]!r}, "
        f"the template {theirs[place : place + 40]!r}"
    )


def _last_reply(candidate: Candidate, case: Case) -> list[int] | None:
    """Return the trained tokens of the last reply."""
    messages = with_tools(candidate, case)
    if messages[-1]["role"] != "assistant":
        return None
    if len(messages) > 1 and messages[-2]["role"] == "assistant":
        return None  # no untrained token may be between the two
    try:
        model_input, weights = candidate.renderer.build_supervised_examples(messages)[-1]
    except RendererError:
        return None
    tokens = np.asarray(model_input.to_ints())
    last = int(np.flatnonzero(np.diff(weights, prepend=0) > 0)[-1])
    return tokens[last:][weights[last:] > 0].tolist()


def _round_trip_problem(candidate: Candidate, case: Case, reply: list[int]) -> str | None:
    """Compare the parsed reply with the message, ignoring white space around texts."""
    got = _comparable(candidate, candidate.renderer.parse_response(reply)[0])
    expected = _comparable(candidate, case.messages[-1])
    return None if got == expected else f"{got} is not {expected}"


def _comparable(candidate: Candidate, message: Message) -> tuple[object, ...]:
    backend = candidate.tokenizer.backend_tokenizer

    def normal(text: str) -> str:
        ids = backend.encode(text.strip(), add_special_tokens=False).ids
        return backend.decode(ids, skip_special_tokens=False).strip()

    reasoning, text = split_reasoning(message)
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.get("tool_calls", [])
    ]
    return normal(reasoning), normal(text), calls


def _check_injection(candidate: Candidate, report: Report) -> None:
    markers = properties.control_names(candidate.renderer)
    step = max(1, len(markers) // _MAX_INJECTED_MARKERS)
    texts = list(properties.marker_texts([*markers[::step], *properties.FOREIGN_MARKERS]))
    for place, talk in properties.typed_conversations(candidate.renderer).items():
        try:
            count, problem = properties.injection_problem(candidate.renderer, talk, texts)
        except RendererError:
            continue  # the format does not have this place for text
        report.counts["injection: good"] += count - (problem is not None)
        if problem is not None:
            report.counts["injection: bad"] += 1
            report.problems.setdefault("injection", f"{place}: {problem}")
