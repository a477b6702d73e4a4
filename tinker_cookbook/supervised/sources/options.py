"""The data settings of a supervised recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.supervised.conversations import MarkupMode
from tinker_cookbook.supervised.sources.several import MixUntil

__all__ = ["DataOptions"]

TrainedTokens = Literal[
    "last_assistant_message",
    "last_assistant_turn",
    "all_assistant_messages",
    "all_messages",
    "all_tokens",
    "all_user_and_system_messages",
    "customized",
]
"""The values of `renderers.TrainOnWhat`, as a type that the command line can list."""


@chz.chz
class DataOptions:
    """The rows to train, and the parts of them to train."""

    data: str | None = chz.field(
        default=None,
        doc="File, folder, glob, or several: a.jsonl,b.parquet, with weights a.jsonl:0.7,b.csv:0.3 "
        "(docs/data.md). Default: the bundled file.",
    )
    file_path: str | None = chz.field(default=None, doc="The older name of `data`.")
    train_on_what: TrainedTokens = chz.field(
        default="all_assistant_messages", doc="Which tokens are trained."
    )
    markup: MarkupMode = chz.field(
        default="convert",
        doc="<think> and <tool_call> in the text of replies: convert to reasoning and calls, "
        "refuse, or keep as text.",
    )
    mix_until: MixUntil = chz.field(
        default="first_exhausted",
        doc="With weights, an epoch ends when the first file is through, or when all are.",
    )

    def data_or(self, default: str | Path) -> str:
        """Return what `data` (or `file_path`) names, else the default.

        Raises:
            ConfigurationError: both are given.
        """
        if self.data is not None and self.file_path is not None:
            raise ConfigurationError(
                f"data={self.data} and file_path={self.file_path} are both given and mean the "
                "same; use data."
            )
        given = self.file_path if self.data is None else self.data
        return str(default) if given is None else given
