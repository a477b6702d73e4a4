"""RLHF in three stages: supervised training, a reward model, and RL against it.

python -m recipes.preference.rlhf                         # the default model, on this machine
python -m recipes.preference.rlhf rm_kind=pointwise
python -m recipes.preference.rlhf run_sft=false run_rm=false rl_name=rl_free length_method=none
"""

from __future__ import annotations

from tinker_cookbook import cli_utils

from .rlhf_pipeline import CLIConfig as Config
from .rlhf_pipeline import run_pipeline


def main(config: Config) -> None:
    """Run the pipeline."""
    run_pipeline(config)


if __name__ == "__main__":
    cli_utils.entrypoint(main)
