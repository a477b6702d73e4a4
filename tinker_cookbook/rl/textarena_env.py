"""Games of the package `textarena` as environments: `pip install 'tinker-cookbook[textarena]'`.

The model plays one seat. The other seats are played by the model itself, with the weights of the
same step, or by another model. What a player sees of the game becomes user messages and its moves
are the replies, so that all turns of a game make one datum.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import chz

from tinker_cookbook.completers import MessageCompleter
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset

__all__ = ["TextArenaDatasetBuilder", "TextArenaEnv", "TextArenaGroup"]

FIRST_HELD_OUT = 1_000_000
_random_lock = threading.Lock()


class TextArenaEnv(MessageEnv):
    """One game from the seat of one player; the reward is that player's result, -1 to 1."""

    def __init__(
        self,
        game: str,
        *,
        num_players: int = 2,
        seat: int = 0,
        seed: int = 0,
        opponent: MessageCompleter | None = None,
    ) -> None:
        """Set up the game.

        Args:
            game: Name of the game in textarena, such as `TicTacToe-v0`.
            num_players: Number of seats.
            seat: Seat of the model, from 0.
            seed: Seed of the game's random draws; equal seeds and moves give equal games.
            opponent: Plays the other seats; None: the policy of the rollout.

        Raises:
            ConfigurationError: without the package, or for an unknown game or seat.
        """
        self._random_state = random.Random(seed).getstate()
        self._game = _make_game(game)
        self._seat = seat
        self._opponent = opponent
        self._conversations: dict[int, list[Message]] = {i: [] for i in range(num_players)}
        self._seen: dict[int, str] = dict.fromkeys(range(num_players), "")
        self._num_moves = 0
        if seat not in self._conversations:
            raise ConfigurationError(f"seat={seat} is not one of {num_players} players.")
        try:
            with self._own_random():
                self._game.reset(num_players=num_players, seed=seed)
        except (AssertionError, ValueError) as error:
            raise ConfigurationError(
                f"num_players={num_players} does not fit {game}: {error}"
            ) from error

    def set_policy(self, policy: MessageCompleter) -> None:
        """Let the policy play the other seats, unless an opponent was given."""
        self._opponent = self._opponent or policy

    async def initial_observation(self) -> list[Message]:
        """Return the game at the first move of the model."""
        await self._play_others()
        return self._look()

    async def step(self, message: Message) -> MessageStepResult:
        """Make a move, then those of the other seats until it is the model's turn."""
        done = self._move(self._seat, message) or await self._play_others()
        self._num_moves += 1
        if not done:
            return MessageStepResult(0.0, False, self._look())
        rewards, info = self._game.close()
        own: dict[str, Any] = (info or {}).get(self._seat) or {}
        reward = float((rewards or {}).get(self._seat, 0.0))
        metrics = {
            "won": float(reward > 0),
            "lost": float(reward < 0),
            "invalid_move": float(bool(own.get("invalid_move"))),
            "moves": float(self._num_moves),
        }
        logs = {"reason": str(own.get("reason", "")), "seat": self._seat}
        return MessageStepResult(reward, True, self._conversations[self._seat], metrics, logs)

    async def _play_others(self) -> bool:
        """Play until it is the model's turn (returns False) or the game is over (True)."""
        while (player := self._to_move()) != self._seat:
            if self._opponent is None:
                raise ConfigurationError(
                    f"seat {player} has no player; give an opponent, or run the game through "
                    "run_rollout, which provides the policy."
                )
            reply = await self._opponent(self._look())
            if self._move(player, reply):
                return True
        return False

    def _to_move(self) -> int:
        return self._game.state.current_player_id

    def _look(self) -> list[Message]:
        """Return the conversation of the player to move; new text is the last user message."""
        with self._own_random():
            player, shown = self._game.get_observation()
        known = self._seen[player]
        self._seen[player] = shown
        # Most games repeat the whole text so far; then only the new part is added.
        text = shown.removeprefix(known).strip() or "Your move."
        message: Message = {"role": "user", "content": text}
        self._conversations[player] = [*self._conversations[player], message]
        return self._conversations[player]

    def _move(self, player: int, message: Message) -> bool:
        self._conversations[player] = [*self._conversations[player], message]
        with self._own_random():
            done, _ = self._game.step(get_text_content(message))
        return done

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Give this game a separate state of the global random generator, from which games draw."""
        with _random_lock:
            others = random.getstate()
            random.setstate(self._random_state)
            try:
                yield
            finally:
                self._random_state = random.getstate()
                random.setstate(others)


@dataclass(frozen=True)
class TextArenaGroup(EnvGroupBuilder):
    """One game, several times; its number chooses the seed and the seat of the model."""

    data: TextArenaDatasetBuilder
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Return new games."""
        renderer = self.data.build_renderer()
        games = [await asyncio.to_thread(self._make) for _ in range(self.data.group_size)]
        return [EnvFromMessageEnv(renderer, game) for game in games]

    def logging_tags(self) -> list[str]:
        """Return the name of the game without its version."""
        return [self.data.game.partition("-")[0].lower()]

    def _make(self) -> TextArenaEnv:
        return TextArenaEnv(
            self.data.game,
            num_players=self.data.num_players,
            seat=self.number % self.data.num_players,
            seed=self.number,
        )


@chz.chz
class TextArenaDatasetBuilder(RenderedDatasetBuilder):
    """Games of the model against itself, and held-out games."""

    game: str
    num_players: int = 2
    num_batches: int
    test_games: int = 0

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the games of training and the held-out games."""
        await asyncio.to_thread(_make_game, self.game)  # refuse an unknown game at once
        make = partial(TextArenaGroup, self)
        first = self.seed * 10_000_000
        trained = NumberedDataset(
            make,
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
            first=first,
        )
        if not self.test_games:
            return trained, None
        held_out = NumberedDataset(
            make, num_batches=1, groups_per_batch=self.test_games, first=first + FIRST_HELD_OUT
        )
        return trained, held_out


def _make_game(game: str) -> Any:
    try:
        import textarena  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigurationError(
            f"game={game} needs the package textarena; run pip install "
            "'tinker-cookbook[textarena]'."
        ) from error
    try:
        return textarena.make(game)
    except ValueError as error:
        raise ConfigurationError(
            f"game={game} is not a game of textarena ({error}); use a name such as TicTacToe-v0."
        ) from error
