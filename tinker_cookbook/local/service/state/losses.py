"""The uploaded losses of all sessions, in memory as long as their session lives."""

from __future__ import annotations

from tinker_cookbook.local.engine.loss_graph import LossGraph
from tinker_cookbook.local.errors import UserError

__all__ = ["MAX_GRAPH_BYTES", "LossTable"]

MAX_GRAPH_BYTES = 2**20
MAX_PER_SESSION = 256
MAX_VALUES_PER_SESSION = 2**19
MAX_VALUES = 2**22
"""Of all sessions; a value takes up to 100 bytes."""


class LossTable:
    """Used on the event loop's thread only."""

    def __init__(self) -> None:
        self._graphs: dict[str, dict[str, LossGraph]] = {}
        self._request_ids: dict[str, dict[int, str]] = {}

    def request_id_of(self, session_id: str, seq: int) -> str | None:
        """The request that made a session's loss of this number, to answer a resent one."""
        return self._request_ids.get(session_id, {}).get(seq)

    def add(self, session_id: str, seq: int, graph: LossGraph, *, request_id: str) -> str:
        """Keep a loss; returns its id.

        Raises:
            UserError: the session has too many.
        """
        graphs = self._graphs.setdefault(session_id, {})
        kept = sum(graph.num_values for graph in graphs.values()) + graph.num_values
        total = sum(g.num_values for of_one in self._graphs.values() for g in of_one.values())
        if kept > MAX_VALUES_PER_SESSION or total + graph.num_values > MAX_VALUES:
            raise UserError(
                f"the custom losses of this session would hold {kept} values; at most "
                f"{MAX_VALUES_PER_SESSION} are kept, and {MAX_VALUES} of all sessions. Reuse their "
                "handles, or close sessions"
            )
        if len(graphs) >= MAX_PER_SESSION:
            raise UserError(
                f"this session has {len(graphs)} custom losses, as many as are kept; reuse their "
                "handles"
            )
        loss_id = f"{session_id}:loss:{seq}"
        graphs[loss_id] = graph
        self._request_ids.setdefault(session_id, {})[seq] = request_id
        return loss_id

    def get(self, session_id: str, loss_id: object) -> LossGraph:
        """A loss of this session.

        Raises:
            UserError: there is none of this id.
        """
        graph = self._graphs.get(session_id, {}).get(str(loss_id))
        if graph is None:
            raise UserError(
                f"loss_id={str(loss_id)[:120]!r} is no loss of this session; make one with "
                "create_custom_loss (a restart of the service forgets them)"
            )
        return graph

    def drop_session(self, session_id: str) -> None:
        """Forget the losses of a session that has ended."""
        self._graphs.pop(session_id, None)
        self._request_ids.pop(session_id, None)
