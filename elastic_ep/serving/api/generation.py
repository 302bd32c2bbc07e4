"""Runs a plan's sequences on the backend and turns their tokens into deltas of text. The only place that submits and cancels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from elastic_ep.brain.events import TokenEvent
from elastic_ep.brain.messages import SampledToken
from elastic_ep.serving.api.errors import ApiError
from elastic_ep.serving.api.plan import Plan
from elastic_ep.serving.backend import Backend, TokenStream
from elastic_ep.serving.metrics import Metrics
from elastic_ep.serving.text import TextBuilder, Tokenizer


class Delta(NamedTuple):
    """What one event adds to a choice: exactly one delta per committed token; the last has `finish`."""

    choice: int
    text: str
    token: SampledToken | None
    finish: str | None


class _Choice:
    """One sequence on its way to one choice."""

    def __init__(self, index: int, stream: TokenStream, builder: TextBuilder, metrics: Metrics, arrived_s: float):
        self.index = index
        self.num_tokens = 0
        self.ended = False
        self._stream = stream
        self._builder = builder
        self._metrics = metrics
        self._last_s = arrived_s

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Raises ApiError, or whatever the stream raises, if the sequence cannot be finished."""
        try:
            async for event in self._stream:
                delta = self._delta(event)
                if delta.finish is not None:
                    self._end(delta.finish)
                    await self._stream.finish()
                    yield delta
                    return
                yield delta
            raise RuntimeError(f"the token stream of choice {self.index} ended without a finish")
        except Exception:
            self._end(None)
            raise

    def _delta(self, event: TokenEvent) -> Delta:
        if event.finish == "error":
            raise ApiError(503, event.error or "the request could not be finished", code="generation_failed")
        text, finish = "", event.finish
        if event.token is not None:
            self._count_token()
            if finish != "stop":  # the token that ends a sequence is no text
                text = self._builder.push(event.token.token)
        if finish is not None:
            text += self._builder.finish()
        return Delta(self.index, text, event.token, "stop" if self._builder.stopped else finish)

    def _end(self, finish: str | None) -> None:
        if self.ended:
            return
        self.ended = True
        if finish is None:
            self._metrics.request_failed()
        else:
            self._metrics.request_finished(finish)

    async def aclose(self) -> None:
        if not self.ended:
            self.ended = True
            self._metrics.request_cancelled()
        await self._stream.aclose()

    def _count_token(self) -> None:
        now_s = time.monotonic()
        if self.num_tokens:
            self._metrics.next_token(now_s - self._last_s)
        else:
            self._metrics.first_token(now_s - self._last_s)
        self.num_tokens += 1
        self._last_s = now_s


class Generation:
    """All choices of one HTTP request. `start`, read `deltas`, and `aclose` in any case: it cancels what has not ended."""

    def __init__(self, plan: Plan, backend: Backend, tokenizer: Tokenizer, metrics: Metrics, *, opens_text: bool):
        self.plan = plan
        self.tokenizer = tokenizer
        self._backend = backend
        self._metrics = metrics
        self._opens_text = opens_text
        self._choices: list[_Choice] = []

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self._choices)

    async def start(self, arrived_s: float) -> None:
        """Submits every sequence or none. Raises QueueFull or Unavailable."""
        try:
            for index, request in enumerate(self.plan.requests):
                stream = self._backend.submit(request)
                builder = TextBuilder(self.tokenizer, self.plan.stops, opens_text=self._opens_text)
                self._choices.append(_Choice(index, stream, builder, self._metrics, arrived_s))
                self._metrics.request_accepted(len(request.prompt_ids))
        except BaseException:
            await self.aclose()
            raise

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The choices' deltas, each choice's in order. Raises ApiError if one cannot be finished."""
        if len(self._choices) == 1:
            async with aclosing(self._choices[0].deltas()) as deltas:
                async for delta in deltas:
                    yield delta
            return
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue(maxsize=2 * len(self._choices))
        pumps = [asyncio.create_task(_pump(choice, queue)) for choice in self._choices]
        try:
            num_open = len(pumps)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                num_open -= item.finish is not None
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def aclose(self) -> None:
        for choice in self._choices:
            await choice.aclose()


async def _pump(choice: _Choice, queue: asyncio.Queue[Delta | Exception]) -> None:
    try:
        async with aclosing(choice.deltas()) as deltas:
            async for delta in deltas:
                await queue.put(delta)
    except Exception as error:
        await queue.put(error)
