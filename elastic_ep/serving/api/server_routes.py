"""What a server tells about itself: models, health, metrics, and the elastic state with its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from fastapi import APIRouter
from starlette.responses import Response

from elastic_ep.serving.api.answers import encode, sse
from elastic_ep.serving.api.errors import ApiError, shown
from elastic_ep.serving.api.openapi import describe
from elastic_ep.serving.api.responses import Health, ModelCard, ModelList, Status
from elastic_ep.serving.api.streaming import EventStreamResponse
from elastic_ep.serving.backend import Backend, EventStream
from elastic_ep.serving.metrics import Metrics

KEEP_ALIVE_S = 15.0


def router(backend: Backend, metrics: Metrics) -> APIRouter:
    routes = APIRouter()
    created = int(time.time())

    def card() -> ModelCard:
        return ModelCard(id=backend.model_name, created=created, max_model_len=backend.max_model_len)

    @routes.get("/v1/models", tags=["OpenAI"], **describe(ModelList))
    async def list_models() -> Response:
        """The one model that is served."""
        return _json(ModelList(data=[card()]).model_dump())

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"], **describe(ModelCard, errors=(404,)))
    async def get_model(model: str) -> Response:
        """The served model, if that is its name."""
        if model != backend.model_name:
            message = f"model {shown(model)} is not served here; use {shown(backend.model_name)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return _json(card().model_dump())

    @routes.get("/health", tags=["server"], **describe(Health, errors=(503,)))
    async def get_health() -> Response:
        """200 while requests are served, 503 with the reason otherwise."""
        healthy, detail = backend.health()
        if not healthy:
            raise ApiError(503, detail, code="unavailable")
        return _json({"status": "ok", "detail": detail})

    @routes.get("/metrics", tags=["server"], **describe(None, media_type="text/plain"))
    async def get_metrics() -> Response:
        """Prometheus text exposition."""
        return Response(metrics.render(), headers={"content-type": metrics.content_type})

    @routes.get("/elastic/status", tags=["elastic"], **describe(Status))
    async def get_status() -> Response:
        """Membership, ranks, survivability and recoveries."""
        return _json(backend.status())

    @routes.get("/elastic/events", tags=["elastic"], **describe(None, streams=True))
    async def get_events() -> Response:
        """Membership and recovery events as they happen, one JSON object each; endless."""
        stream = backend.events()
        return EventStreamResponse(_event_parts(stream, KEEP_ALIVE_S), stream.aclose)

    return routes


def _json(value: object) -> Response:
    return Response(encode(value), media_type="application/json")


async def _event_parts(stream: EventStream, keep_alive_s: float) -> AsyncGenerator[bytes, None]:
    """Events as they come; a comment at once and after each `keep_alive_s` of silence, so that proxies keep the connection."""
    yield b": connected\n\n"
    pending: asyncio.Future[object] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(stream))
            await asyncio.wait((pending,), timeout=keep_alive_s)
            if not pending.done():
                yield b": keep-alive\n\n"
                continue
            event, pending = pending, None
            try:
                yield sse(encode(event.result()))
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
