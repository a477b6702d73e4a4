"""Which weights an adapter was trained on, and what to know before it is merged into them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TIED_HEAD_WARNING", "WeightsOrigin", "find_origin", "write_card"]

TIED_HEAD_WARNING = (
    "it adapts lm_head, whose matrix is the input embedding too. Loaded beside the model it gives "
    "the trained model; merged by PEFT (merge_and_unload) it changes the input embedding as well "
    "and gives another one. Untie the matrices before merging, or train with train_unembed=False"
)


@dataclass(frozen=True)
class WeightsOrigin:
    """Where a base model's weights are, in the words of adapter_config.json."""

    source: str
    """`base_model_name_or_path`: a hub id, or a folder where the hub's weights are others."""
    revision: str | None = None
    """Commit of the hub's repository, where it is known."""


def find_origin(name: str, folder: Path) -> WeightsOrigin:
    """Where the weights of a model come from that was asked for as `name` and found in `folder`.

    A hub's name stands for the hub's weights only. A model of that name that was made here, for
    example out of a quantised file, is named by its folder: then nobody loads others unawares.
    """
    if Path(name).expanduser().is_dir():
        return WeightsOrigin(name)
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return WeightsOrigin(name, folder.name)
    return WeightsOrigin(str(folder))


def write_card(folder: Path, name: str, origin: WeightsOrigin, *, tied_head: bool) -> None:
    """Write README.md beside an adapter where its files alone would mislead; flushed to the disk.

    Args:
        name: what the service calls the base model.
        tied_head: whether the adapter adapts an lm_head that is the input embedding too.
    """
    notes = []
    if origin.source != name:
        notes.append(
            f"It was trained on the weights in `{origin.source}`, which are not the hub's weights "
            f"of `{name}`."
        )
    if tied_head:
        notes.append(f"Before you merge it: {TIED_HEAD_WARNING}.")
    if not notes:
        return
    text = "\n\n".join([f"# LoRA adapter for `{name}`", *notes]) + "\n"
    with (folder / "README.md").open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
