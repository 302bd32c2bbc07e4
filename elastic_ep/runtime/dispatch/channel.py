"""One stream socket to one peer: frames out without blocking, frames in straight into their buffers.

A channel never loses its place in the stream. What an aborted call left unsent is owned here and goes out before anything newer; what it
left unread is read later, and dropped or delivered by its key.
"""

from __future__ import annotations

import enum
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameError, FrameKey, Header, parse_header

_DISCARD_BYTES = 1 << 18
_MAX_BUFFERS = 64
"""buffers handed to one sendmsg; well below the kernel's IOV_MAX"""

Accept = Callable[[int, Header], Sequence[Any]]
"""(peer, header) of the expected frame -> writable byte buffers for its payload, empty ones left out. Raises FrameError to refuse it."""


class Progress(enum.Enum):
    """Where reading from a channel stands."""

    DONE = "done"
    """the expected frame is in its buffers"""
    WAITING = "waiting"
    """more bytes must come"""
    PARKED = "parked"
    """the next frame is newer than the expected one: it stays in the channel until its turn"""
    CLOSED = "closed"
    REFUSED = "refused"
    """the peer sent what is no frame of ours, or one that does not fit the exchange"""


@dataclass(slots=True)
class Counters:
    """What a dispatcher's channels did, over its whole life."""

    bytes_sent: int = 0
    bytes_received: int = 0
    stale_frames: int = 0
    refused_frames: int = 0
    refused_handshakes: int = 0


def byte_view(array: Any) -> memoryview:
    """The bytes of a non-empty contiguous array."""
    return memoryview(array).cast("B")


class Channel:
    """A connected, non-blocking stream socket. `peer` is the rank at its other end, `address` the incarnation of it."""

    def __init__(self, sock: socket.socket, peer: int, address: str, counters: Counters, max_payload_bytes: int):
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.address = address
        self.broken = False
        """the other end is gone: sending failed, or end-of-file was read"""
        self._counters = counters
        self._max_payload_bytes = max_payload_bytes
        self._out: deque[memoryview] = deque()
        self._raw_header = memoryview(bytearray(HEADER_BYTES))
        self._header_got = 0
        self._header: Header | None = None
        self._body: list[memoryview] | None = None
        """what is still to be filled of the expected frame; None before its reader is known"""
        self._discard: int | None = None
        """bytes still to be dropped of an older frame"""

    # ---- out

    @property
    def has_unsent(self) -> bool:
        return bool(self._out)

    def post(self, buffers: Sequence[Any]) -> None:
        """Queue one frame (non-empty byte buffers, owned by the channel from now on) and send what the socket takes."""
        self._out.extend(memoryview(b) for b in buffers)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. A peer that is gone sets `broken`; nothing is raised."""
        out = self._out
        while out and not self.broken:
            try:
                batch = list(out) if len(out) <= _MAX_BUFFERS else [out[i] for i in range(_MAX_BUFFERS)]
                sent = self.sock.sendmsg(batch, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.broken = True
                return
            self._counters.bytes_sent += sent
            while sent:
                head = out[0]
                if sent < len(head):
                    out[0] = head[sent:]
                    return
                sent -= len(head)
                out.popleft()

    # ---- in

    def receive(self, want: FrameKey, accept: Accept) -> Progress:
        """Read until the frame `want` is complete or no more bytes are there. Older frames are dropped, a newer one is left."""
        try:
            while True:
                header = self._header or self._read_header()
                if header.key > want:
                    return Progress.PARKED
                if header.key == want:
                    if self._body is None:
                        self._body = [memoryview(b) for b in accept(self.peer, header)]
                    self._read_body(self._body)
                    self._start_next()
                    return Progress.DONE
                if self._discard is None:
                    # never wanted, or its call was aborted half-way and the rest has no reader any more
                    self._discard = header.payload_bytes if self._body is None else sum(map(len, self._body))
                self._read_discard()
                self._counters.stale_frames += 1
                self._start_next()
        except BlockingIOError:
            return Progress.WAITING
        except FrameError:
            self._counters.refused_frames += 1
            return Progress.REFUSED
        except OSError:
            self.broken = True
            return Progress.CLOSED

    def _start_next(self) -> None:
        self._header = self._body = self._discard = None
        self._header_got = 0

    def _read_header(self) -> Header:
        while self._header_got < HEADER_BYTES:
            self._header_got += self._count(self.sock.recv_into(self._raw_header[self._header_got :]))
        self._header = parse_header(self._raw_header, self._max_payload_bytes)
        return self._header

    def _read_body(self, body: list[memoryview]) -> None:
        while body:
            got = self._count(self.sock.recv_into(body[0]) if len(body) == 1 else self.sock.recvmsg_into(body)[0])
            while body and got >= len(body[0]):
                got -= len(body.pop(0))
            if got:
                body[0] = body[0][got:]

    def _read_discard(self) -> None:
        assert self._discard is not None
        scratch = memoryview(bytearray(min(self._discard, _DISCARD_BYTES)))
        while self._discard:
            self._discard -= self._count(self.sock.recv_into(scratch[: self._discard]))

    def _count(self, got: int) -> int:
        if not got:
            raise ConnectionResetError("end of file")
        self._counters.bytes_received += got
        return got

    def close(self) -> None:
        self.broken = True
        self._out.clear()
        self.sock.close()
