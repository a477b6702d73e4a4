"""Logprobs of a token sequence that are known, so that they are computed once. No torch."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

__all__ = ["KnownScores"]


class KnownScores:
    """Logprobs of T tokens, and the most likely tokens in their places; NaN is unknown."""

    def __init__(self, num_tokens: int) -> None:
        self.logprobs = np.full(num_tokens, np.nan, np.float32)
        """float32 [T]: logprob of each token after those before it."""
        self.topk: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """k -> ids int32 [T, k] and logprobs float32 [T, k]."""

    def places(self, topk: int) -> np.ndarray:
        """Return for which tokens the logprob is known and, if `topk` > 0, the k most likely."""
        known = ~np.isnan(self.logprobs)
        if topk:
            known &= topk in self.topk and ~np.isnan(self.topk[topk][1][:, 0])
        return known

    def topk_of(self, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and logprobs of the k most likely tokens; nothing is known at first."""
        if topk not in self.topk:
            size = (len(self.logprobs), topk)
            self.topk[topk] = (np.zeros(size, np.int32), np.full(size, np.nan, np.float32))
        return self.topk[topk]

    def extra_bytes(self, other: KnownScores) -> int:
        """Return the memory that `learn` adds."""
        return sum(8 * len(self.logprobs) * k for k in other.topk if k not in self.topk)

    def learn(self, other: KnownScores, first: int, stop: int, topk: Collection[int] = ()) -> None:
        """Take over what another sequence that begins alike knows about tokens [first, stop).

        Args:
            topk: for which k the most likely tokens are taken over.
        """
        new = first + np.flatnonzero(~np.isnan(other.logprobs[first:stop]))
        self.logprobs[new] = other.logprobs[new]
        for k in other.topk.keys() & set(topk):
            other_ids, other_logprobs = other.topk[k]
            ids, logprobs = self.topk_of(k)
            new = first + np.flatnonzero(~np.isnan(other_logprobs[first:stop, 0]))
            ids[new], logprobs[new] = other_ids[new], other_logprobs[new]
