"""Base classes of supervised datasets, and of the builders that make them from a config."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.renderers import TrainOnWhat

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook import renderers
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "ChatDatasetBuilder",
    "ChatDatasetBuilderCommonConfig",
    "SupervisedDataset",
    "SupervisedDatasetBuilder",
]

logger = logging.getLogger(__name__)


class SupervisedDataset:
    """Batches of datums by index. Subclasses implement `get_batch` and `__len__`.

    A train loop calls `set_epoch(seed=epoch)` at the start of every epoch and then `get_batch(i)`
    for i from 0 (or, after a resume, from where it stopped) to `len(dataset) - 1`.
    """

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the datums of one optimizer step; the same (seed, index) gives the same datums."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        raise NotImplementedError

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle for a new epoch. A dataset that does not define this keeps its order."""
        logger.warning(
            "%s does not implement set_epoch: every epoch has the same order (seed=%d ignored)",
            type(self).__name__,
            seed,
        )

    @property
    def fingerprint(self) -> str | None:
        """Return a value that changes with the data, for comparison by a resumed run; None if
        unknown."""
        return None

    @property
    def summary(self) -> list[str]:
        """Return lines that describe the data, printed before a run; may be empty."""
        return []

    def close(self) -> None:
        """Free processes and files. Using the dataset afterwards is an error."""


@chz.chz
class SupervisedDatasetBuilder:
    """A config that makes a train dataset and, optionally, a held-out one."""

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        raise NotImplementedError


@chz.chz
class ChatDatasetBuilderCommonConfig:
    """Settings that all chat datasets have in common."""

    model_name_for_tokenizer: str = chz.field(doc="Model whose tokenizer is used.")
    renderer_name: str = chz.field(doc="Chat format, e.g. llama3, qwen3, chatml, role_colon.")
    max_length: int | None = chz.field(
        doc="Most tokens of a conversation; longer ones are cut on the right."
    )
    batch_size: int = chz.field(doc="Conversations per optimizer step.")
    train_on_what: TrainOnWhat | None = chz.field(
        default=None,
        doc="Which tokens are trained; None is the default of the dataset "
        "(all_assistant_messages unless it says otherwise).",
    )


@chz.chz
class ChatDatasetBuilder(SupervisedDatasetBuilder):
    """A builder of datasets of conversations, with the tokenizer and renderer they need."""

    common_config: ChatDatasetBuilderCommonConfig

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        from tinker_cookbook import tokenizer_utils

        return tokenizer_utils.get_tokenizer(self.common_config.model_name_for_tokenizer)

    @property
    def renderer(self) -> renderers.Renderer:
        from tinker_cookbook import image_processing_utils
        from tinker_cookbook.renderers import get_renderer

        config = self.common_config
        return get_renderer(
            config.renderer_name,
            self.tokenizer,
            image_processor=image_processing_utils.deferred_image_processor(
                config.model_name_for_tokenizer
            ),
            model_name=config.model_name_for_tokenizer,
        )
