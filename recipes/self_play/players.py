"""The opponents: the policy itself, another model, or a program."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Protocol

from tinker_cookbook import service
from tinker_cookbook.completers import MessageCompleter, TinkerMessageCompleter
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message

from .tictactoe import Board, best_moves, free_squares, read_move, show
from .tictactoe import side_to_move as side_of

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

RULES = "We play tic-tac-toe. Reply with the number of a free square only."
EXAMPLE_BOARD = "X   O    "


def describe(board: Board, side: str) -> str:
    """Describe the position for the side to move."""
    squares = " ".join(map(str, free_squares(board)))
    return f"{show(board)}\nYou are {side}. Free squares: {squares}"


def opening_messages(board: Board) -> list[Message]:
    """Return the rules, an example move in another game, and the position."""
    example = describe(EXAMPLE_BOARD, side_of(EXAMPLE_BOARD))
    return [
        {"role": "system", "content": RULES},
        {"role": "user", "content": example},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": f"A new game.\n{describe(board, side_of(board))}"},
    ]


class Player(Protocol):
    """Chooses a square, or None if its reply is not a legal move."""

    async def move(self, board: Board) -> int | None:
        """Return the square to take."""
        ...


class RandomPlayer:
    """Takes a random free square."""

    def __init__(self, seed: int | str) -> None:
        self._rng = random.Random(seed)

    async def move(self, board: Board) -> int | None:
        """Return a random free square."""
        return self._rng.choice(free_squares(board))


class PerfectPlayer(RandomPlayer):
    """Never loses; chooses at random among the best squares."""

    async def move(self, board: Board) -> int | None:
        """Return one of the best squares."""
        return self._rng.choice(best_moves(board))


class ModelPlayer:
    """A model that sees only the position, as in the first message of a game."""

    def __init__(self, completer: MessageCompleter) -> None:
        self._completer = completer

    async def move(self, board: Board) -> int | None:
        """Return the square that the model names, if it is free."""
        reply = await self._completer(opening_messages(board))
        return read_move(get_text_content(reply), board)


def make_player(kind: str, seed: str, renderer: Renderer, max_tokens: int) -> Player | None:
    """Make an opponent.

    Args:
        kind: `self`, `random`, `perfect`, a model of the service, or tinker:// weights.
        seed: Seed of a program's random choices.
        renderer: Renderer for a model.
        max_tokens: Maximum tokens of a model's reply.

    Returns:
        The opponent; None for `self`, since the rollout provides the policy.
    """
    if kind == "self":
        return None
    if kind == "random":
        return RandomPlayer(seed)
    if kind == "perfect":
        return PerfectPlayer(seed)
    client = other_model(kind)
    return ModelPlayer(TinkerMessageCompleter(client, renderer, max_tokens))


@functools.lru_cache(maxsize=4)
def other_model(name: str) -> tinker.SamplingClient:
    """Make a sampling client of another model, or of saved weights, on the service of the run.

    Raises:
        ConfigurationError: if the service does not offer the model.
    """
    from tinker_cookbook.utils.sdk_futures import wait_for_client

    connection = service.current_connection()
    client = connection.service_client()
    if name.startswith("tinker://"):
        return _saved_weights(client, name)
    try:
        model = connection.check_model(name)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"opponent={name} is unknown; use self, random, perfect, tinker://... or a model: "
            f"{error}"
        ) from error
    return wait_for_client(client.create_sampling_client(base_model=model))


def _saved_weights(client: tinker.ServiceClient, path: str) -> tinker.SamplingClient:
    import tinker

    from tinker_cookbook.utils.sdk_compat import service_message
    from tinker_cookbook.utils.sdk_futures import wait_for_client

    try:
        return wait_for_client(client.create_sampling_client(model_path=path))
    except (tinker.TinkerError, ValueError) as error:
        raise ConfigurationError(
            f"opponent={path} cannot play: {service_message(error)}"
        ) from error
