"""The controller's end of one control channel, as an asyncio protocol."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import cast

from elastic_ep.brain.messages import ControllerMessage, Hello, RankMessage, StartOver
from elastic_ep.runtime.control.wire import MAX_MESSAGE_BYTES, MessageBuffer, WireError, encode

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 1 << 16
"""the longest message of somebody who has not shown the token"""


class RankLink(asyncio.Protocol):
    """Accepts one connection. Says nothing of it before a Hello with the right token came; a bad peer is closed and logged once."""

    def __init__(
        self,
        token: str,
        on_hello: Callable[[RankLink, Hello], None],
        on_message: Callable[[RankLink, RankMessage], None],
        on_closed: Callable[[RankLink], None],
    ) -> None:
        self._token = token
        self._on_hello = on_hello
        self._on_message = on_message
        self._on_closed = on_closed
        self._buffer = MessageBuffer(MAX_HELLO_BYTES)
        self._transport: asyncio.Transport | None = None
        self._hello_timer: asyncio.TimerHandle | None = None
        self.hello: Hello | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by behaviour, not by class
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.close)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return  # it goes on beating until it has read why
        try:
            messages = self._buffer.feed(data)
        except WireError as error:
            log.warning("control channel of rank %s: %s; closing it", self.hello.rank if self.hello else "?", error)
            self.close()
            return
        for message in messages:
            if self._is_refused:
                return
            if self.hello is not None:
                self._on_message(self, message)
            elif isinstance(message, Hello) and hmac.compare_digest(message.token.encode(), self._token.encode()):
                self.hello = message
                self._buffer.max_bytes = MAX_MESSAGE_BYTES
                if self._hello_timer:
                    self._hello_timer.cancel()
                self._on_hello(self, message)
            else:
                log.warning("a control connection without the right token was refused")
                self.close()
                return

    def connection_lost(self, exc: Exception | None) -> None:
        if self._hello_timer:
            self._hello_timer.cancel()
        self._on_closed(self)

    def send(self, message: ControllerMessage) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))

    def refuse(self, message: StartOver) -> None:
        """Say why, then close."""
        self.hello, self._is_refused = None, True
        if self._transport is not None:
            self._transport.write(encode(message))
            self._transport.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
