"""Headers and streams: whatever bytes come, in whatever pieces, a channel keeps its place or refuses."""

from __future__ import annotations

import socket
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.runtime.dispatch.base import StepPoint
from elastic_ep.runtime.dispatch.channel import Channel, Counters, Progress
from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameError, FrameFormat, FrameKey, Header, Phase, parse_foreign

LIMIT = 1 << 16
u31 = st.integers(0, 2**31 - 1)
formats = st.builds(
    FrameFormat,
    st.builds(FrameKey, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), u31, st.integers(0, 1)),
    st.integers(0, 1),
    st.integers(0, 64),
)


@given(formats, st.booleans(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_header_says_what_was_packed_or_is_refused_for_its_length(form: FrameFormat, in_outbox: bool, rows: int, pairs: int) -> None:
    raw = form.pack(in_outbox, rows, pairs)
    assert len(raw) == HEADER_BYTES
    length = form.payload_bytes(in_outbox, rows, pairs)
    if length > LIMIT:
        with pytest.raises(FrameError):
            parse_foreign(raw, 0, LIMIT)
        return
    other, header = parse_foreign(b"??" + raw, 2, LIMIT)
    assert other.key == form.key
    assert other.prefix == form.prefix
    assert header == form.parse(raw, 0, LIMIT) == Header(in_outbox, rows, pairs, length)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(FrameError):
        parse_foreign(raw, 0, LIMIT)


@given(formats, st.integers(0, HEADER_BYTES - 1), st.integers(0, 255))
def test_a_header_with_one_wrong_byte_is_refused_or_consistent(form: FrameFormat, at: int, value: int) -> None:
    raw = bytearray(form.pack(False, 3, 5))
    raw[at] = value
    try:
        other, header = parse_foreign(raw, 0, LIMIT)
    except FrameError:
        return
    assert header.payload_bytes == other.payload_bytes(header.in_outbox, header.rows, header.pairs) <= LIMIT


@pytest.mark.parametrize("length", [0, 1, 23, 25, 1 << 63, (1 << 64) - 1])
def test_a_length_that_lies_is_refused(length: int) -> None:
    form = FrameFormat(FrameKey(1, 2, 3, Phase.COMBINE), 0, 6)
    raw = bytearray(form.pack(False, 0, 1))
    struct.pack_into("<Q", raw, 48, length)
    with pytest.raises(FrameError, match=f"payload of {length} bytes"):
        form.parse(raw, 0, 1 << 62)


class Stream:
    """A channel fed by hand."""

    def __init__(self) -> None:
        self.feed, near = socket.socketpair()
        near.setblocking(False)
        self.counters = Counters()
        self.channel = Channel(near, 1, "there", self.counters, LIMIT, None)
        self.got: list[np.ndarray] = []

    def accept(self, channel: Channel, header: Header, payload: memoryview | None) -> list[np.ndarray]:
        self.got = [np.zeros(n, dtype=np.uint8) for n in (header.payload_bytes // 3, header.payload_bytes - header.payload_bytes // 3) if n]
        return self.got

    def receive(self, key: FrameKey) -> Progress:
        return self.channel.receive(FrameFormat(key, 0, 1), self.accept)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.feed.close()
        self.channel.close()


def frame(step: int, num_pairs: int) -> bytes:
    """A combine frame of hidden 1 whose payload depends on its step."""
    form = FrameFormat(FrameKey.of(StepPoint(1, step, 0), Phase.COMBINE), 0, 1)
    payload = np.random.default_rng(step).integers(0, 256, num_pairs * 4).astype(np.uint8).tobytes()
    return form.pack(False, 0, num_pairs) + payload


def key_of(step: int) -> FrameKey:
    return FrameKey.of(StepPoint(1, step, 0), Phase.COMBINE)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9000), st.booleans()), min_size=1, max_size=6),
    st.lists(st.integers(1, 40_000), min_size=1, max_size=12),
)
def test_frames_come_out_whole_however_the_stream_is_cut(frames: list[tuple[int, bool]], cuts: list[int]) -> None:
    """Frames come in order; the reader wants only some of them, and asks for the next wanted one after every piece."""
    stream = b"".join(frame(step, size) for step, (size, _) in enumerate(frames))
    wanted = [step for step, (_, want) in enumerate(frames) if want]
    with Stream() as s:
        s.feed.setblocking(False)
        done, offset, cut = [], 0, 0
        while offset < len(stream):
            piece = stream[offset : offset + cuts[cut % len(cuts)]]
            offset += s.feed.send(piece)
            cut += 1
            while len(done) < len(wanted):
                step = wanted[len(done)]
                if s.receive(key_of(step)) is not Progress.DONE:
                    break
                assert b"".join(a.tobytes() for a in s.got) == frame(step, frames[step][0])[HEADER_BYTES:]
                done.append(step)
            if len(done) == len(wanted):
                # nothing more is wanted: what is left must be dropped, not delivered
                assert s.receive(key_of(len(frames))) is Progress.WAITING
        assert done == wanted
        assert s.counters.stale_frames == len(frames) - len(wanted)


def test_an_aborted_receive_is_dropped_and_the_next_frame_found() -> None:
    with Stream() as s:
        old, new = frame(1, 5000), frame(2, 7)
        s.feed.sendall(old[:9000])
        assert s.receive(key_of(1)) is Progress.WAITING
        s.feed.sendall(old[9000:] + new)
        assert s.receive(key_of(2)) is Progress.DONE
        assert b"".join(a.tobytes() for a in s.got) == new[HEADER_BYTES:]
        assert s.counters.stale_frames == 1


@pytest.mark.parametrize("num_pairs", [0, 1, 5000])
def test_a_newer_frame_waits_for_its_turn(num_pairs: int) -> None:
    with Stream() as s:
        s.feed.sendall(frame(1, 0) + frame(5, num_pairs))
        assert s.receive(key_of(1)) is Progress.DONE
        for step in (2, 3, 4):
            assert s.receive(key_of(step)) is Progress.PARKED
        assert s.channel.holds_input
        assert s.receive(key_of(5)) is Progress.DONE
        assert b"".join(a.tobytes() for a in s.got) == frame(5, num_pairs)[HEADER_BYTES:]
        assert s.counters.stale_frames == 0


def test_end_of_file_inside_a_frame_is_closed() -> None:
    with Stream() as s:
        s.feed.sendall(frame(1, 100)[:-1])
        s.feed.close()
        assert s.receive(key_of(1)) is Progress.CLOSED
        assert s.channel.broken


def test_another_layout_at_the_same_point_is_refused() -> None:
    with Stream() as s:
        s.feed.sendall(FrameFormat(key_of(1), 1, 1).pack(False, 0, 0))
        assert s.receive(key_of(1)) is Progress.REFUSED
        assert s.counters.refused_frames == 1


def test_what_a_full_socket_does_not_take_goes_out_before_anything_newer() -> None:
    with Stream() as s:
        first, second = frame(1, 16_000), frame(2, 3)
        frames = [first] * 40 + [second]
        for one in frames:
            s.channel.post([one[:HEADER_BYTES], one[HEADER_BYTES:]])
        assert s.channel.has_unsent
        came = bytearray()
        while len(came) < sum(map(len, frames)):
            came += s.feed.recv(1 << 20)
            s.channel.flush()
        assert bytes(came) == b"".join(frames)
        assert not s.channel.has_unsent
        assert s.counters.bytes_sent == len(came)


def test_sending_to_one_who_is_gone_raises_nothing() -> None:
    with Stream() as s:
        s.feed.close()
        s.channel.post([frame(1, 5)])
        assert s.channel.broken
