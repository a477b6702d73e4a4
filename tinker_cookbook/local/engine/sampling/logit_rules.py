"""Rules that change the logits before a token is drawn: penalties, biases, min-p. No torch.

Axis V: the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tinker_cookbook.local.engine.types import LogitRule

__all__ = ["Bias", "MinP", "Penalties", "RepetitionPenalty", "Rules", "new_rules"]

_COLDEST = 1e-30


class Rules:
    """Several rules, applied in sequence."""

    def __init__(self, rules: Sequence[LogitRule]) -> None:
        self._rules = tuple(rules)

    def change(self, logits_V: np.ndarray) -> None:
        for rule in self._rules:
            rule.change(logits_V)

    def add(self, token: int) -> None:
        for rule in self._rules:
            rule.add(token)


def new_rules(factories: Sequence[Callable[[], LogitRule]]) -> Callable[[], LogitRule] | None:
    """Return one function that makes all rules of a completion; None if there are none."""
    if len(factories) <= 1:
        return factories[0] if factories else None
    return lambda: Rules([make() for make in factories])


class Penalties:
    """Lowers the logits of tokens that the completion already has."""

    def __init__(self, *, presence: float, frequency: float) -> None:
        """Begin a completion.

        Args:
            presence: subtracted once for each token that has occurred.
            frequency: subtracted for each of its occurrences.
        """
        self._presence = presence
        self._frequency = frequency
        self._counts: Counter[int] = Counter()

    def change(self, logits_V: np.ndarray) -> None:
        if not self._counts:
            return
        tokens = np.fromiter(self._counts, np.int64)
        counts = np.fromiter(self._counts.values(), np.float32)
        logits_V[tokens] -= self._frequency * counts + self._presence

    def add(self, token: int) -> None:
        self._counts[token] += 1


class RepetitionPenalty:
    """Divides positive logits of known tokens by a factor, and multiplies negative ones by it."""

    def __init__(self, factor: float, prompt: Sequence[int]) -> None:
        """Begin a completion; the tokens of the prompt count as known."""
        self._factor = factor
        self._known = set(prompt)

    def change(self, logits_V: np.ndarray) -> None:
        tokens = np.fromiter(self._known, np.int64)
        values = logits_V[tokens]
        logits_V[tokens] = np.where(values > 0, values / self._factor, values * self._factor)

    def add(self, token: int) -> None:
        self._known.add(token)


class Bias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, tokens: np.ndarray, values: np.ndarray) -> None:
        """`tokens` are different token ids; `values` are float32."""
        self._tokens = tokens
        self._values = values

    def change(self, logits_V: np.ndarray) -> None:
        logits_V[self._tokens] += self._values

    def add(self, token: int) -> None:
        """Nothing to do: the bias is the same for every token."""


class MinP:
    """Forbids tokens that are much less likely than the most likely one."""

    def __init__(self, share: float, temperature: float) -> None:
        """`share` of the highest probability, at this temperature, is the lowest that is kept."""
        self._distance = -math.log(share) * max(temperature, _COLDEST)

    def change(self, logits_V: np.ndarray) -> None:
        logits_V[logits_V < logits_V.max() - self._distance] = -np.inf

    def add(self, token: int) -> None:
        """Nothing to do: only the next token's logits matter."""
