"""POST /v1/completions and /v1/chat/completions: read, plan, generate, tell."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_ep.serving.api.answers import AnswerFormat, encode, stream_answer, whole_answer
from elastic_ep.serving.api.chat import ChatFormat
from elastic_ep.serving.api.completions import CompletionFormat
from elastic_ep.serving.api.errors import ApiError
from elastic_ep.serving.api.generation import Generation
from elastic_ep.serving.api.openapi import describe
from elastic_ep.serving.api.plan import Plan, plan_chat, plan_completion
from elastic_ep.serving.api.requests import ChatCompletionRequest, CompletionRequest, parse_body
from elastic_ep.serving.api.responses import ChatCompletion, Completion
from elastic_ep.serving.api.streaming import EventStreamResponse, unless_disconnected
from elastic_ep.serving.backend import Backend
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import Tokenizer

MAX_BODY_BYTES = 16 * 1024 * 1024


def router(backend: Backend, tokenizer: Tokenizer, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", **describe(Completion, body=CompletionRequest, streams=True))
    async def create_completion(request: Request) -> Response:
        """Continue a prompt."""
        arrived_s = time.monotonic()
        body = parse_body(await read_body(request), CompletionRequest)
        plan = await plan_completion(body, backend, tokenizer)
        generation = Generation(plan, backend, tokenizer, metrics, opens_text=False)
        return await _answer(request, plan, generation, CompletionFormat(plan, tokenizer), arrived_s)

    @routes.post("/v1/chat/completions", **describe(ChatCompletion, body=ChatCompletionRequest, streams=True))
    async def create_chat_completion(request: Request) -> Response:
        """Answer the last message of a chat."""
        arrived_s = time.monotonic()
        body = parse_body(await read_body(request), ChatCompletionRequest)
        plan = await plan_chat(body, backend, tokenizer)
        generation = Generation(plan, backend, tokenizer, metrics, opens_text=True)
        return await _answer(request, plan, generation, ChatFormat(plan, tokenizer), arrived_s)

    return routes


async def read_body(request: Request) -> bytes:
    """The body, as far as MAX_BODY_BYTES. Raises ApiError 413 beyond."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes; send less at once", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


async def _answer(request: Request, plan: Plan, generation: Generation, answer: AnswerFormat, arrived_s: float) -> Response:
    await generation.start(arrived_s)
    if plan.stream:
        return EventStreamResponse(stream_answer(generation, answer), generation.aclose)
    try:
        whole = await unless_disconnected(request.receive, whole_answer(generation, answer))
    finally:
        await generation.aclose()
    return Response(encode(whole), media_type="application/json")
