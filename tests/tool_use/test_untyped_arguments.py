"""Formats that write arguments without types: a tool still gets what its schema declares."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest

from tests.assets import load_tokenizer
from tests.rl.test_message_env import TextPolicy, play
from tinker_cookbook.completers import TokenMessageCompleter
from tinker_cookbook.renderers import Message, get_renderer
from tinker_cookbook.tool_use import build_agent_tool_env, tool

XML = (
    "<tool_call>\n<function=find>\n<parameter=zip_code>\n{zip_code}\n</parameter>\n"
    "<parameter=limit>\n{limit}\n</parameter>\n<parameter=note>\n{note}\n</parameter>\n"
    "</function>\n</tool_call>"
)
GLM = (
    "<tool_call>find\n<arg_key>zip_code</arg_key>\n<arg_value>{zip_code}</arg_value>\n"
    "<arg_key>limit</arg_key>\n<arg_value>{limit}</arg_value>\n"
    "<arg_key>note</arg_key>\n<arg_value>{note}</arg_value>\n</tool_call>"
)
FORMATS = [
    ("qwen3_5", "qwen3_5", "Sure.\n</think>\n\n" + XML),
    ("qwen3_6_disable_thinking", "qwen3_6", XML),
    ("nemotron3", "nemotron3_nano", "Sure.\n</think>\n" + XML + "\n"),
    ("glm4_5_disable_thinking", "glm4_5", "\n" + GLM),
]


@pytest.mark.parametrize(("name", "tokenizer", "reply"), FORMATS)
def test_a_tool_gets_the_types_it_declares(name: str, tokenizer: str, reply: str) -> None:
    given: list[tuple[Any, ...]] = []

    @tool
    def find(zip_code: str, limit: int, note: str | None = None, how: Literal["1"] = "1") -> str:
        """Find a place."""
        given.append((zip_code, limit, note, how))
        return "Bern"

    async def grade(history: list[Message]) -> tuple[float, dict[str, float]]:
        return float("tool_error" not in str(history)), {}

    renderer = get_renderer(name, load_tokenizer(tokenizer))
    task: list[Message] = [{"role": "user", "content": "Where is 3011?"}]
    env = build_agent_tool_env(renderer, [find], task, grade)
    how = "<parameter=how>\n1\n</parameter>\n</function>"
    first = reply.format(zip_code="3011", limit=5, note=7).replace("</function>", how)
    answer = reply.partition("<tool_call>")[0].strip("\n") + "Bern."
    done, said = play(renderer, env, first, answer)
    assert given == [("3011", 5, "7", "1")]
    assert done.transitions[0].metrics["num_tool_calls"] == 1
    # What the tool got as text is written as it was sampled.
    assert said.prompts[1].startswith(said.prompts[0] + first)


def test_words_that_look_like_values_stay_words() -> None:
    renderer = get_renderer("qwen3_5", load_tokenizer("qwen3_5"))
    reply = "</think>\n\n" + XML.format(zip_code="None", limit="many", note="null")

    @tool
    def find(zip_code: str, limit: int, note: str | None = None) -> str:
        """Find a place."""
        return f"{zip_code} {note}"

    messages = renderer.declare_tools([{"role": "user", "content": "q"}], [find.to_spec()])
    completer = TokenMessageCompleter(TextPolicy(renderer, reply), renderer)
    (call,) = asyncio.run(completer(messages)).get("tool_calls", [])
    # `null` is not how this format writes nothing, and a number that is none is left to the tool.
    assert call.function.arguments == '{"zip_code": "None", "limit": "many", "note": "null"}'
