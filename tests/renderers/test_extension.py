"""`has_extension_property` tells the truth: each prompt and its reply start the next prompt."""

# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings

from tinker_cookbook.renderers.qwen3 import Qwen3Renderer

from . import checks
from .conversations import Case, conversations, fixed_cases
from .families import FAMILIES
from .kinship import distinct

_SETTINGS = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_the_claim_is_true_on_fixed_conversations(family_name: str) -> None:
    """A format claims to extend exactly if no fixed conversation shows the contrary."""
    family = FAMILIES[family_name]
    problems = (checks.extension_problem(family, case) for case in fixed_cases(family))
    found = next((problem for problem in problems if problem), None)
    assert family.renderer.has_extension_property == (found is None), found


def test_keeping_thinking_makes_the_claim_true() -> None:
    tokenizer = FAMILIES["qwen3"].tokenizer
    assert Qwen3Renderer(tokenizer, strip_thinking_from_history=False).has_extension_property


@pytest.mark.parametrize("family_name", distinct(sorted(FAMILIES)))
def test_a_claim_holds_on_generated_conversations(family_name: str) -> None:
    family = FAMILIES[family_name]

    @_SETTINGS
    @given(case=conversations(family))
    def extends(case: Case) -> None:
        assume(checks.is_expressible(family, case))
        assert checks.extension_problem(family, case) is None

    if family.renderer.has_extension_property:
        extends()


@pytest.mark.parametrize("thinking", ["sampled", "opened", "disabled"])
def test_keeping_the_thinking_extends(thinking: str) -> None:
    """With history kept, prompts extend whatever the reasoning."""
    family = FAMILIES["qwen3"]
    renderer = Qwen3Renderer(
        family.tokenizer,
        strip_thinking_from_history=False,
        thinking=thinking,  # pyright: ignore[reportArgumentType]
    )
    for case in fixed_cases(FAMILIES["qwen3"]):
        messages = checks.with_tools(family, case)
        if thinking == "disabled" and case.category.startswith("thinking"):
            continue
        full = renderer.render(messages).tokens()
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = renderer.render_prompt(messages[:index]).tokens()
                assert full[: len(prompt)] == prompt
                assert (
                    renderer.render(messages[: index + 1]).tokens()
                    == full[: renderer.render(messages[: index + 1]).length]
                )
