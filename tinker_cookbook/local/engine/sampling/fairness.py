"""Whose tokens the next step computes, so that a client with much work does not slow down others.

While k clients have work, each may expect its tokens to come at 1/k of the speed that it has alone.
A step that serves all of them is the cheapest, and mostly quick enough for that. Where it is not,
because others bring many rows or long prompts, a client falls behind; then steps serve only those
behind until they have caught up. No torch, and no clock: costs are counted in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Turns"]

_MOST_AHEAD = 1024.0
"""Tokens that a client can be ahead: what it had when the others asked for little is forgotten."""


class Turns:
    """Chooses the clients of each step; used by one thread."""

    def __init__(self, overhead_tokens: int) -> None:
        """`overhead_tokens` is what a step costs whatever is in it, as so many tokens."""
        self._overhead = overhead_tokens
        self._behind: dict[str, float] = {}
        """How far each client that has work is behind its share, in tokens; negative: ahead."""

    def choose(self, clients: Mapping[str, int]) -> set[str]:
        """Those among clients with work that the next step should serve."""
        behind = {client for client in clients if self._behind.get(client, 0.0) > 0}
        return behind or set(clients)

    def charge(self, clients: Mapping[str, int], served: Mapping[str, int]) -> None:
        """Count a step.

        Args:
            clients: those that had work, with any number; others are forgotten.
            served: how many tokens the step computed for each client.
        """
        cost = self._overhead + sum(served.values())
        behind = {}
        for client in clients:
            alone = self._overhead + served[client] if served.get(client) else 0
            behind[client] = self._behind.get(client, 0.0) + cost / len(clients) - alone
        # passes for all are cheaper than the shares, which puts everybody ahead of theirs
        most = min(max(behind.values(), default=0.0), 0.0)
        self._behind = {client: max(owed - most, -_MOST_AHEAD) for client, owed in behind.items()}
