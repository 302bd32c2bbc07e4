"""Whatever bytes a peer sends on a dispatch channel: a frame of ours, or refused and counted; never an error, never too much memory."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.runtime.dispatch import handshake
from elastic_ep.runtime.dispatch.channel import Channel, Counters, Progress
from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameError, FrameFormat, FrameKey, Phase, parse_foreign
from elastic_ep.runtime.dispatch.socket import SocketDispatcher
from tests.fuzz.bytes import FUZZ, check_line, mutated

MAX_PAYLOAD = 1 << 14
HIDDEN = 4
small = st.integers(0, 3)


def form(epoch: int, step: int, layer: int, phase: int) -> FrameFormat:
    return FrameFormat(FrameKey(epoch, step, layer, phase), 0, HIDDEN)


@st.composite
def frames(draw: Any) -> bytes:
    """A whole frame of this or another exchange."""
    own = form(draw(small), draw(small), draw(small), draw(st.integers(0, 1)))
    in_outbox, rows, pairs = draw(st.booleans()), draw(small), draw(small)
    return own.pack(in_outbox, rows, pairs) + os.urandom(own.payload_bytes(in_outbox, rows, pairs))


sent = st.one_of(st.binary(max_size=200), mutated(st.lists(frames(), min_size=1, max_size=4).map(b"".join)))


@FUZZ
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES) | mutated(frames()).filter(lambda data: len(data) >= HEADER_BYTES))
def test_a_header_is_one_of_ours_or_refused(raw: bytes) -> None:
    try:
        found, header = parse_foreign(raw, 0, MAX_PAYLOAD)
    except FrameError as error:
        check_line(str(error))
    else:
        assert 0 <= header.payload_bytes <= MAX_PAYLOAD
        assert header.payload_bytes == found.payload_bytes(header.in_outbox, header.rows, header.pairs)


@FUZZ
@given(sent, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_channel_takes_a_frame_or_refuses(data: bytes, epoch: int, step: int, close: bool) -> None:
    """What is accepted is exactly of the wanted exchange; what is allocated is within the limit."""
    counters = Counters()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    allocated: list[int] = []

    def accept(channel: Channel, header: Any, payload: memoryview | None) -> list[Any]:
        allocated.append(header.payload_bytes)
        return [np.empty(header.payload_bytes, np.uint8)] if header.payload_bytes else []

    channel = Channel(ours, 1, "unix:x", counters, MAX_PAYLOAD, None)
    with theirs:
        theirs.sendall(data)
        if close:
            theirs.close()
        want = form(epoch, step, 0, int(Phase.DISPATCH))
        progress = channel.receive(want, accept)
    assert progress in Progress
    assert sum(allocated) <= MAX_PAYLOAD
    assert counters.refused_frames == (progress is Progress.REFUSED)
    if progress is Progress.DONE:
        assert want.prefix in data
    if not close:
        assert progress is not Progress.CLOSED
    channel.close()


ADDRESSES = ("unix:@one", "unix:@two")


@FUZZ
@given(
    st.binary(min_size=handshake.HELLO_BYTES, max_size=handshake.HELLO_BYTES)
    | mutated(st.builds(handshake.pack_hello, small, st.just(ADDRESSES[0]), small, st.just(ADDRESSES[1]), small, st.just("wrong"))).filter(
        lambda raw: len(raw) == handshake.HELLO_BYTES
    )
)
def test_no_hello_without_the_token(raw: bytes) -> None:
    assert handshake.parse_hello(raw, "right") is None


@FUZZ
@given(st.data())
def test_a_hello_that_was_changed_is_none(data: Any) -> None:
    raw = handshake.pack_hello(1, ADDRESSES[0], 0, ADDRESSES[1], 4096, "right")
    assert handshake.parse_hello(raw, "right") is not None
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :]
    assert handshake.parse_hello(changed, "right") is None
    answer = handshake.pack_welcome(raw, 4096, "right")
    assert handshake.parse_welcome(answer, raw, "right") == 4096
    assert handshake.parse_welcome(answer, changed, "right") is None


def test_guests_that_say_anything_are_refused_and_counted(tmp_path):
    """A rank that waits for its peer meets only strangers: garbage, an old incarnation, the wrong token, another rank."""
    listen, right = f"unix:{tmp_path}/0.sock", f"unix:{tmp_path}/1.sock"
    garbage = [
        os.urandom(handshake.HELLO_BYTES),
        os.urandom(5000),
        handshake.pack_hello(1, f"unix:{tmp_path}/1.old.sock", 0, listen, 0, "token"),
        handshake.pack_hello(1, right, 0, listen, 0, "wrong"),
        handshake.pack_hello(7, right, 0, listen, 0, "token"),
        handshake.pack_hello(1, right, 5, listen, 0, "token"),
    ]
    with SocketDispatcher(0, listen, token="token", shared_bytes=0) as zero:
        strangers = []
        for data in garbage:
            stranger = socket.socket(socket.AF_UNIX)
            stranger.connect(listen.removeprefix("unix:"))
            stranger.sendall(data)
            strangers.append(stranger)
        with SocketDispatcher(1, right, token="token") as one:
            assert one.connect({0: listen}, 0.05) is not None  # rank 0 does not answer yet; then it is closed, and its call with it
        assert zero.connect({1: right}, 0.2) is not None
        assert zero.refused_handshakes == len(garbage)
        assert zero.connected_ranks == ()
        for stranger in strangers:
            stranger.close()
