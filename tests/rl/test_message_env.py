"""Message environments through a real renderer and tokenizer."""

import asyncio
from typing import Any

import pytest
import tinker

from tests.assets import load_tokenizer
from tinker_cookbook import renderers
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.rollout_limits import ParseErrorPolicy
from tinker_cookbook.rl.rollout_logging import RolloutSummaryGroup
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.transcripts.page import build_page
from tinker_cookbook.rl.types import RolloutError, Trajectory, TrajectoryGroup
from tinker_cookbook.tool_use import build_agent_tool_env, tool


@pytest.fixture(scope="module")
def renderer() -> renderers.Renderer:
    return renderers.get_renderer("qwen3_instruct", load_tokenizer("qwen3_instruct_2507"))


class TextPolicy(TokenCompleter):
    """Says given texts; `<cut>` at the end stands for the token limit."""

    def __init__(self, renderer: renderers.Renderer, *texts: str) -> None:
        self._renderer = renderer
        self._texts = list(texts)
        self.prompts: list[str] = []

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        tokenizer = self._renderer.tokenizer
        self.prompts.append(str(tokenizer.decode(model_input.to_ints())))
        text = self._texts.pop(0)
        tokens = tokenizer.encode(text.removesuffix("<cut>"), add_special_tokens=False)
        if text.endswith("<cut>"):
            return TokensWithLogprobs(tokens, [-1.0] * len(tokens), "length")
        end = self._renderer.get_stop_sequences()[0]
        return TokensWithLogprobs([*tokens, int(end)], [-1.0] * (len(tokens) + 1))


class Parrot(MessageEnv):
    """Answers `again` until it has heard three messages."""

    def __init__(self, num_turns: int = 3) -> None:
        self.messages: list[Message] = [{"role": "user", "content": "speak"}]
        self.num_turns = num_turns

    async def initial_observation(self) -> list[Message]:
        return self.messages

    async def step(self, message: Message) -> MessageStepResult:
        self.messages = [*self.messages, message, {"role": "user", "content": "again"}]
        heard = sum(message["role"] == "assistant" for message in self.messages)
        return MessageStepResult(1.0, heard >= self.num_turns, self.messages)

    async def add_messages(self, messages: list[Message]) -> list[Message]:
        self.messages = [*self.messages, *messages]
        return self.messages


def play(renderer: renderers.Renderer, env: Any, *texts: str) -> tuple[Trajectory, TextPolicy]:
    policy = TextPolicy(renderer, *texts)
    return asyncio.run(run_rollout(policy, env)), policy


def rewards(trajectory: Trajectory) -> list[float]:
    return [turn.reward for turn in trajectory.transitions]


def test_turns_of_a_conversation_share_one_datum(renderer):
    done, _ = play(renderer, EnvFromMessageEnv(renderer, Parrot()), "one", "two fish", "three")
    assert rewards(done) == [1.0, 1.0, 1.0]
    (datum,) = trajectory_to_data(done, 1.0)
    sampled = sum(len(turn.ac.tokens) for turn in done.transitions)
    assert datum.loss_fn_inputs["mask"].to_numpy().sum() == sampled


def test_a_cut_reply_ends_the_episode(renderer):
    done, _ = play(renderer, EnvFromMessageEnv(renderer, Parrot()), "one", "two and<cut>")
    assert rewards(done) == [1.0, -0.1]
    assert done.stop_reason == "max_tokens"
    assert done.transitions[-1].metrics["max_tokens_reached"] == 1


def test_an_unreadable_reply_ends_the_episode(renderer):
    broken = "<tool_call>\n{not json}\n</tool_call>"
    done, _ = play(renderer, EnvFromMessageEnv(renderer, Parrot()), broken)
    assert rewards(done) == [-1.0]
    assert done.stop_reason == "parse_error"
    assert "parse_error_details" in done.transitions[0].logs


def test_an_unreadable_reply_may_be_tried_again(renderer):
    policy = ParseErrorPolicy(max_consecutive=1, penalty_per_error=0.25, mask_error_turns=True)
    env = EnvFromMessageEnv(renderer, Parrot(num_turns=2), parse_error_policy=policy)
    broken = "<tool_call>\n{not json}\n</tool_call>"
    done, said = play(renderer, env, broken, "fine")
    assert rewards(done) == [-0.25, 1.0]
    assert "could not be read" in said.prompts[1]
    masks = [datum.loss_fn_inputs["mask"].to_numpy().sum() for datum in trajectory_to_data(done, 1)]
    assert sum(masks) == len(done.transitions[1].ac.tokens)
    env = EnvFromMessageEnv(renderer, Parrot(), parse_error_policy=policy)
    done, _ = play(renderer, env, broken, broken)
    assert rewards(done) == [-0.25, -0.25]
    assert done.stop_reason == "parse_error"


def test_prompts_that_grow_too_long_end_the_episode(renderer):
    first = renderer.build_generation_prompt([{"role": "user", "content": "speak"}]).length
    env = EnvFromMessageEnv(renderer, Parrot(), max_trajectory_tokens=first + 2)
    done, _ = play(renderer, env, "a long reply")
    assert rewards(done) == [pytest.approx(0.9)]
    assert done.stop_reason == "context_overflow"
    tight = EnvFromMessageEnv(renderer, Parrot(), max_trajectory_tokens=first - 1)
    done, _ = play(renderer, tight)
    assert done.stop_reason == "context_overflow"
    assert rewards(done) == [-0.1]


@tool
def double(number: int) -> int:
    """Double a number."""
    return 2 * number


async def grade(history: list[Message]) -> tuple[float, dict[str, float]]:
    right = "14" in str(history[-1]["content"])
    return float(right), {"right": float(right)}


def tool_env(renderer: renderers.Renderer, **settings: Any) -> EnvFromMessageEnv:
    task: list[Message] = [{"role": "user", "content": "double 7"}]
    return build_agent_tool_env(renderer, [double], task, grade, **settings)


CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 7}}\n</tool_call>'


def test_tools_are_called_and_the_answer_is_graded(renderer):
    done, said = play(renderer, tool_env(renderer), CALL, "It is 14.")
    assert "Double a number." in said.prompts[0]
    assert "14" in said.prompts[1]
    assert rewards(done) == [0.0, 1.0]
    assert done.transitions[1].metrics["right"] == 1.0
    assert done.transitions[0].metrics["num_tool_calls"] == 1
    assert len(trajectory_to_data(done, 1.0)) == 1


def test_bad_calls_are_answered_with_the_error(renderer):
    wrong = CALL.replace("7", '"seven"')
    done, said = play(renderer, tool_env(renderer), wrong, "I give up.")
    assert "valid integer" in said.prompts[1]
    assert done.transitions[0].metrics["tool_error"] == 1
    assert rewards(done) == [0.0, 0.0]


def test_turns_are_limited(renderer):
    done, _ = play(renderer, tool_env(renderer, max_turns=2), CALL, CALL)
    assert done.stop_reason == "max_turns"


class Sum(ProblemEnv):
    def get_question(self) -> str:
        return "1 + 1?"

    def check_answer(self, sample_str: str) -> bool:
        return sample_str == "2"

    def check_format(self, sample_str: str) -> bool:
        return sample_str.isdigit()

    def get_reference_answer(self) -> str:
        return "2"


@pytest.mark.parametrize(
    ("reply", "reward"), [("2", 1.0), ("3", 0.0), ("two", -0.1), ("2<cut>", 0.9)]
)
def test_problems_reward_answer_and_format(renderer, reply: str, reward: float):
    done, _ = play(renderer, Sum(renderer), reply)
    assert rewards(done) == [pytest.approx(reward)]
    assert done.transitions[0].logs["reference_answer"] == "2"


def test_a_group_of_a_problem(renderer):
    builder = ProblemGroupBuilder(lambda: Sum(renderer), 3, "sums")
    assert len(asyncio.run(builder.make_envs())) == 3
    assert builder.logging_tags() == ["sums"]
    with pytest.raises(ValueError, match="num_envs=0 is less than 1"):
        ProblemGroupBuilder(lambda: Sum(renderer), 0)


def test_the_page_shows_everything_and_escapes_it(renderer):
    done, _ = play(renderer, tool_env(renderer), CALL, "It is <b>14</b> 你好.")
    other, _ = play(renderer, tool_env(renderer), "no idea")
    other.transitions[-1].ac.stop_reason = "length"
    errors = [RolloutError("OSError", "Env: OSError at env.py:3: <gone>")]
    group = TrajectoryGroup([done, other], [0.5, 0.0], [{"bonus": 0.5}, {}], errors)
    page = build_page(
        "train, step 3", [RolloutSummaryGroup(group, ["easy"])], 9, renderer.tokenizer
    )
    for text in (
        "1 of 9 groups",
        "Group 0 (easy)",
        "double 7",
        "reward <b>1.500</b>",
        "+0.750",
        "num_tool_calls",
        "bonus",
        "&lt;gone&gt;",
        "-1.000",  # a log probability
        "-1.00 nats each",
        "cut by the token limit",
        "你",
    ):
        assert text in page, text
    assert "<b>14</b>" not in page
    assert "http" not in page
    assert "does not begin with the tokens" not in page
    item = RolloutSummaryGroup(group, [])
    done.transitions[1].ob = tinker.ModelInput.from_ints([1, 2, 3])
    assert "does not begin with the tokens" in build_page("t", [item], 1, renderer.tokenizer)
    assert "+1.000" in build_page("t", [item], 1, renderer.tokenizer, estimator="group_std")
