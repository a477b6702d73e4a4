"""Games of textarena: with the package where it is installed, else in a slow test."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tinker

from tinker_cookbook import renderers, tokenizer_utils
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.textarena_env import TextArenaDatasetBuilder, TextArenaEnv

ROOT = Path(__file__).parents[2]
sys.path += [path for path in [os.environ.get("TEXTARENA_PATH")] if path]
try:
    import textarena  # pyright: ignore[reportMissingImports]
except ImportError:
    textarena = None
needs_textarena = pytest.mark.skipif(textarena is None, reason="textarena is not installed")


@pytest.mark.skipif(textarena is not None, reason="textarena is installed")
def test_without_the_package_its_extra_is_named():
    with pytest.raises(ConfigurationError, match=r"pip install 'tinker-cookbook\[textarena\]'"):
        TextArenaEnv("TicTacToe-v0")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(textarena is not None, reason="textarena is installed")
def test_with_the_package_in_a_folder_of_its_own(tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, "textarena>=0.7.4,<0.8"], check=True)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TEXTARENA_PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "7 passed" in found.stdout


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


class Moves(TokenCompleter):
    """Says the moves it is given; the copy for the environment says the opponent's."""

    def __init__(self, renderer: renderers.Renderer, own: list[str], others: list[str]) -> None:
        self._renderer = renderer
        self._texts = list(own)
        self._others = others

    def for_rollout(self, *names: int | str) -> TokenCompleter:
        return Moves(self._renderer, self._others, [])

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        tokens = self._renderer.tokenizer.encode(self._texts.pop(0), add_special_tokens=False)
        tokens = [*tokens, int(self._renderer.get_stop_sequences()[0])]
        return TokensWithLogprobs(tokens, [-1.0] * len(tokens))


def play(renderer: renderers.Renderer, seat: int, own: list[str], others: list[str]):
    env = EnvFromMessageEnv(renderer, TextArenaEnv("TicTacToe-v0", seat=seat))
    return asyncio.run(run_rollout(Moves(renderer, own, others), env))


@needs_textarena
@pytest.mark.parametrize(
    ("seat", "own", "others", "reward"),
    [
        (0, ["[0]", "[1]", "[2]"], ["[3]", "[4]"], 1.0),
        (0, ["[0]", "[1]", "[8]"], ["[3]", "[4]", "[5]"], -1.0),
        (1, ["[3]", "[4]", "[5]"], ["[0]", "[1]", "[8]"], 1.0),
    ],
)
def test_games_are_played_to_their_end(renderer, seat: int, own, others, reward: float):
    done = play(renderer, seat, own, others)
    assert [turn.reward for turn in done.transitions] == [0.0] * (len(own) - 1) + [reward]
    assert done.transitions[-1].metrics["won"] == float(reward > 0)
    first = renderer.tokenizer.decode(done.transitions[0].ob.to_ints())
    assert f"You are Player {seat}" in first
    assert len(trajectory_to_data(done, 1.0)) == 1  # every turn extends the one before


@needs_textarena
def test_a_move_that_is_none_loses(renderer):
    done = play(renderer, 0, ["what?", "why?"], [])
    assert sum(turn.reward for turn in done.transitions) == -1.0
    assert done.transitions[-1].metrics["invalid_move"] == 1.0


@needs_textarena
def test_games_are_functions_of_their_seed_and_leave_the_global_draws_alone(renderer):
    random.seed(5)
    expected = random.random()
    random.seed(5)
    envs = [TextArenaEnv("Nim-v0", seed=seed) for seed in (1, 1, 2)]
    first, second, _ = [asyncio.run(env.initial_observation()) for env in envs]
    assert first == second
    assert random.random() == expected


@needs_textarena
def test_unknown_games_are_refused():
    with pytest.raises(ConfigurationError, match="game=Chess-v99 is not a game of textarena"):
        TextArenaEnv("Chess-v99")


@needs_textarena
def test_the_model_takes_each_seat_in_turn(tiny_model_folder: Path):
    data = TextArenaDatasetBuilder(
        model_name=str(tiny_model_folder),
        renderer_name="chatml",
        groups_per_batch=2,
        group_size=2,
        game="TicTacToe-v0",
        num_batches=1,
        test_games=1,
    )
    trained, held_out = asyncio.run(data())
    assert held_out is not None
    groups = [pickle.loads(pickle.dumps(group)) for group in trained.get_batch(0)]
    assert [group.logging_tags() for group in groups] == [["tictactoe"]] * 2
    envs = [asyncio.run(group.make_envs()) for group in groups]
    assert [len(made) for made in envs] == [2, 2]
    assert [made[0].message_env._seat for made in envs] == [0, 1]
