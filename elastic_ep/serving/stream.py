"""The events of one request on their way to whoever asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from elastic_ep.brain.events import TokenEvent


class RequestStream:
    """Events in order, each once. `aclose()` before the end cancels the request, also when nothing was read yet; `finish()` says that the
    client has all it asked for.

    Args:
        cancel: called with whether that is so.
    """

    def __init__(self, cancel: Callable[[bool], None]) -> None:
        self._cancel = cancel
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._ended = False
        self.num_events = 0

    def put(self, event: TokenEvent) -> None:
        self.num_events += 1
        self._events.put_nowait(event)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        event = await self._events.get()
        self._ended = event.finish is not None
        return event

    async def aclose(self) -> None:
        self._end(False)

    async def finish(self) -> None:
        self._end(True)

    def _end(self, is_done: bool) -> None:
        if not self._ended:
            self._ended = True
            self._cancel(is_done)
