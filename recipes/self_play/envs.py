"""Tic-tac-toe as an environment, in which the opponent moves too."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import chz

from tinker_cookbook.completers import MessageCompleter
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset

from .players import (
    ModelPlayer,
    Player,
    describe,
    make_player,
    opening_messages,
)
from .tictactoe import (
    EMPTY,
    Board,
    free_squares,
    play,
    read_move,
    side_to_move,
    winner,
)

POINTS = {"won": 1.0, "draw": 0.5, "lost": 0.0}
ILLEGAL_REWARD = -0.5
TAKEN_REWARD = -0.25
"""Reward of a number that does not name a free square; such a reply is closer to a legal move."""
MAX_OPENING_MOVES = 2


class TicTacToeEnv(MessageEnv):
    """The model plays the side to move; the opponent answers each move.

    In self-play the opponent is the model that is trained, with the weights of the same step,
    which the rollout passes to `set_policy`. Only the moves of one side are trained, so a game is
    one trajectory. All members of a group start from the same position.
    """

    def __init__(self, board: Board, opponent: Player | None, seed: str) -> None:
        self.board = board
        self.side = side_to_move(board)
        self.opponent = opponent
        self.history: list[Message] = []
        self._rng = random.Random(seed)
        self._num_moves = 0

    def set_policy(self, policy: MessageCompleter) -> None:
        """Play against the policy itself, unless another opponent was given."""
        if self.opponent is None:
            self.opponent = ModelPlayer(policy)

    async def initial_observation(self) -> list[Message]:
        """Return the rules and the position."""
        self.history = opening_messages(self.board)
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        """Make the model's move, then the opponent's."""
        self.history = [*self.history, message]
        text = get_text_content(message).strip()
        square = read_move(text, self.board)
        if square is None:
            return self._end("illegal", TAKEN_REWARD if text.isdigit() else ILLEGAL_REWARD)
        self._num_moves += 1
        self.board = play(self.board, square)
        metrics: dict[str, float] = {}
        if winner(self.board) is None:
            metrics = await self._opponent_moves()
        end = winner(self.board)
        if end is not None:
            result = "draw" if end == "draw" else "won" if end == self.side else "lost"
            return self._end(result, POINTS[result], metrics)
        text = describe(self.board, self.side)
        self.history = [*self.history, {"role": "user", "content": text}]
        return MessageStepResult(0.0, False, self.history, metrics)

    async def _opponent_moves(self) -> dict[str, float]:
        """Make the opponent's move; if it is illegal, a random one, so that the game continues."""
        assert self.opponent is not None, "a rollout calls set_policy before the first move"
        square = await self.opponent.move(self.board)
        illegal = square is None
        if square is None:
            square = self._rng.choice(free_squares(self.board))
        self.board = play(self.board, square)
        return {"opponent_illegal": float(illegal)}

    def _end(
        self, result: str, reward: float, metrics: dict[str, float] | None = None
    ) -> MessageStepResult:
        found = {name: float(name == result) for name in (*POINTS, "illegal")}
        found["moves"] = float(self._num_moves)
        return MessageStepResult(
            reward, True, self.history, found | (metrics or {}), {"result": result}
        )


@dataclass(frozen=True)
class GameGroup(EnvGroupBuilder):
    """Several games from one position. It pickles, since renderer and opponent are made later."""

    data: SelfPlayDatasetBuilder
    opponent: str
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new games from the same position."""
        renderer = self.data.build_renderer()
        board = self.first_position()
        games = []
        for member in range(self.data.group_size):
            seed = f"{self.number}/{member}"
            # The client of another model is made by a request to the service, which takes a moment.
            opponent = await asyncio.to_thread(
                make_player, self.opponent, seed, renderer, self.data.max_tokens
            )
            games.append(TicTacToeEnv(board, opponent, seed))
        return [
            EnvFromMessageEnv(
                renderer,
                game,
                failed_parse_reward=ILLEGAL_REWARD,
                context_overflow_reward=ILLEGAL_REWARD,
            )
            for game in games
        ]

    def first_position(self) -> Board:
        """Return the position after zero to two random moves: the model plays either side."""
        rng = random.Random(self.number)
        board = EMPTY
        for _ in range(rng.randint(0, MAX_OPENING_MOVES)):
            board = play(board, rng.choice(free_squares(board)))
        return board

    def logging_tags(self) -> list[str]:
        """Return the side that the model plays."""
        return [f"as_{side_to_move(self.first_position())}"]


@chz.chz
class SelfPlayDatasetBuilder(RenderedDatasetBuilder):
    """Builder of the training games, and of the games against a fixed opponent."""

    num_batches: int
    opponent: str = "random"
    test_opponent: str = "random"
    test_games: int = 0
    max_tokens: int = 4

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training games and the held-out ones."""
        first = self.seed * 10_000_000
        trained = NumberedDataset(
            partial(GameGroup, self, self.opponent),
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
            first=first,
        )
        if not self.test_games:
            return trained, None
        held_out = NumberedDataset(
            partial(GameGroup, chz.replace(self, group_size=2), self.test_opponent),
            num_batches=1,
            groups_per_batch=self.test_games,
            first=1_000_000,
        )
        return trained, held_out
