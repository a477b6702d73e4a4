import asyncio
import io

import pytest

from recipes import play_env
from recipes.multiturn.games import NumberGame, ThingGame, read_guess
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import MessageEnv, MessageStepResult


def say(env: MessageEnv, *texts: str) -> list[MessageStepResult]:
    async def play() -> list[MessageStepResult]:
        await env.initial_observation()
        messages: list[Message] = [{"role": "assistant", "content": text} for text in texts]
        return [await env.step(message) for message in messages]

    return asyncio.run(play())


def test_guesses_are_told_higher_or_lower():
    first, second, third = say(NumberGame(40, 100, 5), "20", "60", "40")
    assert first.next_messages[-1]["content"] == "Higher."
    assert second.next_messages[-1]["content"] == "Lower."
    assert (third.reward, third.episode_done, third.metrics["guesses"]) == (1.0, True, 3.0)


def test_the_last_guess_is_worth_its_closeness():
    *_, last = say(NumberGame(40, 100, 2), "0", "50")
    assert last.episode_done
    assert last.reward == pytest.approx(0.45)


@pytest.mark.parametrize("text", ["no idea", "3 or 4", ""])
def test_other_replies_lose(text: str):
    assert read_guess(text) is None
    assert say(NumberGame(40, 100, 5), text)[0].reward == -1.0


def test_questions_are_answered_and_the_name_ends_it():
    asked, no, named = say(ThingGame("whale", 8), "Alive?", "wings", "It is a whale")
    assert asked.next_messages[-1]["content"] == "Yes."
    assert no.next_messages[-1]["content"] == "No."
    assert named.reward == pytest.approx(1 - 0.5 * 2 / 8)
    assert say(ThingGame("whale", 8), "cat")[0].reward == 0.0
    assert "not understand" in str(say(ThingGame("cat", 8), "x")[0].next_messages[-1])


def test_a_person_can_play(local_service, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("three little words\n"))
    config = play_env.Config(model_name=local_service.model, renderer_name="chatml")
    play_env.main(config)
    out = capsys.readouterr().out
    assert "Write exactly" in out
    assert "total reward" in out


def test_a_person_can_leave(local_service, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    play_env.main(play_env.Config(model_name=local_service.model, renderer_name="chatml"))
    assert "the input has ended; the episode is left unfinished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 1_000}, r"batch=1000 is beyond the data; use 0 to 39\."),
        ({"batch": -1}, "batch=-1 is negative"),
        ({"settings": "[1]"}, "is not a JSON object; write settings="),
        ({"settings": '{"seed": "x"}'}, "seed=x has the wrong type"),
        ({"settings": '{"num_batches": 0}'}, "num_batches=0 is less than 1"),
        ({"env": "no.module:Name"}, r"env=no.module:Name cannot be imported \(No module"),
    ],
)
def test_mistakes_are_told_before_anybody_plays(local_service, settings: dict, message: str):
    fixed = {"renderer_name": "chatml", "model_name": local_service.model}
    with pytest.raises(ConfigurationError, match=message):
        play_env.main(play_env.Config(**fixed | settings))


def test_a_model_can_play(local_service, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    play_env.main(
        play_env.Config(
            env="recipes.multiturn.games:MultiturnDatasetBuilder",
            model_name=local_service.model,
            base_url=local_service.base_url,
            renderer_name="chatml",
            player="model",
            max_tokens=4,
        )
    )
    assert "total reward" in capsys.readouterr().out


def test_unknown_settings_are_refused():
    config = play_env.Config(settings='{"sed": 1}', renderer_name="chatml")
    with pytest.raises(ConfigurationError, match=r"settings has sed, which .* does not know; use"):
        play_env.build_dataset_builder(config, "m")


@pytest.mark.parametrize("env", ["rl_basic", "math_rl", "multiturn", "self_play", "code_rl"])
def test_recipes_are_played_by_name(env: str):
    config = play_env.Config(env=env, settings='{"seed": 7}', renderer_name="chatml")
    builder = play_env.build_dataset_builder(config, "m")
    assert isinstance(builder, RenderedDatasetBuilder)
    assert (builder.seed, builder.renderer_name) == (7, "chatml")


@pytest.mark.parametrize("env", ["sl_basic", "play_env", "nothing"])
def test_other_recipes_are_refused(env: str):
    with pytest.raises(ConfigurationError, match=f"env={env} is not a recipe with environments"):
        play_env.build_dataset_builder(play_env.Config(env=env), "m")


def test_a_missing_setting_is_named():
    config = play_env.Config(
        env="recipes.math_rl.answer_env:AnswerDatasetBuilder", renderer_name="chatml"
    )
    with pytest.raises(ConfigurationError, match=r"settings={} does not fit.*'env'"):
        play_env.build_dataset_builder(config, "m")
