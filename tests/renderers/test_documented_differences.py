"""docs/renderers.md lists every difference from a template that conversations of any shape show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.battery.cases import assistant, result, system, user

from . import checks
from .conversations import SEARCH, WEATHER, Case
from .families import FAMILIES, Family

PAGE = (Path(__file__).parents[2] / "docs" / "renderers.md").read_text("utf-8")
ROWS = PAGE.partition("## Deliberate differences from the templates")[2].partition("## Measured")[0]

_CALL = ("get_weather", '{"city": "Bern"}')
_TURNS = {
    "s": system("Say hi."),
    "u": user("Say hi."),
    "t": result("Say hi."),
    "a": assistant("hi"),
    "r": assistant("hi", "why"),
    "c": assistant("", calls=[_CALL]),
    "b": assistant("hi", calls=[_CALL]),
    "d": assistant("", calls=[_CALL, _CALL]),
}
PLAIN = "sa a saa sau saua ssua usa uas aa aua uaa uua s uta ta ur urua uru ucta ucsa".split()
WITH_TOOLS = "u su ucta udtta ubt uctu".split()
SHAPES = dict.fromkeys(PLAIN, ()) | {f"{shape} +tools": (WEATHER, SEARCH) for shape in WITH_TOOLS}

_SILENT = r"chatml|smollm2|qwen2_5|qwen3_instruct|qwen3_vl_instruct|llama3.*|gemma3|mistral_.*"
_TOOLLESS = r"chatml|smollm2|llama3|gemma3|smollm3.*"
# Family, shape, and words of the row that says so.
DOCUMENTED = [
    (_SILENT, "ur.*", "reasoning is refused"),
    (_TOOLLESS, r".*[ctdb].*|.*\+tools", "tools are refused, and so are calls"),
    (r"qwen3(_dis.*|_thi.*)?", "[sat]+", "replies are written as after one"),
    (r"qwen3_vl_instruct", "ssua|us.*|uas|ucsa", "a later system message is written"),
    (r"glm.*", ".*aa|uas|ucsa", "a reply followed by another reply or a system message"),
    (r"(glm|smollm3|nemotron3).*_disable_thinking", "ur.*", "reasoning in history is dropped"),
    (r"gemma3", "s|sa.*|us.*|u.*s.*", "a system message that no user message follows is refused"),
    (r"gemma4.*", ".*aa", "two replies in a row are two turns"),
    (r"gemma4.*", "u?ta", "after no call they are refused"),
    (r"gemma4.*", "ubt.*", "text next to a call is written before it"),
    (r"gemma4", "ur.*", "reasoning in history is dropped"),
    (r"llama3_.|mistral_.*", "ubt.*", "text next to a call"),
    (r"mistral_small|smollm3.*", "ssua|us.*|uas|ucsa", "a system message after other messages"),
    (r"deepseek.*", "us.*|uas|ucsa", "a system message after others is refused"),
    (r"deepseekv3_thinking|deepseek_r1", r".*t.*|ucsa", "nothing is sampled after a tool result"),
    (r"deepseekv3_chat|deepseek_r1.*", "uc.*", "every run of calls and results is opened"),
    (r"gpt_oss.*", "ssua|us.*|uas|ucsa", "later system messages become developer messages"),
    (r"gpt_oss.*", "udtta.*|ubt.*", "several calls in one reply are refused"),
    (r"nemotron3.*", "ta", "a result at the very start opens a separate turn"),
    (r"nemotron3_preserve_thinking", ".*", "so has every reply without reasoning"),
]


def difference(family: Family, shape: str) -> str | None:
    """Return how the renderer differs where the template writes the conversation; None if not."""
    messages: list[Any] = [_TURNS[letter] for letter in shape.split()[0]]
    for prompt in (True, False):
        part = messages[:-1] if prompt and messages[-1]["role"] == "assistant" else messages
        if not part:
            continue
        case = Case("", part, SHAPES[shape])
        try:
            theirs = family.reference(part, prompt=prompt, tools=case.tools)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            continue  # the template refuses it
        theirs = family.adjusted(theirs, case, prompt=prompt)
        try:
            given, renderer = checks.with_tools(family, case), family.renderer
            ours = renderer.render_prompt(given) if prompt else renderer.render(given)
        except RendererError as error:
            return f"refused: {error}"
        decode = family.renderer.encoder.decode
        if decode(ours.tokens()) != decode(theirs):
            return f"{decode(ours.tokens())!r} is not {decode(theirs)!r}"
    return None


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_every_difference_has_a_row(family_name: str) -> None:
    allowed = [shapes for names, shapes, _ in DOCUMENTED if re.fullmatch(names, family_name)]
    found = {
        shape: problem
        for shape in SHAPES
        if not any(re.fullmatch(shapes, shape) for shapes in allowed)
        and (problem := difference(FAMILIES[family_name], shape))
    }
    assert found == {}


def test_the_rows_are_there() -> None:
    assert [words for _, _, words in DOCUMENTED if words not in ROWS] == []


@pytest.mark.parametrize(
    "family_name", [name for name in sorted(FAMILIES) if "disable_thinking" in name]
)
def test_trained_reasoning_is_refused_without_thinking(family_name: str) -> None:
    assert "a trained reply with reasoning is refused" in ROWS
    with pytest.raises(RendererError, match="thinking"):
        FAMILIES[family_name].renderer.build_supervised_example([_TURNS["u"], _TURNS["r"]])
