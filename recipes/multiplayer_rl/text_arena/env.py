"""Two-player games of textarena, which the model plays against itself."""

from __future__ import annotations

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.textarena_env import TextArenaDatasetBuilder, TextArenaEnv, TextArenaGroup
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder

__all__ = [
    "TextArenaEnv",
    "TextArenaGroup",
    "TwoPlayerTextArenaDatasetBuilder",
]


@chz.chz
class TwoPlayerTextArenaDatasetBuilder(RLDatasetBuilder):
    """Builder of numbered games; each is played `group_size` times from the same seat and start."""

    batch_size: int
    """Number of episodes per step."""
    model_name: str
    renderer_name: str
    game_name: str = "TicTacToe-v0"
    num_train_datapoints: int = 40960
    num_test_datapoints: int = 0
    group_size: int = 2
    base_url: str | None = None

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training games and the held-out ones.

        Raises:
            ConfigurationError: if a batch has no group, or the package textarena is not installed.
        """
        if self.batch_size < self.group_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is less than group_size={self.group_size}; a batch "
                "holds at least one group."
            )
        builder = TextArenaDatasetBuilder(
            model_name=self.model_name,
            renderer_name=self.renderer_name,
            groups_per_batch=self.batch_size // self.group_size,
            group_size=self.group_size,
            game=self.game_name,
            num_batches=self.num_train_datapoints // self.batch_size,
            test_games=self.num_test_datapoints // self.group_size,
        )
        return await builder()
