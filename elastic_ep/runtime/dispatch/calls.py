"""Two small state machines of a handshake in progress: a call that goes out, and a guest that came in. Neither ever blocks."""

from __future__ import annotations

import errno
import mmap
import os
import socket

from elastic_ep.runtime.dispatch import addresses, handshake
from elastic_ep.runtime.dispatch.base import FailureKind
from elastic_ep.runtime.dispatch.outbox import Inbox, Outbox, OutboxError, reserve

_RETRY_MIN_S = 0.001
_RETRY_MAX_S = 0.02


class Pickup:
    """Reads a message of known length and the file descriptor that may come with it."""

    def __init__(self, sock: socket.socket, num_bytes: int):
        self.sock = sock
        self.num_bytes = num_bytes
        self.raw = b""
        self._fds: list[int] = []

    def read(self) -> bool:
        """True once the message is whole. Raises BlockingIOError while bytes are missing, OSError when the other end is gone."""
        while len(self.raw) < self.num_bytes:
            got, fds, _, _ = socket.recv_fds(self.sock, self.num_bytes - len(self.raw), 4, socket.MSG_CMSG_CLOEXEC)
            self._fds += fds
            if not got:
                raise ConnectionResetError("closed during the handshake")
            self.raw += got
        return True

    def map_outbox(self, region_bytes: int) -> Inbox:
        """The other end's outbox. Raises OutboxError if none came or it is not what it says."""
        if not self._fds:
            raise OutboxError("no file descriptor came")
        return Inbox(self._fds[0], region_bytes)

    def drop_fds(self) -> None:
        """Mapped memory stays mapped without them."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Call:
    """A call to a lower rank, tried again after growing pauses until it is answered. `sock` is None between two attempts."""

    def __init__(self, rank: int, address: str) -> None:
        self.rank = rank
        self.address = address
        self.sock: socket.socket | None = None
        self.retry_at = 0.0
        self.outcome = FailureKind.DEADLINE
        """why there is no channel yet"""
        self._pause_s = _RETRY_MIN_S
        self._share = True
        self._room: mmap.mmap | None = None
        self._hello = b""
        self._sent = False
        self._answer: Pickup | None = None

    @property
    def wants_to_write(self) -> bool:
        return not self._sent

    @property
    def has_spoken(self) -> bool:
        """Whether the peer may be answering."""
        return self._sent and self.sock is not None

    def start(self, own_rank: int, own_address: str, token: str, outbox: Outbox | None, now: float) -> None:
        """Begin an attempt. A peer that does not listen yet only sets `retry_at`."""
        endpoint = addresses.parse_address(self.address)
        self.sock = addresses.new_socket(endpoint)
        region_bytes = self._offer(outbox if endpoint.family == socket.AF_UNIX else None)
        self._hello = handshake.pack_hello(own_rank, own_address, self.rank, self.address, region_bytes, token)
        self._sent = False
        self._answer = Pickup(self.sock, handshake.WELCOME_BYTES)
        try:
            self.sock.connect(endpoint.target)
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                self.hang_up(now, FailureKind.DEADLINE)

    def _offer(self, outbox: Outbox | None) -> int:
        """Bytes of the regions that we offer to share. A listener that accepts is done when it has answered, and will not hear that we lack
        the room for its own: it is held from now on."""
        if outbox is None or not self._share:
            self._share = False
            return 0
        try:
            self._room = self._room or reserve(outbox.region_bytes)
        except OutboxError:
            self._share = False
        return outbox.region_bytes if self._share else 0

    def _free_room(self) -> None:
        if self._room is not None:
            self._room.close()
            self._room = None

    def hang_up(self, now: float, outcome: FailureKind) -> None:
        """This attempt failed."""
        self.close()
        self.outcome = outcome
        self.retry_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _RETRY_MAX_S)

    def advance(self, token: str, outbox: Outbox | None, now: float) -> tuple[socket.socket, Inbox | None] | None:
        """Go on with a ready socket. Returns it, connected, with the listener's outbox if rows are to be shared; the call is over then."""
        assert self.sock is not None
        assert self._answer is not None
        try:
            if not self._sent:
                fds = [outbox.fd] if self._share and outbox is not None else []
                send_whole(self.sock, self._hello, fds)
                self._sent = True
                return None
            self._answer.read()
        except BlockingIOError:
            return None
        except OSError:
            self.hang_up(now, FailureKind.CLOSED if self._sent else FailureKind.DEADLINE)
            return None
        region_bytes = handshake.parse_welcome(self._answer.raw, self._hello, token)
        if region_bytes is None:
            self.hang_up(now, FailureKind.PROTOCOL)
            return None
        self._free_room()
        try:
            inbox = self._answer.map_outbox(region_bytes) if region_bytes else None
        except OutboxError:
            # it counts on sharing by now: call again without offering it
            self._share = False
            self.hang_up(now, FailureKind.PROTOCOL)
            return None
        sock, self.sock = self.sock, None
        self._answer.drop_fds()
        return sock, inbox

    def close(self) -> None:
        self._free_room()
        if self._answer is not None:
            self._answer.drop_fds()
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Guest:
    """An accepted connection whose hello is not complete."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.hello = Pickup(sock, handshake.HELLO_BYTES)

    def welcome(self, region_bytes: int, token: str, outbox: Outbox | None) -> Inbox | None:
        """Answer a good hello. Returns the guest's outbox if rows are to be shared. Raises OSError for a guest that hung up."""
        inbox = None
        if region_bytes and outbox is not None:
            try:
                inbox = self.hello.map_outbox(region_bytes)
            except OutboxError:
                pass
        shared = outbox if inbox is not None else None
        self._check_still_there()
        answer = handshake.pack_welcome(self.hello.raw, shared.region_bytes if shared else 0, token)
        send_whole(self.sock, answer, [shared.fd] if shared else [])
        self.hello.drop_fds()
        return inbox

    def _check_still_there(self) -> None:
        try:
            if not self.sock.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError("the guest has hung up")
        except BlockingIOError:
            pass

    def close(self) -> None:
        self.hello.drop_fds()
        self.sock.close()


def send_whole(sock: socket.socket, message: bytes, fds: list[int]) -> None:
    """A message that a fresh socket takes at once. Raises OSError."""
    sent = socket.send_fds(sock, [message], fds, socket.MSG_NOSIGNAL) if fds else sock.send(message, socket.MSG_NOSIGNAL)
    if sent != len(message):
        raise ConnectionResetError(f"a fresh socket took {sent} of {len(message)} bytes")
