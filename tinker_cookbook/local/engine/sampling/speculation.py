"""Speculative decoding with draft tokens that are looked up in the sequence itself. No torch.

Text that quotes its prompt or repeats itself often continues as it did before (prompt lookup).
Draft tokens are computed in one batch with the newest token, which costs little where a step is
limited by reading the weights. A draft token is accepted if it equals the token drawn from the
previous row. So the result is bit-identical to decoding without drafts, in fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Drafter"]

_NGRAM = 3
"""Length of the last tokens that are looked up."""
_WORTHWHILE = 0.7
"""Minimum average of accepted tokens per step; below it, proposing pauses."""
_FIRST_AVERAGE = 1.5
"""Average that a sequence starts with: a few failures are allowed before the first pause."""
_MEMORY = 0.75
"""Weight of earlier steps in the average (an exponential moving average)."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 128
"""Length of a pause in tokens; it doubles each time until drafts pay again."""


class Drafter:
    """Proposes draft tokens for one sequence, and learns whether that pays."""

    def __init__(self) -> None:
        self._last_place: dict[tuple[int, ...], int] = {}
        """N-gram -> index of the token after its latest occurrence."""
        self._num_indexed = 0
        self._average = _FIRST_AVERAGE
        """Moving average of accepted tokens per step."""
        self._resume_at = 0
        self._pause = _SHORTEST_PAUSE

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to `most` draft tokens that may follow; [] if none are likely.

        Args:
            tokens: prompt and completion; those of the previous call plus new ones at the end.
        """
        if most < 1 or len(tokens) < self._resume_at:
            return []
        self._index(tokens)
        place = self._last_place.get(tuple(tokens[-_NGRAM:]))
        return [] if place is None else list(tokens[place : place + most])

    def learn(self, num_tokens: int, num_accepted: int) -> None:
        """Record how many draft tokens of a step were accepted, and pause if drafts do not pay.

        Args:
            num_tokens: length of the sequence after the step.
        """
        self._average = _MEMORY * self._average + (1 - _MEMORY) * num_accepted
        if self._average >= _WORTHWHILE:
            self._pause = _SHORTEST_PAUSE
            return
        self._resume_at = num_tokens + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._average = _WORTHWHILE  # one bad step after the pause starts the next pause

    def _index(self, tokens: Sequence[int]) -> None:
        """Record the n-grams that a token follows; the last n-gram is the one to look up."""
        for end in range(max(self._num_indexed, _NGRAM), len(tokens)):
            self._last_place[tuple(tokens[end - _NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens))
