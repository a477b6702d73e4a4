"""The game recipe: rules, opponents, self-play with the policy's own weights, and a run."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
import tinker

from recipes import play_env
from recipes.self_play import __main__ as module
from recipes.self_play.envs import (
    ILLEGAL_REWARD,
    TAKEN_REWARD,
    GameGroup,
    SelfPlayDatasetBuilder,
    TicTacToeEnv,
)
from recipes.self_play.players import PerfectPlayer, Player, RandomPlayer, make_player
from recipes.self_play.tictactoe import EMPTY, best_moves, play, read_move, value, winner
from tests.recipes.rl_runs import read_replies, run_two_steps
from tinker_cookbook import renderers, service, tokenizer_utils
from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.message_env import EnvFromMessageEnv
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import Trajectory


def board_of(*squares: int) -> str:
    board = EMPTY
    for square in squares:
        board = play(board, square)
    return board


def test_winners():
    assert winner(board_of(1, 4, 2, 5, 3)) == "X"
    assert winner(board_of(1, 4, 2, 5, 9, 6)) == "O"
    assert winner(board_of(1, 2, 3, 5, 4, 6, 8, 7, 9)) == "draw"
    assert winner(board_of(1, 2)) is None


def test_the_perfect_player_knows_the_game():
    assert value(EMPTY) == 0
    assert best_moves(board_of(1, 4, 2, 5)) == [3]  # wins at once
    assert best_moves(board_of(1, 5, 2)) == [3]  # must block


def test_the_perfect_player_never_loses():
    async def game(seed: int) -> str | None:
        players: list[Player] = [PerfectPlayer(seed), RandomPlayer(seed)]
        board, turn = EMPTY, seed % 2
        while winner(board) is None:
            square = await players[turn].move(board)
            assert square is not None
            board, turn = play(board, square), 1 - turn
        loser = "O" if seed % 2 == 0 else "X"
        return "lost" if winner(board) == loser and winner(board) != "draw" else "fine"

    async def games() -> list[str | None]:
        return [await game(seed) for seed in range(60)]

    # With an even seed the perfect player is X, so that the random one is O.
    results = asyncio.run(games())
    assert results.count("fine") + results.count("lost") == 60
    assert "lost" not in results


@pytest.mark.parametrize(
    ("text", "move"),
    [("5", 5), ("I take 3.", 3), ("1", None), ("3 or 4", None), ("", None), ("12", None)],
)
def test_moves_are_read(text: str, move: int | None):
    assert read_move(text, board_of(1)) == move


class NumbersPolicy(TokenCompleter):
    """Says the numbers it is given; copies for the environment say theirs."""

    def __init__(self, renderer: renderers.Renderer, own: list[str], opponent: list[str]) -> None:
        self._renderer = renderer
        self._texts = list(own)
        self._opponent = opponent
        self.prompts: list[str] = []

    def for_rollout(self, *names: int | str) -> TokenCompleter:
        assert names == ("environment",)
        return NumbersPolicy(self._renderer, self._opponent, [])

    async def __call__(
        self, model_input: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        tokenizer = self._renderer.tokenizer
        tokens = tokenizer.encode(self._texts.pop(0), add_special_tokens=False)
        end = int(self._renderer.get_stop_sequences()[0])
        return TokensWithLogprobs([*tokens, end], [-1.0] * (len(tokens) + 1))


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> renderers.Renderer:
    return renderers.get_renderer("chatml", tokenizer_utils.get_tokenizer(str(tiny_model_folder)))


def rollout(renderer, board: str, own: list[str], opponent: list[str]) -> Trajectory:
    env = EnvFromMessageEnv(renderer, TicTacToeEnv(board, None, "0"))
    return asyncio.run(run_rollout(NumbersPolicy(renderer, own, opponent), env))


def test_the_policy_plays_itself(renderer):
    won = rollout(renderer, EMPTY, ["1", "2", "3"], ["4", "5"])
    assert [turn.reward for turn in won.transitions] == [0.0, 0.0, 1.0]
    assert won.transitions[-1].metrics["won"] == 1.0
    lost = rollout(renderer, EMPTY, ["1", "2", "9"], ["4", "5", "6"])
    assert (lost.transitions[-1].reward, lost.transitions[-1].metrics["lost"]) == (0.0, 1.0)
    as_second = rollout(renderer, board_of(1), ["4", "5", "6"], ["2", "9"])
    assert as_second.transitions[-1].metrics["won"] == 1.0


def test_an_illegal_reply_ends_the_game(renderer):
    done = rollout(renderer, EMPTY, ["1", "1"], ["4"])
    assert [turn.reward for turn in done.transitions] == [0.0, TAKEN_REWARD]
    assert done.transitions[-1].metrics["illegal"] == 1.0
    done = rollout(renderer, EMPTY, ["the middle"], [])
    assert [turn.reward for turn in done.transitions] == [ILLEGAL_REWARD]


def test_an_opponent_that_says_nonsense_makes_any_move(renderer):
    done = rollout(renderer, EMPTY, ["1", "1"], ["what?"])
    assert done.transitions[0].metrics["opponent_illegal"] == 1.0


def test_other_opponents_are_models_of_the_service(
    local_service, renderer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    with pytest.raises(ConfigurationError, match="no connection is open"):
        make_player("no-model", "0", renderer, 4)
    with service.connect(local_service.base_url, local_service.model):
        player = make_player(local_service.model, "0", renderer, 2)
        assert player is not None
        assert asyncio.run(player.move(EMPTY)) in (None, *range(1, 10))
        with pytest.raises(
            ConfigurationError, match="opponent=no-model is unknown; use self, random"
        ):
            make_player("no-model", "0", renderer, 4)


def test_the_members_of_a_group_start_from_one_position(tiny_model_folder: Path):
    data = SelfPlayDatasetBuilder(
        model_name=str(tiny_model_folder),
        renderer_name="chatml",
        groups_per_batch=4,
        group_size=2,
        opponent="self",
        test_opponent="random",
        num_batches=2,
        test_games=3,
        max_tokens=4,
    )
    sides = {GameGroup(data, "self", number).logging_tags()[0] for number in range(9)}
    assert sides == {"as_X", "as_O"}

    async def prompts() -> list[list[int]]:
        envs = await GameGroup(data, "random", 7).make_envs()
        return [(await env.initial_observation())[0].to_ints() for env in envs]  # pyright: ignore[reportIndexIssue]

    first, second = asyncio.run(prompts())
    assert first == second


def test_it_runs(local_service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    rows = run_two_steps(
        module, local_service, tmp_path / "run", capsys, test_games=2, renderer_name="chatml"
    )
    assert rows[0]["env/all/total_episodes"] == 4
    assert len(read_replies(tmp_path / "run", 0)) == 4


def test_a_person_can_play(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("nonsense\n"))
    play_env.main(
        play_env.Config(
            env="recipes.self_play.envs:SelfPlayDatasetBuilder",
            model_name=str(tiny_model_folder),
            renderer_name="chatml",
        )
    )
    shown = capsys.readouterr().out
    assert "Free squares" in shown
    assert "illegal" in shown
