"""What a run would do, counted before it starts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """The work of a run from its first to its last step."""

    total_steps: int
    num_rows: int
    """Number of training sequences; for reinforcement learning, of groups of episodes."""
    num_tokens: int | None = None
    """Exact number of tokens trained on; None if they are sampled during the run."""
    num_loss_tokens: int | None = None
    """Number of those tokens that have a loss."""
    num_prompt_tokens: int | None = None
    """Tokens of the prompts of all groups, each counted once; None if unknown."""
    longest: int | None = None
    """Tokens of the longest training sequence."""
    notes: tuple[str, ...] = ()
    """Lines about the data: its rows, and those that are cut or left out."""
    example: str | None = None
    """The first training sequence, with its trained tokens marked."""
    num_held_out_episodes: int = 0
    """Episodes of an evaluation, in reinforcement learning."""
