"""Guards against rewards that grow with the length of a reply.

Judges often prefer longer replies, and a policy that is trained against such a judge writes longer
and longer ones. Both guards change the rewards of a group before advantages are computed.
"""

from __future__ import annotations

from typing import Literal

import chz
import numpy as np

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["LengthControl", "LengthMethod"]

LengthMethod = Literal["penalty", "residual"]


@chz.chz
class LengthControl:
    """How the length of a reply counts against its reward."""

    method: LengthMethod = chz.field(
        default="penalty",
        doc="penalty: every token above free_tokens costs coef. residual: the part of the reward "
        "that a straight line through the group's lengths explains is taken away.",
    )
    coef: float = chz.field(
        default=0.02, doc="Reward per token (penalty), or share of the line (residual)."
    )
    free_tokens: int = chz.field(default=0, doc="Tokens that cost nothing (penalty).")

    @chz.validate
    def _check(self) -> None:
        if self.coef < 0 or (self.method == "residual" and self.coef > 1):
            raise ConfigurationError(
                f"length_control.coef={self.coef} must be 0 or greater, and at most 1 for residual."
            )

    def adjustments(self, rewards_G: np.ndarray, lengths_G: np.ndarray) -> np.ndarray:
        """Return what is added to the rewards of a group, float64 [G].

        Args:
            rewards_G: Rewards of the judge.
            lengths_G: Sampled tokens of the replies.

        Source: the penalty is that of arXiv:2310.03716; the residual follows the length-controlled
        win rates of arXiv:2404.04475, with a line for each group instead of one for all data.
        """
        lengths_G = np.asarray(lengths_G, np.float64)
        if self.method == "penalty":
            return -self.coef * np.maximum(lengths_G - self.free_tokens, 0.0)
        longer_G = lengths_G - lengths_G.mean()
        variance = float((longer_G**2).sum())
        if variance == 0:
            return np.zeros(len(lengths_G))
        slope = float((longer_G * rewards_G).sum()) / variance
        # Only a preference for length is taken away, never one for brevity.
        return -self.coef * max(slope, 0.0) * longer_G
