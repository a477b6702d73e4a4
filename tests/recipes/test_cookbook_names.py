"""Recipe modules by the names that programs of the cookbook import: their data, graders, games."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import chz
import pytest

from recipes.chat_sl.chat_datasets import NoRobotsBuilder, Tulu3Builder
from recipes.code_rl.code_env import DeepcoderDatasetBuilder
from recipes.code_rl.code_grading import (
    extract_code_from_model,
    normalize_tests,
    postprocess_lcb_sample,
    sandbox_check_correctness,
    taco_to_lcb_format,
)
from recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from recipes.math_rl.math_env import (
    Gsm8kDatasetBuilder,
    MathEnv,
    get_math_dataset_builder,
    safe_grade,
)
from recipes.math_rl.math_grading import (
    grade_answer,
    grade_answer_math_verify,
    normalize_answer,
    run_with_timeout_signal,
)
from recipes.multiplayer_rl.guess_number.env import GuessNumberDatasetBuilder
from recipes.multiplayer_rl.text_arena.env import TwoPlayerTextArenaDatasetBuilder
from recipes.multiplayer_rl.twenty_questions.env import TwentyQuestionsEnv
from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook.completers import MessageCompleter
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl import train
from tinker_cookbook.rl.types import StepResult
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

FORMAT = "qwen3_instruct"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def model() -> str:
    return str(tokenizer_folder("qwen3_instruct_2507"))


def rl_settings(**settings: object) -> dict:
    shared = {
        "batch_size": 2,
        "model_name_for_tokenizer": model(),
        "renderer_name": FORMAT,
        "group_size": 3,
    }
    return shared | settings


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reply(env, text: str) -> StepResult:
    async def play() -> StepResult:
        await env.initial_observation()
        tokens = env.renderer.tokenizer.encode(text, add_special_tokens=False)
        return await env.step([*tokens, int(env.renderer.get_stop_sequences()[0])])

    return asyncio.run(play())


# ---- mathematics ----


def test_mathematics_comes_from_a_file(tmp_path: Path):
    rows = [{"question": f"{i} + 1?", "answer": f"... #### {i + 1}"} for i in range(5)]
    path = write_rows(tmp_path / "p.jsonl", *rows)
    builder = Gsm8kDatasetBuilder(**rl_settings(file_path=path))
    config = train.Config(
        model_name=model(),
        recipe_name="mine",
        log_path=str(tmp_path),
        dataset_builder=builder,
        learning_rate=1e-4,
        max_tokens=4,
    )
    dataset, held_out = asyncio.run(config.dataset_builder())
    assert (len(dataset), held_out) == (2, None)
    [first, _] = dataset.get_batch(0)
    envs = asyncio.run(first.make_envs())
    assert len(envs) == 3
    assert first.logging_tags() == ["gsm8k"]
    env = envs[0]
    assert isinstance(env, MathEnv)
    assert reply(env, f"so \\boxed{{{env.answer}}}").reward == 1.0
    assert reply(envs[1], "no box").reward == -0.1


@pytest.mark.parametrize("name", ["math", "gsm8k", "polaris", "deepmath"])
def test_without_a_hub_the_builders_say_what_is_missing(name: str, no_hub):
    builder = get_math_dataset_builder(name, 2, model(), FORMAT, 3)
    with pytest.raises(ConfigurationError, match=r"cannot be fetched: .*file_path=problems.jsonl"):
        asyncio.run(builder())


def test_unknown_data_sets_are_refused():
    with pytest.raises(ConfigurationError, match="dataset_name='aime' is unknown; use one of math"):
        get_math_dataset_builder("aime", 2, model(), FORMAT, 3)


def test_sums_are_the_same_at_the_same_step():
    builder = ArithmeticDatasetBuilder(**rl_settings(n_batches=4))
    dataset, held_out = asyncio.run(builder())
    assert (len(dataset), held_out) == (4, None)
    first, again = (dataset.get_batch(1)[0].env_thunk() for _ in range(2))
    assert (first.x, first.y) == (again.x, again.y)
    assert reply(first, f"it is {first.x + first.y}").reward == 1.0
    assert reply(again, "I do not know").reward == 0.0


@pytest.mark.parametrize(
    ("given", "wanted", "same"),
    [
        (r"\dfrac{1}{2}", r"\frac12", True),
        (r"\text{Paris}", "Paris", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("x = 5", "5", True),
        (r"90^\circ", "90", True),
        ("2 + x", "x + 2", True),
        ("x", "y", False),
        (None, "5", False),
        ("1e10000000", "5", False),
    ],
)
def test_answers_are_graded_whatever_their_typography(given, wanted: str, same: bool):
    assert grade_answer(given, wanted) is same
    if given is not None:
        assert safe_grade(given, wanted) is same
    assert normalize_answer(None) is None


def test_expressions_and_slow_calls():
    assert grade_answer_math_verify("2x", "x + x")
    assert run_with_timeout_signal(lambda a, b: a + b, (1,), {"b": 2}) == 3
    slow = threading.Event().wait  # gives False after the time it is told
    assert run_with_timeout_signal(slow, (0.01,), timeout_seconds=60) is False
    assert run_with_timeout_signal(slow, (60,), timeout_seconds=0.05) is None
    with pytest.raises(ZeroDivisionError):
        run_with_timeout_signal(lambda: 1 / 0)


# ---- code ----

STDIN_TESTS = [{"input": "3\n", "output": "6\n", "testtype": "stdin"}]
CALL_TESTS = taco_to_lcb_format({"inputs": [[3]], "outputs": [[6]], "fn_name": "twice"})


@pytest.mark.parametrize(
    ("tests", "code", "passes"),
    [
        (STDIN_TESTS, "print(2 * int(input()))", True),
        (STDIN_TESTS, "print(input())", False),
        (CALL_TESTS, "def twice(n):\n    return 2 * n", True),
        (CALL_TESTS, "class Solution:\n    def twice(self, n):\n        return 2 * n", True),
        (CALL_TESTS, "def twice(n):\n    return n", False),
        (CALL_TESTS, "def twice(n):\n    raise KeyError(n)", False),
    ],
)
def test_code_is_run_against_tests_of_both_kinds(tests: list, code: str, passes: bool):
    verdict, found = asyncio.run(sandbox_check_correctness(tests, code, timeout=20))
    assert verdict is passes
    assert bool(found.get("error")) is not passes


def test_tests_are_read_in_the_forms_of_the_data_sets():
    assert normalize_tests(json.dumps(STDIN_TESTS)) == STDIN_TESTS
    assert normalize_tests({"inputs": ["1"], "outputs": ["2"]})[0]["testtype"] == "stdin"
    [test] = normalize_tests([{"input": "1", "output": "2"}], {"func_name": "f"})
    assert test["metadata"] == {"func_name": "f"}
    sample = json.loads(postprocess_lcb_sample(CALL_TESTS)["input_output"])
    assert sample == {"inputs": [[3]], "outputs": [[6]], "fn_name": "twice"}
    with pytest.raises(DataFormatError, match="tests of type int"):
        normalize_tests(5)
    assert extract_code_from_model("a ```python\nx = 1\n``` b ```\ny = 2\n```") == "y = 2"
    assert extract_code_from_model("no code") is None


def test_a_programming_problem_without_tests_is_named(tmp_path: Path):
    path = write_rows(tmp_path / "p.jsonl", {"problem": "Double a number.", "tests": None})
    builder = DeepcoderDatasetBuilder(**rl_settings(file_path=path, reward_timeout=20))
    with pytest.raises(DataFormatError, match=r"p.jsonl.*tests=None; needs problem .* and tests"):
        asyncio.run(builder())


def test_programming_problems_come_from_a_file(tmp_path: Path):
    rows = [{"problem": "Double a number.", "tests": STDIN_TESTS}] * 2
    path = write_rows(tmp_path / "p.jsonl", *rows)
    builder = DeepcoderDatasetBuilder(**rl_settings(file_path=path, reward_timeout=20))
    dataset, held_out = asyncio.run(builder())
    assert (len(dataset), held_out) == (1, None)
    [group, _] = dataset.get_batch(0)
    env, other, _ = asyncio.run(group.make_envs())
    done = reply(env, "```python\nprint(2 * int(input()))\n```")
    assert (done.reward, done.episode_done) == (1.0, True)
    shown = reply(other, "```python\nprint(0)\n```")
    assert not shown.episode_done
    text = env.renderer.tokenizer.decode(shown.next_observation.to_ints())
    assert "printed '0" in str(text)
    asyncio.run(group.cleanup())
    assert group.sandboxes == []


def test_without_a_hub_problems_are_missed_by_name(no_hub):
    with pytest.raises(ConfigurationError, match=r"DeepCoder-Preview-Dataset cannot be fetched"):
        asyncio.run(DeepcoderDatasetBuilder(**rl_settings())())


# ---- chats ----


def chat_config(**settings: object) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model(),
        renderer_name=FORMAT,
        max_length=64,
        batch_size=2,
        **settings,
    )


@pytest.mark.parametrize(("builder", "num_trained"), [(NoRobotsBuilder, 2), (Tulu3Builder, 1)])
def test_chats_come_from_a_file_with_each_sets_own_training(builder, num_trained, tmp_path: Path):
    talk = [{"role": role, "content": "hi"} for role in ("user", "assistant")] * 2
    path = write_rows(tmp_path / "c.jsonl", *[{"messages": talk}] * 3)
    made = builder(common_config=chat_config(), file_path=path, test_size=1)
    dataset, held_out = made()
    assert (len(dataset), len(held_out)) == (1, 1)
    [datum, _] = dataset.get_batch(0)
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    assert (weights > 0).sum() == 2 * num_trained  # the word and the end of each trained reply
    dataset.close()
    own = chz.replace(made, common_config=chat_config(train_on_what=TrainOnWhat.ALL_TOKENS))
    [datum, _] = own()[0].get_batch(0)
    assert (datum.loss_fn_inputs["weights"].to_numpy() > 0).all()


@pytest.mark.parametrize("builder", [NoRobotsBuilder, Tulu3Builder])
def test_without_a_hub_chats_are_missed_by_name(builder, no_hub):
    with pytest.raises(ConfigurationError, match=r"cannot be fetched.*conversations.jsonl"):
        builder(common_config=chat_config())()


# ---- games ----


def test_numbers_are_guessed():
    builder = GuessNumberDatasetBuilder(
        batch_size=32, model_name=model(), renderer_name=FORMAT, train_group_size=8
    )
    dataset, held_out = asyncio.run(builder())
    assert (len(dataset), len(held_out)) == (28, 1)
    group, test = dataset.get_batch(0)[0], held_out.get_batch(0)
    assert not {game.answer for game in test} & set(dataset.answers)
    first, second, *_ = asyncio.run(group.make_envs())
    assert reply(first, str(group.answer)).reward == 1.0
    assert reply(second, "what?").reward == -1.0


class SaysYes(MessageCompleter):
    """Knows the rules and the question, and nothing else."""

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []

    async def __call__(self, messages: list[Message]) -> Message:
        self.asked.append(messages)
        return {"role": "assistant", "content": "yes"}


def test_words_are_asked_for():
    renderer = get_renderer(FORMAT, load_tokenizer("qwen3_instruct_2507"))
    answerer = SaysYes()
    asked = reply(TwentyQuestionsEnv(answerer, "whale", renderer), "Is it big?")
    assert not asked.episode_done
    [messages] = answerer.asked
    assert "whale" in str(messages[0]["content"])
    assert messages[1]["content"] == "Is it big?"
    won = reply(TwentyQuestionsEnv(answerer, "whale", renderer), "I know.\nGuess: Whale.")
    assert (won.reward, won.episode_done, len(answerer.asked)) == (1.0, True, 1)


def test_a_batch_of_games_holds_a_group():
    builder = TwoPlayerTextArenaDatasetBuilder(
        batch_size=1, model_name=model(), renderer_name=FORMAT
    )
    with pytest.raises(ConfigurationError, match="batch_size=1 is less than group_size=2"):
        asyncio.run(builder())
