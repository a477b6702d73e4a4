"""Guesses at the next tokens of a sequence, looked up in the sequence itself. No torch.

Text that quotes its prompt, or repeats itself, goes on as it did before. Guessed tokens are
computed in one batch with the newest one, which costs little where memory sets the pace, and a
guess counts only if it is the token that is drawn anyway. So the result is the same, sooner.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Drafter"]

_NGRAM = 3
_WORTHWHILE = 0.7
"""Guesses are made while at least so many of a step's are right on average."""
_FIRST_TRUST = 1.5
_MEMORY = 0.75
"""Weight of the steps before in that average."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 16, 128


class Drafter:
    """Looks for the last tokens of one sequence earlier in it, and learns whether that pays."""

    def __init__(self) -> None:
        self._last_place: dict[tuple[int, ...], int] = {}
        """An n-gram -> the index behind its last occurrence."""
        self._num_indexed = 0
        self._trust = _FIRST_TRUST
        self._resume_at = 0
        self._pause = _SHORTEST_PAUSE

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow prompt and completion; [] where none are likely.

        Args:
            tokens: those of the earlier calls and the new ones behind them.
        """
        if most < 1 or len(tokens) < self._resume_at:
            return []
        self._index(tokens)
        place = self._last_place.get(tuple(tokens[-_NGRAM:]))
        return [] if place is None else list(tokens[place : place + most])

    def learn(self, num_tokens: int, num_right: int) -> None:
        """Take note of how many guesses of a step were right; `num_tokens` is the length since."""
        self._trust = _MEMORY * self._trust + (1 - _MEMORY) * num_right
        if self._trust >= _WORTHWHILE:
            self._pause = _SHORTEST_PAUSE
            return
        self._resume_at = num_tokens + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._trust = _WORTHWHILE

    def _index(self, tokens: Sequence[int]) -> None:
        """Note the n-grams that something follows."""
        for end in range(max(self._num_indexed, _NGRAM), len(tokens)):
            self._last_place[tuple(tokens[end - _NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens))
