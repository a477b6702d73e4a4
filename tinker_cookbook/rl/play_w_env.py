"""A person as the policy, to debug an environment and its rewards."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from tinker_cookbook.completers import StopCondition, TokenCompleter, TokensWithLogprobs
from tinker_cookbook.rl.rollout_logging import new_prompt_text
from tinker_cookbook.rl.rollout_runner import run_rollout
from tinker_cookbook.rl.types import Env, Trajectory

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["ManualPolicy", "get_async_input", "play_env", "print_trajectory_summary"]


async def get_async_input(prompt: str, multiline: bool = False) -> str:
    """Read from the terminal without blocking the event loop.

    Args:
        prompt: Text to print first.
        multiline: Whether to read until an empty line.

    Raises:
        EOFError: if the input has ended.
    """
    print(prompt, end="", flush=True)
    lines: list[str] = []
    while True:
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line and not lines:
            raise EOFError("the input has ended")
        text = line.rstrip("\n")
        if not multiline:
            return text
        if not text:
            return "\n".join(lines)
        lines.append(text)


class ManualPolicy(TokenCompleter):
    """A policy that shows each prompt and reads the reply from the terminal."""

    def __init__(
        self, tokenizer: Tokenizer, multiline: bool = True, show_observation: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.multiline = multiline
        self.show_observation = show_observation

    async def __call__(
        self, ob: tinker.ModelInput, stop: StopCondition, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        """Return the typed text as tokens, followed by the first stop sequence."""
        if self.show_observation:
            print(self.tokenizer.decode(ob.to_ints()))
        hint = " (an empty line ends it)" if self.multiline else ""
        text = await get_async_input(f"\nyour reply{hint}: ", self.multiline)
        end = stop[0] if stop else ""
        if isinstance(end, str):
            tokens = self.tokenizer.encode(text + end, add_special_tokens=False)
        else:
            tokens = [*self.tokenizer.encode(text, add_special_tokens=False), end]
        cut = max_tokens is not None and len(tokens) > max_tokens
        tokens = tokens[:max_tokens]
        return TokensWithLogprobs(tokens, [0.0] * len(tokens), "length" if cut else "stop")


def print_trajectory_summary(trajectory: Trajectory, tokenizer: Tokenizer | None = None) -> None:
    """Print reward and metrics of every turn, and its texts if a tokenizer is given."""
    before = None
    for index, turn in enumerate(trajectory.transitions):
        if tokenizer is not None:
            print(new_prompt_text(turn, before, tokenizer), end="")
            print(f"\033[32m{tokenizer.decode(turn.ac.tokens)}\033[0m")
        print(f"turn {index}: reward {turn.reward:.3f}  {turn.metrics or ''}  {turn.logs or ''}")
        before = turn
    total = sum(turn.reward for turn in trajectory.transitions)
    print(f"total reward {total:.3f}, stopped by {trajectory.stop_reason}")


async def play_env(
    env: Env, tokenizer: Tokenizer, multiline: bool = True, show_observation: bool = True
) -> Trajectory:
    """Play one episode at the terminal."""
    policy = ManualPolicy(tokenizer, multiline, show_observation)
    trajectory = await run_rollout(policy, env)
    print_trajectory_summary(trajectory)
    return trajectory
