"""One stream socket to one peer: frames out without blocking, frames in straight into their buffers.

A channel never loses its place in the stream. What an aborted call left unsent is owned here and goes out before anything newer; what it
left unread is read later, and dropped or delivered by its key.
"""

from __future__ import annotations

import enum
import socket
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameError, FrameFormat, FrameKey, Header, parse_foreign
from elastic_ep.runtime.dispatch.outbox import Inbox

_AHEAD_BYTES = 1 << 16
"""read at once: a header and what small payload follows it"""
_DISCARD_BYTES = 1 << 18
_MAX_BUFFERS = 64
"""buffers handed to one sendmsg; well below the kernel's IOV_MAX"""


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
    """What a dispatcher's channels did, over its whole life. Rows that went through an outbox are not in the byte counts."""

    bytes_sent: int = 0
    bytes_received: int = 0
    stale_frames: int = 0
    refused_frames: int = 0
    refused_handshakes: int = 0


def byte_view(array: Any) -> memoryview:
    """The bytes of a non-empty contiguous array."""
    return memoryview(array).cast("B")


Accept = Callable[["Channel", Header, memoryview | None], Sequence[Any]]
"""(channel, header of the expected frame, its payload if that is here already) -> non-empty writable buffers for the payload, none if
it was taken from the argument, which is only valid during the call. Raises FrameError to refuse the frame."""


class Channel:
    """A connected, non-blocking stream socket.

    Attributes:
        peer, address: the rank at the other end, and the incarnation of it.
        inbox: the peer's outbox, if rows travel through shared memory both ways; else None.
        broken: the other end is gone: sending failed, or end-of-file was read.
    """

    def __init__(self, sock: socket.socket, peer: int, address: str, counters: Counters, max_payload_bytes: int, inbox: Inbox | None):
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        self.address = address
        self.inbox = inbox
        self.broken = False
        self._counters = counters
        self._max_payload_bytes = max_payload_bytes
        self._out: deque[Any] = deque()
        self.ahead = np.empty(_AHEAD_BYTES, dtype=np.uint8)
        self.cursor = array("q", (0, 0))
        """begin and end of what is read and not yet used of `ahead`"""
        self._view = memoryview(self.ahead.data)
        self._body: list[memoryview] | None = None
        """what is still to be filled of the frame that is being received"""
        self._body_key: FrameKey | None = None
        self._discard = 0
        """bytes still to be dropped of an older frame"""

    # ---- out

    @property
    def has_unsent(self) -> bool:
        return bool(self._out)

    @property
    def is_idle(self) -> bool:
        """Nothing is left to send, and no frame is half read."""
        return not (self._out or self.broken or self._discard or self._body is not None)

    def post(self, buffers: Sequence[Any]) -> None:
        """Queue one frame (non-empty byte buffers, owned by the channel from now on) and send what the socket takes."""
        self._out.extend(buffers)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. A peer that is gone sets `broken`; nothing is raised."""
        out = self._out
        while out and not self.broken:
            try:
                if len(out) == 1:
                    sent = self.sock.send(out[0], socket.MSG_NOSIGNAL)
                else:
                    sent = self.sock.sendmsg([out[i] for i in range(min(len(out), _MAX_BUFFERS))], (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self.broken = True
                return
            self._counters.bytes_sent += sent
            while out and sent >= len(out[0]):
                sent -= len(out.popleft())
            if sent:
                out[0] = memoryview(out[0])[sent:]

    # ---- in

    @property
    def holds_input(self) -> bool:
        """Bytes are here that no poll will announce."""
        return self.cursor[0] < self.cursor[1]

    def receive(self, want: FrameFormat, accept: Accept) -> Progress:
        """Read until the frame of the exchange `want` is complete or no more bytes are there. Older frames are dropped, a newer one
        stays."""
        try:
            while True:
                if self._body is not None:
                    if self._body_key == want.key:
                        self._read_body(self._body)
                        self._body = None
                        return Progress.DONE
                    # the call that wanted it was aborted half-way: the rest has no reader any more
                    self._start_discard(sum(map(len, self._body)))
                    self._body = None
                if self._discard:
                    self._read_discard()
                self._read_ahead(HEADER_BYTES)
                start = self.cursor[0] + HEADER_BYTES
                if self._view[self.cursor[0] : self.cursor[0] + len(want.prefix)] == want.prefix:
                    header = want.parse(self._view, self.cursor[0], self._max_payload_bytes)
                    end = start + header.payload_bytes
                    body = accept(self, header, self._view[start:end] if end <= self.cursor[1] else None)
                    if not body:
                        self.cursor[0] = end
                        return Progress.DONE
                    self._body = [memoryview(b).cast("B") for b in body]
                    self._body_key = want.key
                else:
                    other, header = parse_foreign(self._view, self.cursor[0], self._max_payload_bytes)
                    if other.key > want.key:
                        return Progress.PARKED
                    if other.key == want.key:
                        raise FrameError(f"rows of hidden {other.hidden}, dtype {other.dtype_code}; here {want.hidden}, {want.dtype_code}")
                    self._start_discard(header.payload_bytes)
                self.cursor[0] = start
        except BlockingIOError:
            return Progress.WAITING
        except FrameError:
            self._counters.refused_frames += 1
            return Progress.REFUSED
        except OSError:
            self.broken = True
            return Progress.CLOSED

    def _read_ahead(self, num_bytes: int) -> None:
        """Have at least so many unused bytes in `ahead`."""
        while self.cursor[1] - self.cursor[0] < num_bytes:
            left = self.cursor[1] - self.cursor[0]
            if left:
                self._view[:left] = self._view[self.cursor[0] : self.cursor[1]]
            self.cursor[0] = 0
            self.cursor[1] = left
            self.cursor[1] += self._count(self.sock.recv_into(self._view[left:] if left else self._view))

    def _read_body(self, body: list[memoryview]) -> None:
        while body:
            head = body[0]
            got = min(len(head), self.cursor[1] - self.cursor[0])
            if got:
                head[:got] = self._view[self.cursor[0] : self.cursor[0] + got]
                self.cursor[0] += got
            else:
                got = self._count(self.sock.recv_into(head) if len(body) == 1 else self.sock.recvmsg_into(body)[0])
            while body and got >= len(body[0]):
                got -= len(body.pop(0))
            if got:
                body[0] = body[0][got:]

    def _start_discard(self, num_bytes: int) -> None:
        self._counters.stale_frames += 1
        self._discard = num_bytes

    def _read_discard(self) -> None:
        got = min(self._discard, self.cursor[1] - self.cursor[0])
        self.cursor[0] += got
        self._discard -= got
        if self._discard:
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
