"""DPO on a public data set, under the names that programs of the Tinker cookbook import.

    python -m recipes.preference.dpo.train dataset=helpsteer3

The data sets come from the Hugging Face hub, or from a local copy with file_path=.
"""

from __future__ import annotations

import chz

from tinker_cookbook import recipe
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.recipes.preference.datasets import COMPARISON_BUILDERS  # pyright: ignore[reportMissingImports]
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = ["CLIConfig", "build", "cli_main", "get_dataset_builder"]


@chz.chz
class CLIConfig(train_dpo.PreferenceOptions):
    """The settings of this program, and those of every preference run."""

    dataset: str = chz.field(
        default="hhh", doc=f"Name of the data set: {', '.join(COMPARISON_BUILDERS)}."
    )
    file_path: str | None = chz.field(
        default=None, doc="File or folder with the rows of the data set; default: the hub."
    )
    max_length: int | None = chz.field(default=8192, doc="Tokens after which a completion is cut.")
    batch_size: int = chz.field(default=256, doc="Pairs per optimizer step.")
    num_replicas: int = chz.field(default=8, doc="Accepted for older programs; not used.")

    def log_words(self) -> tuple[str, ...]:
        """Return the words of the run directory's name."""
        return (self.dataset,)


def get_dataset_builder(
    dataset: str,
    model_name: str,
    renderer_name: str,
    max_length: int | None,
    batch_size: int,
    file_path: str | None = None,
) -> DPODatasetBuilderFromComparisons:
    """Return the builder of the pairs of a data set.

    Raises:
        ConfigurationError: if the data set is unknown.
    """
    if dataset not in COMPARISON_BUILDERS:
        raise ConfigurationError(
            f"dataset={dataset} is unknown.{did_you_mean(dataset, list(COMPARISON_BUILDERS))} Use "
            f"one of {', '.join(COMPARISON_BUILDERS)}; for your own file, run "
            "recipes.preference.dpo with data=FILE."
        )
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model_name,
        renderer_name=renderer_name,
        max_length=max_length,
        batch_size=batch_size,
    )
    comparisons = COMPARISON_BUILDERS[dataset](file_path=file_path)
    return DPODatasetBuilderFromComparisons(common_config=common, comparison_builder=comparisons)


def build(config: CLIConfig) -> train_dpo.Config:
    """Return the train loop's settings."""
    pairs = get_dataset_builder(
        config.dataset,
        str(config.model_name),
        str(config.renderer_name),
        config.max_length,
        config.batch_size,
        config.file_path,
    )
    return recipe.preference(config, pairs)


def cli_main(cli_config: CLIConfig) -> None:
    """Train with these settings."""
    recipe.run(cli_config, build)


if __name__ == "__main__":
    recipe.main(CLIConfig, build)
