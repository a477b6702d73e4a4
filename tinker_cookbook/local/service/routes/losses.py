"""Routes for custom losses: clients upload a graph, `forward_backward` requests name it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.engine.loss_graph import LossGraph, parse_loss_graph
from tinker_cookbook.local.engine.types import LossSpec
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.bodies import CreateCustomLoss, UploadedGraph
from tinker_cookbook.local.service.protocol.http import read_json
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.typed_body import read_as
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.uploaded_losses import MAX_GRAPH_BYTES

__all__ = ["ROUTES", "attach_graph"]


async def create_custom_loss(service: Service, request: Request) -> Response:
    body = await read_json(request, MAX_GRAPH_BYTES)
    graph = await body.decode(_read_graph, body.values)
    asked = body.read_as(CreateCustomLoss)
    session = service.sessions.get_active(asked.session_id)
    seq = asked.custom_loss_seq_id
    known = service.losses.request_id_of(session.session_id, seq)
    if known is not None:
        return JSONResponse({"request_id": known})
    entry = service.futures.create("create_custom_loss", session.session_id)
    try:
        if isinstance(graph, UserError):
            raise graph
        loss_id = service.losses.add(session.session_id, seq, graph, request_id=entry.request_id)
    except UserError as error:
        service.futures.fail(entry, str(error), "user")
    else:
        answer = {"loss_id": loss_id, "type": "create_custom_loss"}
        service.futures.resolve(entry, Payload.of_json(answer))
    return JSONResponse({"request_id": entry.request_id})


def _read_graph(values: JsonObject) -> LossGraph | UserError:
    """Return the loss, or the error that its future will fail with."""
    try:
        graph = read_as(UploadedGraph, values)
        return parse_loss_graph(graph.name, graph.inputs, graph.graph)
    except UserError as error:
        return error


def attach_graph(service: Service, loss: LossSpec, session_id: str) -> LossSpec:
    """Return the loss of a request, with the graph that its `loss_id` names.

    Raises:
        UserError: the session has no such loss.
    """
    if loss.name != "custom":
        return loss
    return LossSpec(loss.name, {}, service.losses.get(session_id, loss.config.get("loss_id")))


ROUTES = [("POST", "/create_custom_loss", create_custom_loss)]
