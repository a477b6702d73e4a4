"""Fairness: whose tokens a step computes, so that a busy client does not slow down others.

While k clients have work, each should get its tokens at 1/k of the speed that it has alone. A step
that serves all clients is the cheapest per token, and usually fast enough for that. Where it is
not, because others have many sequences or long prompts, a client falls behind; then steps serve
only the clients that are behind, until they have caught up. Costs are counted in tokens, not in
seconds, so the order of work is reproducible. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FairTurns"]

_MOST_AHEAD = 1024.0
"""Maximum tokens that a client can be ahead, so that a long time alone is soon forgotten."""


class FairTurns:
    """Chooses the clients of each step. Used by one thread."""

    def __init__(self, overhead_tokens: int) -> None:
        """`overhead_tokens` is the fixed cost of a step, expressed as a number of tokens."""
        self._overhead = overhead_tokens
        self._behind: dict[str, float] = {}
        """Tokens that each client with work is behind its share; negative if it is ahead."""

    def choose(self, clients: Mapping[str, int]) -> set[str]:
        """Return the clients, among those with work, that the next step should serve."""
        behind = {client for client in clients if self._behind.get(client, 0.0) > 0}
        return behind or set(clients)

    def charge(self, clients: Mapping[str, int], served: Mapping[str, int]) -> None:
        """Count a step.

        Args:
            clients: clients with work (the keys; the values are ignored). Others are forgotten.
            served: number of tokens that the step computed for each client.
        """
        cost = self._overhead + sum(served.values())
        behind = {}
        for client in clients:
            # alone, the client would have paid the overhead and its own tokens for this progress
            alone = self._overhead + served[client] if served.get(client) else 0
            behind[client] = self._behind.get(client, 0.0) + cost / len(clients) - alone
        # A pass for all costs less than separate passes, so all clients may be ahead of their
        # shares. The one that is least ahead then counts as on time.
        most = min(max(behind.values(), default=0.0), 0.0)
        self._behind = {client: max(owed - most, -_MOST_AHEAD) for client, owed in behind.items()}
