"""One connection between controller and agent, either end: messages in and out, beats, and the end of a silent one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from elastic_ep.runtime.control.agent_messages import AgentBuffer, AgentMessage, Beat, OrderMessage, encode
from elastic_ep.runtime.control.wire import WireError


class AgentStream(asyncio.Protocol):
    """Owns a transport. `on_lost(reason)` is called once, when nothing more will come and nobody here closed it."""

    def __init__(self, on_message: Callable[[Any], None], on_lost: Callable[[str], None], make_beat: Callable[[], Beat]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._make_beat = make_beat
        self._buffer = AgentBuffer()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._beat_s = self._silence_s = 0.0
        self.last_heard = 0.0
        """loop time"""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by behaviour, not by class
        self._loop = asyncio.get_running_loop()
        self.last_heard = self._loop.time()

    def start_beating(self, beat_s: float, silence_s: float) -> None:
        """From now on say every `beat_s` that this side lives, and give the other up after `silence_s` without a word."""
        self._beat_s, self._silence_s = beat_s, silence_s
        self._tick(self._loop.time())

    def _tick(self, due: float) -> None:
        if self._closed:
            return
        now = self._loop.time()
        silent_s = now - self.last_heard
        # A tick that comes late may come before bytes that are here already: then it was us who slept.
        if silent_s > self._silence_s and now - due < self._beat_s:
            self._lose(f"silent for {silent_s:.1f} s")
            return
        self.send(self._make_beat())
        self._timer = self._loop.call_later(self._beat_s, self._tick, now + self._beat_s)

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        try:
            messages = self._buffer.feed(data)
        except WireError as error:
            self._lose(str(error))
            return
        for message in messages:
            if not self._closed:
                self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(f"connection lost: {exc}" if exc else "connection closed")

    def send(self, message: AgentMessage | OrderMessage) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def _lose(self, reason: str) -> None:
        if self._closed:
            return
        self._stop(abort=True)
        self._on_lost(reason)

    def close(self) -> None:
        """Send what is queued, then close. Nothing is called any more."""
        self._stop(abort=False)

    def _stop(self, abort: bool) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            if abort:
                self._transport.abort()
            else:
                self._transport.close()
