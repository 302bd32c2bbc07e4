"""Whatever bytes reach the control channel: messages of ours, or WireError and a closed channel; never another error, never much memory."""

from __future__ import annotations

import asyncio
import logging
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.brain import messages
from elastic_ep.brain.messages import Heartbeat, Hello
from elastic_ep.runtime.control import wire
from elastic_ep.runtime.control.auth import ANSWER_BYTES, Role, judge_answer, make_challenge
from elastic_ep.runtime.control.wire import MessageBuffer, WireError, encode
from elastic_ep.serving.link import MAX_HELLO_BYTES, RankLink
from tests.fuzz.bytes import FUZZ, check_line, mutated, pieces

TOKEN = "secret"
# what msgpack can hold
st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
any_message = st.one_of([st.from_type(cls) for cls in wire._KINDS])
streams = st.lists(any_message, min_size=1, max_size=2).map(lambda many: b"".join(map(encode, many)))


@FUZZ
@given(st.lists(any_message, max_size=2), st.data())
def test_what_was_encoded_comes_out_in_whatever_pieces(sent: list[Any], data: Any) -> None:
    buffer = MessageBuffer()
    received = []
    for piece in data.draw(pieces(st.just(b"".join(map(encode, sent))))):
        received += buffer.feed(piece)
    assert list(map(encode, received)) == list(map(encode, sent))


@FUZZ
@given(pieces(st.one_of(st.binary(max_size=300), mutated(streams))))
def test_bytes_are_messages_or_a_wire_error(parts: list[bytes]) -> None:
    buffer = MessageBuffer()
    try:
        for part in parts:
            for message in buffer.feed(part):
                assert type(message) in wire._KINDS
    except WireError as error:
        check_line(str(error))


@pytest.mark.parametrize("length", [0xFFFFFFFF, wire.MAX_MESSAGE_BYTES + 1])
def test_a_lying_length_is_refused_before_its_bytes_are_awaited(length):
    with pytest.raises(WireError):
        MessageBuffer().feed(length.to_bytes(4, "little") + b"\0")


class Transport(asyncio.Transport):
    """Notes that it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Link:
    """A link of the controller, and what it did with what it was fed."""

    def __init__(self) -> None:
        self.hellos: list[Hello] = []
        self.said: list[Any] = []
        self.transport = Transport()
        self.link = RankLink(TOKEN, lambda _, hello: self.hellos.append(hello), lambda _, m: self.said.append(m), lambda _: None)

    def feed(self, parts: list[bytes]) -> None:
        async def go() -> None:
            self.link.connection_made(self.transport)
            for part in parts:
                if self.transport.closed:
                    break
                self.link.data_received(part)
            self.link.connection_lost(None)

        asyncio.run(go())


def hello(token: str) -> bytes:
    return encode(Hello(1, 0, 4, "host", token, "unix:x", "unix:y"))


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@FUZZ
@given(pieces(st.one_of(st.binary(max_size=300), mutated(streams), st.text().map(hello))))
def test_nobody_is_heard_without_the_token(parts: list[bytes]) -> None:
    link = Link()
    link.feed(parts)
    assert not link.said
    assert all(h.token == TOKEN for h in link.hellos)


@FUZZ
@given(pieces(mutated(streams).map(lambda data: hello(TOKEN) + data)))
def test_after_the_hello_all_that_is_no_message_closes_the_channel(parts: list[bytes]) -> None:
    link = Link()
    link.feed(parts)
    assert len(link.hellos) <= 1  # none if what is no message came with it
    assert all(type(message) in wire._KINDS for message in link.said)


def test_a_stranger_cannot_make_the_controller_hold_much():
    """A claim of a huge message by somebody who has not said the token."""
    link = Link()
    claim = wire.MAX_MESSAGE_BYTES.to_bytes(4, "little") + b"\0"
    chunk = bytes(1 << 16)
    tracemalloc.start()
    try:
        link.feed([claim, *[chunk] * 100])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert link.transport.closed
    assert peak < 4 * MAX_HELLO_BYTES + (1 << 20)


def test_refusals_are_logged_once(caplog):
    logging.disable(logging.NOTSET)
    link = Link()
    link.feed([hello("wrong"), *[encode(Heartbeat(1))] * 5])
    assert len(caplog.records) == 1
    assert link.transport.closed


@FUZZ
@given(st.one_of(st.binary(min_size=ANSWER_BYTES, max_size=ANSWER_BYTES), st.binary(max_size=200)))
def test_an_answer_without_the_token_lets_nobody_in(answer: bytes) -> None:
    role, verdict = judge_answer(make_challenge(), answer, {Role.AGENT: "a", Role.RANK: "b"})
    assert role is None
    assert verdict[:1] == b"\0"


def test_every_message_of_the_protocol_is_tried():
    declared = {cls for cls in vars(messages).values() if isinstance(cls, type) and cls.__module__ == messages.__name__}
    assert set(wire._KINDS) <= declared
