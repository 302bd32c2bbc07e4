"""Growing, shrinking and draining while requests are served: each an operation with a name, begun once however often it is asked for."""

from __future__ import annotations

import asyncio
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_ep.brain.events import DrainRequested, ScaleRequested
from elastic_ep.serving.api.answers import encode
from elastic_ep.serving.api.errors import ApiError, shown
from elastic_ep.serving.api.generate_routes import read_body
from elastic_ep.serving.api.openapi import describe
from elastic_ep.serving.api.requests import DrainRequest, OperationRequest, ScaleRequest, parse_body
from elastic_ep.serving.api.responses import IsScaling, OperationList, OperationStatus
from elastic_ep.serving.backend import Backend

MAX_DIGITS = 6
"""of a rank"""
_CHANGE_ERRORS = (400, 409, 413)


def router(backend: Backend) -> APIRouter:
    routes = APIRouter(tags=["elastic"])

    async def perform(request: ScaleRequested | DrainRequested, body: OperationRequest) -> Response:
        finished = backend.begin_operation(request)
        if body.wait:
            await asyncio.shield(finished)
        operation = backend.operation(request.operation_id)
        return Response(encode(operation), status_code=200 if body.wait else 202, media_type="application/json")

    @routes.post("/scale_elastic_ep", **describe(OperationStatus, body=ScaleRequest, errors=_CHANGE_ERRORS, may_be_accepted=True))
    async def scale_elastic_ep(request: Request) -> Response:
        """Grow or shrink to so many ranks. Serving goes on; a growth whose new rank fails is undone."""
        body = parse_body(await read_body(request), ScaleRequest)
        return await perform(ScaleRequested(_name(body), body.new_ep_size, body.drain or backend.default_drain), body)

    @routes.get("/is_scaling_elastic_ep", **describe(IsScaling))
    async def is_scaling_elastic_ep() -> Response:
        """Whether an operation is running."""
        running = [operation for operation in backend.operations() if operation["state"] == "running"]
        return _json({"is_scaling_elastic_ep": bool(running), "operation_id": running[0]["operation_id"] if running else None})

    @routes.post(
        "/elastic/ranks/{rank}/drain", **describe(OperationStatus, body=DrainRequest, errors=(404, *_CHANGE_ERRORS), may_be_accepted=True)
    )
    async def drain_rank(rank: str, request: Request) -> Response:
        """Have a rank leave: the others take over what it holds, then it ends."""
        if not rank.isdecimal() or len(rank) > MAX_DIGITS:
            raise ApiError(404, f"rank {shown(rank)} is no number of a rank; give 0 or more", param="rank", code="rank_not_found")
        body = parse_body(await read_body(request) or b"{}", DrainRequest)
        return await perform(DrainRequested(_name(body), int(rank), body.drain or backend.default_drain), body)

    @routes.get("/elastic/operations", **describe(OperationList))
    async def list_operations() -> Response:
        """The operations that are remembered, oldest first."""
        return _json({"operations": backend.operations()})

    @routes.get("/elastic/operations/{operation_id}", **describe(OperationStatus, errors=(404,)))
    async def get_operation(operation_id: str) -> Response:
        """How far an operation is."""
        operation = backend.operation(operation_id)
        if operation is None:
            raise ApiError(404, f"no operation {shown(operation_id)} is remembered", param="operation_id", code="operation_not_found")
        return _json(operation)

    return routes


def _name(body: OperationRequest) -> str:
    return body.operation_id or f"op-{uuid.uuid4().hex[:12]}"


def _json(value: object) -> Response:
    return Response(encode(value), media_type="application/json")
