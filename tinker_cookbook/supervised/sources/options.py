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
    """Training data and trained tokens."""

    data: str | None = chz.field(
        default=None,
        doc="Files to train on: a file, folder or glob, or several such as a.jsonl,b.parquet, "
        "with weights a.jsonl:0.7,b.csv:0.3 (see docs/data.md); default: the bundled file.",
    )
    file_path: str | None = chz.field(default=None, doc="Older name of `data`.")
    train_on_what: TrainedTokens = chz.field(
        default="all_assistant_messages", doc="Which tokens are trained; the others are context."
    )
    markup: MarkupMode = chz.field(
        default="convert",
        doc="What happens to <think> and <tool_call> in the text of replies: convert to reasoning "
        "and tool calls, refuse, or keep as text.",
    )
    mix_until: MixUntil = chz.field(
        default="first_exhausted",
        doc="When an epoch over weighted files ends: after the first file is used up, or after "
        "all are.",
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
