"""The uploaded losses of all sessions. They are in memory until their session ends."""

from __future__ import annotations

from tinker_cookbook.local.engine.loss_graph import LossGraph
from tinker_cookbook.local.errors import UserError

__all__ = ["MAX_GRAPH_BYTES", "LossTable"]

MAX_GRAPH_BYTES = 2**20
MAX_PER_SESSION = 256
MAX_VALUES_PER_SESSION = 2**19
MAX_VALUES = 2**22
"""Maximum number of values of all sessions. A value takes up to 100 bytes."""


class LossTable:
    """The losses of all sessions. Use it only on the event loop's thread."""

    def __init__(self) -> None:
        self._graphs: dict[str, dict[str, LossGraph]] = {}
        self._request_ids: dict[str, dict[int, str]] = {}

    def request_id_of(self, session_id: str, seq: int) -> str | None:
        """Return the request that uploaded a loss of this number, to answer a repeat of it."""
        return self._request_ids.get(session_id, {}).get(seq)

    def add(self, session_id: str, seq: int, graph: LossGraph, *, request_id: str) -> str:
        """Store a loss; returns its id.

        Raises:
            UserError: the session has too many losses.
        """
        graphs = self._graphs.setdefault(session_id, {})
        kept = sum(graph.num_values for graph in graphs.values()) + graph.num_values
        total = sum(g.num_values for of_one in self._graphs.values() for g in of_one.values())
        if kept > MAX_VALUES_PER_SESSION or total + graph.num_values > MAX_VALUES:
            raise UserError(
                f"the custom losses of this session would hold {kept} values; at most "
                f"{MAX_VALUES_PER_SESSION} are accepted, and {MAX_VALUES} in all sessions. Reuse "
                "losses, or close sessions"
            )
        if len(graphs) >= MAX_PER_SESSION:
            raise UserError(
                f"this session has {len(graphs)} custom losses, the maximum; reuse them"
            )
        loss_id = f"{session_id}:loss:{seq}"
        graphs[loss_id] = graph
        self._request_ids.setdefault(session_id, {})[seq] = request_id
        return loss_id

    def get(self, session_id: str, loss_id: object) -> LossGraph:
        """Return a loss of this session.

        Raises:
            UserError: the session has no loss with this id.
        """
        graph = self._graphs.get(session_id, {}).get(str(loss_id))
        if graph is None:
            raise UserError(
                f"loss_id={str(loss_id)[:120]!r} does not exist in this session; create it with "
                "create_custom_loss (a restart of the service drops all losses)"
            )
        return graph

    def drop_session(self, session_id: str) -> None:
        """Drop the losses of a session that has ended."""
        self._graphs.pop(session_id, None)
        self._request_ids.pop(session_id, None)
