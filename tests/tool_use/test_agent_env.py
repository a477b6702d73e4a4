"""Episodes with tools: what a reply earns whose call cannot be read, and how many calls it has."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.renderers.families import FAMILIES
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.types import Message, ToolCall, UnparsedToolCall
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.rollout_limits import RolloutLimits
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import StepResult
from tinker_cookbook.tool_use import AgentToolMessageEnv, build_agent_tool_env, tool

GOOD = '<tool_call>\n{"name": "double", "arguments": {"number": 7}}\n</tool_call>'
BROKEN = '<tool_call>\n{"name": "double", "arguments": {"number": }}\n</tool_call>'


@tool
def double(number: int) -> int:
    """Double a number."""
    return 2 * number


async def always_right(history: list[Message]) -> tuple[float, dict[str, float]]:
    return 1.0, {"length": float(len(history))}


def build(name: str = "qwen3_instruct", **settings: Any) -> EnvFromMessageEnv:
    renderer = get_renderer(name, FAMILIES[name].tokenizer)
    task: list[Message] = [{"role": "user", "content": "double 7"}]
    settings = {"failed_parse_reward": -0.25, "max_turns": 4, **settings}
    return build_agent_tool_env(renderer, [double], task, always_right, **settings)


def say(env: EnvFromMessageEnv, *texts: str, stops: bool = True) -> list[StepResult]:
    async def play() -> list[StepResult]:
        await env.initial_observation()
        renderer = env.renderer
        end = [int(stop) for stop in renderer.get_stop_sequences()[:1] if stops]
        results = []
        for text in texts:
            tokens = renderer.tokenizer.encode(text, add_special_tokens=False)
            results.append(await env.step([*tokens, *end], extra={"stop_reason": "stop"}))
        return results

    return asyncio.run(play())


def shown(env: EnvFromMessageEnv, result: StepResult) -> str:
    return str(env.renderer.tokenizer.decode(result.next_observation.to_ints()))


def test_a_broken_call_is_never_paid_as_an_answer():
    env = build(terminate_on_parse_error=False)
    broken, answer = say(env, BROKEN, "It is 14.")
    assert (broken.reward, broken.episode_done) == (-0.25, False)
    assert broken.metrics["parse_error"] == broken.metrics["tool_error"] == 1
    assert broken.metrics["num_tool_calls"] == 0
    assert "invalid_call" in shown(env, broken)
    assert "parse_error_details" in broken.logs
    assert (answer.reward, answer.episode_done) == (1.0, True)


def test_valid_calls_beside_a_broken_one_run():
    env = build(terminate_on_parse_error=False)
    [result] = say(env, f"{GOOD}\n{BROKEN}")
    assert (result.reward, result.episode_done) == (-0.25, False)
    assert result.metrics["num_tool_calls"] == 1
    text = shown(env, result)
    assert text.index(">\n14\n<") < text.index("invalid_call")


def test_unless_told_otherwise_a_broken_call_ends_the_episode():
    for reply in (BROKEN, f"{GOOD}\n{BROKEN}"):
        [result] = say(build(), reply)
        assert (result.reward, result.episode_done) == (-0.25, True)
        assert result.metrics["stop/parse_error"] == 1


def test_a_reply_that_does_not_end_is_told_so():
    env = build(terminate_on_parse_error=False)
    [result] = say(env, "It is 14.", stops=False)
    assert (result.reward, result.episode_done) == (-0.25, False)
    assert "did not end properly" in shown(env, result)


def test_at_the_last_turn_a_broken_call_costs_its_reward():
    [result] = say(build(terminate_on_parse_error=False, max_turns=1), BROKEN)
    assert (result.reward, result.episode_done) == (0.75, True)
    assert result.metrics["stop/max_turns"] == 1


# How a reply of each format looks whose call cannot be read.
BROKEN_REPLIES = {
    "qwen2_5": BROKEN,
    "qwen3_5_disable_thinking": "<tool_call>\n<function=double>\n<parameter=number>\n7\n"
    "</tool_call>",
    "glm4_5_disable_thinking": "\n<tool_call>double\n<arg_key>number</arg_key>\n7\n</tool_call>",
    "gpt_oss_no_sysprompt": "<|channel|>commentary to=functions.double <|constrain|>json<|message|>"
    '{"number": }<|call|>',
    "kimi_k2_instruct": "<|tool_calls_section_begin|><|tool_call_begin|>functions.double:0"
    '<|tool_call_argument_begin|>{"number": }<|tool_call_end|><|tool_calls_section_end|>',
    "mistral_small": '[TOOL_CALLS]double[ARGS]{"number": }',
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>double<｜tool▁sep｜>"
    '{"number": }<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}


@pytest.mark.parametrize("name", list(BROKEN_REPLIES))
def test_every_format_can_show_the_error(name: str):
    env = build(name, terminate_on_parse_error=False)
    stops = not BROKEN_REPLIES[name].endswith("<|call|>")
    [result] = say(env, BROKEN_REPLIES[name], stops=stops)
    assert (result.reward, result.episode_done) == (-0.25, False)
    assert "invalid_call" in shown(env, result)


def test_messages_given_by_hand_are_judged_alike():
    env = AgentToolMessageEnv([double], [], 3, always_right, failed_parse_reward=-0.5)
    message: Message = {
        "role": "assistant",
        "content": "",
        "unparsed_tool_calls": [UnparsedToolCall(raw_text="double(", error="no end")],
    }
    result = asyncio.run(env.step(message))
    assert (result.reward, result.episode_done) == (-0.5, True)


class Listener(MessageEnv):
    """Takes whatever it is given."""

    async def initial_observation(self) -> list[Message]:
        return [{"role": "user", "content": "hi"}]

    async def step(self, message: Message) -> MessageStepResult:
        return MessageStepResult(0.5, True, [])


def test_other_environments_take_such_a_reply_as_it_is():
    renderer = build().renderer
    env = EnvFromMessageEnv(renderer, Listener(), terminate_on_parse_error=False)
    [result] = say(env, BROKEN)
    assert (result.reward, result.metrics["parse_error"]) == (0.5, 1)


@pytest.mark.parametrize("limits", [(2, 5), (5, 2)])
def test_the_tighter_cap_of_calls_holds(limits: tuple[int, int]):
    env = AgentToolMessageEnv([double], [], 9, always_right, max_tool_calls=limits[0])
    env.set_max_tool_calls(limits[1])
    env.set_max_tool_calls(9)
    call = ToolCall(function=ToolCall.FunctionBody(name="double", arguments='{"number": 1}'))
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    results = [asyncio.run(env.step(message)) for _ in range(3)]
    assert [result.episode_done for result in results] == [False, False, True]
    assert results[2].metrics["stop/max_tool_calls"] == 1


def test_a_cap_of_the_run_does_not_loosen_that_of_the_environment():
    from tests.rl.test_message_env import TextPolicy

    env = build(max_tool_calls=1)
    policy = TextPolicy(env.renderer, GOOD, GOOD, GOOD)
    limits = RolloutLimits(max_tool_calls=50)
    done = asyncio.run(run_rollout(policy, env, limits=limits))
    assert (len(done.transitions), done.stop_reason) == (2, "max_tool_calls")
