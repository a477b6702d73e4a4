"""The weights that an adapter was trained on, and what to know before merging it into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.local.engine.model.number_formats import FULL
from tinker_cookbook.utils.durable_files import write_durably

__all__ = ["TIED_HEAD_WARNING", "WeightsOrigin", "find_origin", "write_card"]

TIED_HEAD_WARNING = (
    "it adapts lm_head, whose matrix is also the input embedding. Loaded as an adapter it gives "
    "the trained model; merged by PEFT (merge_and_unload) it also changes the input embedding, "
    "which gives another model. Untie the matrices before merging, or train with "
    "train_unembed=False"
)


@dataclass(frozen=True)
class WeightsOrigin:
    """The location of a base model's weights, as adapter_config.json states it."""

    source: str
    """`base_model_name_or_path`: a hub id, or a folder if its weights are not the hub's."""
    revision: str | None = None
    """Commit of the hub's repository; None if it is unknown."""


def find_origin(name: str, folder: Path) -> WeightsOrigin:
    """Return the origin of a model that was requested as `name` and found in `folder`.

    A hub id is used for the hub's weights only. A model with that name that was made here, for
    example from a quantised file, is named by its folder, so that nobody loads other weights by
    mistake.
    """
    if Path(name).expanduser().is_dir():
        return WeightsOrigin(name)
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return WeightsOrigin(name, folder.name)
    return WeightsOrigin(str(folder))


def write_card(
    folder: Path,
    name: str,
    origin: WeightsOrigin,
    *,
    tied_head: bool,
    base_format: str = FULL,
) -> None:
    """Write README.md next to an adapter whose files alone would mislead; flush it to the disk.

    Args:
        name: the service's name of the base model.
        tied_head: whether the adapter adapts an lm_head that is also the input embedding.
        base_format: how the base weights were stored in training.
    """
    notes = []
    if origin.source != name:
        notes.append(
            f"It was trained on the weights in `{origin.source}`, which are not the hub's weights "
            f"of `{name}`."
        )
    if base_format != FULL:
        notes.append(
            f"It was trained on base weights rounded to {base_format}. On the full weights its "
            "logprobs differ slightly."
        )
    if tied_head:
        notes.append(f"Before you merge it: {TIED_HEAD_WARNING}.")
    if not notes:
        return
    text = "\n\n".join([f"# LoRA adapter for `{name}`", *notes]) + "\n"
    write_durably(folder / "README.md", text)
