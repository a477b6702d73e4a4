"""Losses that clients traced and uploaded: kept per session, used by `forward_backward`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.engine.loss_graph import LossGraph, parse_loss_graph
from tinker_cookbook.local.engine.types import LossSpec
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.fields import Fields
from tinker_cookbook.local.service.protocol.http import decode, read_fields
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.futures import Payload
from tinker_cookbook.local.service.state.losses import MAX_GRAPH_BYTES

__all__ = ["ROUTES", "attach_graph"]

MAX_SEQ_ID = 2**31 - 1


async def create_custom_loss(service: Service, request: Request) -> Response:
    fields = await read_fields(request, MAX_GRAPH_BYTES)
    graph = await decode(fields, _read_graph, fields)
    session = service.sessions.get_active(fields.text("session_id"))
    seq = fields.integer("custom_loss_seq_id", minimum=0, maximum=MAX_SEQ_ID)
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


def _read_graph(fields: Fields) -> LossGraph | UserError:
    """The loss, or what is wrong with it."""
    values = fields.values
    try:
        return parse_loss_graph(fields.text("name"), values.get("inputs"), values.get("graph"))
    except UserError as error:
        return error


def attach_graph(service: Service, loss: LossSpec, session_id: str) -> LossSpec:
    """The loss of a request, with the graph that its `loss_id` names.

    Raises:
        UserError: the session has no such loss.
    """
    if loss.name != "custom":
        return loss
    return LossSpec(loss.name, {}, service.losses.get(session_id, loss.config.get("loss_id")))


ROUTES = [("POST", "/create_custom_loss", create_custom_loss)]
