"""The first command of the recipe: the teacher writes its replies to a file.

    python -m recipes.prompt_distillation.create_data replies=/tmp/replies.jsonl

Each line has a question, the reply, its tokens, and whether it ended by itself. You can delete
lines before you train: python -m recipes.prompt_distillation.train replies=/tmp/replies.jsonl
"""

from __future__ import annotations

import chz

from tinker_cookbook import cli_utils, recipe, service

from .__main__ import Config as TrainConfig
from .__main__ import build


@chz.chz
class Config(TrainConfig):
    """The settings of the recipe; those of training are not used."""

    replies: str | None = chz.field(
        default="teacher_replies.jsonl", doc="File to write; an existing one is kept."
    )


def run(config: Config) -> None:
    """Write the file."""
    config = recipe.complete(config)
    [data] = build(config).dataset_configs
    with service.connect(config.base_url, config.model_name):
        data.dataset_builder()
    print(f"replies  {config.replies}")


def main(argv: list[str] | None = None) -> None:
    """Run this command with these arguments; by default, those of the command line."""
    cli_utils.start(Config, run, argv)


if __name__ == "__main__":
    main()
