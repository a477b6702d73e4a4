"""Self-play for short replies: a tournament in which the shorter reply wins.

    python -m recipes.preference.shorter                      # the default model, on this machine
    python -m recipes.preference.shorter base_url=https://... model_name=Qwen/Qwen3-8B

The judge is not a model, so this recipe shows the tournament alone: several replies to one question
are compared two by two, and the reward of a reply is its wins minus its losses per match. Watch
env/all/ac_tokens_per_turn, the mean number of tokens per reply. The same command again resumes a
stopped run.
"""

from __future__ import annotations

from tinker_cookbook import recipe

from .train import CLIConfig as Config
from .train import build

if __name__ == "__main__":
    recipe.main(Config, build)
