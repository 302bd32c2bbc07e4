"""The TCP control listener's first words with a caller: who cannot prove the token gets no further."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from elastic_ep.runtime.control.address import tune
from elastic_ep.runtime.control.auth import ANSWER_BYTES, Role, judge_answer, make_challenge

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0


class Gate(asyncio.Protocol):
    """One connection until its caller is known; then the protocol that `admit(role)` gives takes the transport over."""

    def __init__(self, tokens: dict[Role, str], admit: Callable[[Role], asyncio.Protocol]) -> None:
        self._tokens = tokens
        self._admit = admit
        self._challenge = make_challenge()
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        tune(transport.get_extra_info("socket"))
        self._timer = asyncio.get_running_loop().call_later(TIMEOUT_S, self._transport.abort)
        self._transport.write(self._challenge)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._data += data
        if len(self._data) < ANSWER_BYTES:
            return
        self._timer.cancel()
        role, verdict = judge_answer(self._challenge, self._data[:ANSWER_BYTES], self._tokens)
        self._transport.write(verdict)
        if role is None:
            peer = self._transport.get_extra_info("peername")
            log.warning("a control connection from %s without the right token was refused", peer)
            self._transport.close()
            return
        protocol = self._admit(role)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        if len(self._data) > ANSWER_BYTES:
            protocol.data_received(self._data[ANSWER_BYTES:])

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
