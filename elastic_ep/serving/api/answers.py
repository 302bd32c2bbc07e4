"""What the two answer formats share: parts of JSON prepared once, usage, and telling a whole answer or a stream of parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.api.errors import as_api_error
from elastic_ep.serving.api.generation import Delta, Generation
from elastic_ep.serving.api.streaming import DONE

encode = msgspec.json.encode

FINISH = {None: b"null", "stop": b'"stop"', "length": b'"length"'}
MIN_LOGPROB = -9999.0
"""Told for minus infinity, which JSON has not."""


class AnswerFormat(Protocol):
    """How one endpoint tells a generation."""

    def opening(self) -> bytes:
        """Events before the first token."""
        ...

    def event(self, delta: Delta) -> bytes:
        """The event of one delta."""
        ...

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The last event of a stream that was asked for its usage."""
        ...

    def whole(self, deltas: list[list[Delta]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request without streaming; deltas [choices][tokens]."""
        ...


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


def alternatives(token: SampledToken, count: int) -> list[tuple[int, float]]:
    """The `count` best (token id, logprob) pairs."""
    return [(t, max(logprob, MIN_LOGPROB)) for t, logprob in token.top[:count]]


def sse(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def usage_of(generation: Generation) -> dict[str, Any]:
    """Prompts count once, whatever `n`; every committed token counts, also one that is no text."""
    prompt, completion = generation.plan.num_prompt_tokens, generation.num_completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def stream_answer(generation: Generation, answer: AnswerFormat) -> AsyncGenerator[bytes, None]:
    """Server-sent events of a started generation. A failure after the start is an event of its own, in the shape of an error."""
    try:
        if opening := answer.opening():
            yield opening
        async for delta in generation.deltas():
            yield answer.event(delta)
        if generation.plan.include_usage:
            yield answer.usage_event(usage_of(generation))
    except Exception as error:
        yield sse(encode(as_api_error(error).body()))
    yield DONE


async def whole_answer(generation: Generation, answer: AnswerFormat) -> dict[str, Any]:
    """Raises ApiError if a choice cannot be finished."""
    deltas: list[list[Delta]] = [[] for _ in generation.plan.requests]
    async for delta in generation.deltas():
        deltas[delta.choice].append(delta)
    return answer.whole(deltas, usage_of(generation))
