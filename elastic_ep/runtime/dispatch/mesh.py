"""The channels of one rank: listening, dialling, handshakes, and matching them to the peers of an epoch.

The higher rank dials, the lower one listens. At start all do so at once; when a newcomer joins, the ranks below it wait for its call and
those above it call it. A rank whose address changed is a new process: its old channel is closed, the new one takes its place.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch import addresses, handshake
from elastic_ep.runtime.dispatch.base import FailureKind, Interrupted, PeerFailed
from elastic_ep.runtime.dispatch.channel import Channel, Counters

GONE = select.POLLHUP | select.POLLERR | select.POLLRDHUP
"""poll events that say the other end has closed, also while unread bytes are left"""
_RETRY_MIN_S = 0.001
_RETRY_MAX_S = 0.02
_MAX_GUESTS = 1024


@dataclass(slots=True)
class _Dial:
    """An outgoing call. `sock` is None between two attempts."""

    rank: int
    address: str
    sock: socket.socket | None = None
    hello: bytes = b""
    answer: bytes = b""
    sent: bool = False
    retry_at: float = 0.0
    pause_s: float = _RETRY_MIN_S
    outcome: FailureKind = FailureKind.DEADLINE


@dataclass(slots=True)
class _Guest:
    """An accepted connection whose hello is not complete."""

    sock: socket.socket
    hello: bytes = b""


class Mesh:
    """Channels to the peers of the current epoch. `channels` lacks those that failed since the last `connect`."""

    def __init__(self, rank: int, listen_address: str, token: str, interrupt_fd: int | None, max_payload_bytes: int):
        self.rank = rank
        self.address = listen_address
        self.peers: dict[int, str] = {}
        self.channels: dict[int, Channel] = {}
        self.counters = Counters()
        self._token = token
        self._interrupt_fd = interrupt_fd
        self._max_payload_bytes = max_payload_bytes
        self._listener: socket.socket | None = None

    def listen(self) -> str:
        """Start listening, once. Returns the address that peers dial. Raises InvalidInputError."""
        if self._listener is None:
            self._listener, self.address = addresses.listen(self.address)
        return self.address

    def close(self) -> None:
        for rank in list(self.channels):
            self.drop(rank)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            addresses.unlink(self.address)

    def drop(self, rank: int) -> None:
        """Close the channel to a rank, if there is one."""
        channel = self.channels.pop(rank, None)
        if channel is not None:
            channel.close()

    def connect(self, peers: Mapping[int, str], deadline_s: float) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`."""
        self.listen()
        if peers.get(self.rank, self.address) != self.address:
            raise InvalidInputError(f"peers name {peers[self.rank]!r} for rank {self.rank}, which listens on {self.address!r}")
        self.peers = {rank: address for rank, address in peers.items() if rank != self.rank}
        for rank, channel in list(self.channels.items()):
            if self.peers.get(rank) != channel.address:
                self.drop(rank)
        self._drop_gone()
        deadline = time.monotonic() + deadline_s
        dials = {rank: _Dial(rank, address) for rank, address in self.peers.items() if rank < self.rank}
        guests: dict[int, _Guest] = {}
        try:
            return self._meet(dials, guests, deadline)
        finally:
            for dial in dials.values():
                if dial.sock is not None:
                    dial.sock.close()
            for guest in guests.values():
                guest.sock.close()

    def _drop_gone(self) -> None:
        poll = select.poll()
        for channel in self.channels.values():
            poll.register(channel.fd, select.POLLRDHUP)
        gone = {fd for fd, _ in poll.poll(0)}
        for rank in [r for r, c in self.channels.items() if c.broken or c.fd in gone]:
            self.drop(rank)

    # ---- the loop of connect

    def _meet(self, dials: dict[int, _Dial], guests: dict[int, _Guest], deadline: float) -> PeerFailed | Interrupted | None:
        """Call and answer until every peer has a channel, the deadline passes or the interrupt fires."""
        self._accept(guests)
        while True:
            now = time.monotonic()
            self._start_calls(dials, now)
            missing = [rank for rank in self.peers if rank not in self.channels]
            if not missing:
                return None
            if now >= deadline:
                return PeerFailed({r: dials[r].outcome if r in dials else FailureKind.DEADLINE for r in missing})
            events = self._poll(dials, guests, missing, now, deadline)
            if self._interrupt_fd in events:
                return Interrupted()
            if any(channel.fd in events for channel in self.channels.values()):
                self._drop_gone()
            for dial in dials.values():
                if dial.sock is not None and dial.sock.fileno() in events:
                    self._advance_call(dial)
            for fd in [fd for fd in guests if fd in events]:
                self._greet(guests, fd)
            self._accept(guests)

    def _poll(self, dials: dict[int, _Dial], guests: dict[int, _Guest], missing: list[int], now: float, deadline: float) -> dict[int, int]:
        assert self._listener is not None
        poll = select.poll()
        wake = deadline
        poll.register(self._listener, select.POLLIN)
        if self._interrupt_fd is not None:
            poll.register(self._interrupt_fd, select.POLLIN)
        for channel in self.channels.values():
            poll.register(channel.fd, select.POLLRDHUP)
        for fd in guests:
            poll.register(fd, select.POLLIN)
        for dial in dials.values():
            if dial.sock is not None:
                poll.register(dial.sock, select.POLLIN if dial.sent else select.POLLOUT)
            elif dial.rank in missing:
                wake = min(wake, dial.retry_at)
        return dict(poll.poll(max(0.0, (wake - now) * 1e3)))

    # ---- calling

    def _start_calls(self, dials: dict[int, _Dial], now: float) -> None:
        for dial in dials.values():
            if dial.sock is None and dial.rank not in self.channels and now >= dial.retry_at:
                endpoint = addresses.parse_address(dial.address)
                dial.sock = addresses.new_socket(endpoint)
                dial.hello = handshake.pack_hello(self.rank, self.address, dial.rank, dial.address, self._token)
                dial.answer, dial.sent = b"", False
                try:
                    dial.sock.connect(endpoint.target)
                except BlockingIOError as error:
                    if error.errno != errno.EINPROGRESS:
                        self._hang_up(dial)
                except OSError:
                    self._hang_up(dial)

    def _hang_up(self, dial: _Dial, outcome: FailureKind = FailureKind.DEADLINE) -> None:
        """This attempt failed; another one follows after a pause that grows."""
        assert dial.sock is not None
        dial.sock.close()
        dial.sock = None
        dial.outcome = outcome
        dial.retry_at = time.monotonic() + dial.pause_s
        dial.pause_s = min(2 * dial.pause_s, _RETRY_MAX_S)

    def _advance_call(self, dial: _Dial) -> None:
        assert dial.sock is not None
        try:
            if not dial.sent:
                # a fresh socket takes these few bytes whole
                dial.sent = dial.sock.send(dial.hello, socket.MSG_NOSIGNAL) == len(dial.hello)
                return
            got = dial.sock.recv(handshake.WELCOME_BYTES - len(dial.answer))
        except BlockingIOError:
            return
        except OSError:
            self._hang_up(dial)
            return
        if not got:
            self._hang_up(dial, FailureKind.CLOSED)
            return
        dial.answer += got
        if len(dial.answer) < handshake.WELCOME_BYTES:
            return
        if dial.answer != handshake.welcome_for(dial.hello, self._token):
            self.counters.refused_handshakes += 1
            self._hang_up(dial, FailureKind.PROTOCOL)
            return
        self._install(dial.sock, dial.rank)
        dial.sock = None
        dial.pause_s = _RETRY_MIN_S

    # ---- answering

    def _accept(self, guests: dict[int, _Guest]) -> None:
        assert self._listener is not None
        while len(guests) < _MAX_GUESTS:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            addresses.tune(sock)
            guests[sock.fileno()] = _Guest(sock)
            self._greet(guests, sock.fileno())

    def _greet(self, guests: dict[int, _Guest], fd: int) -> None:
        """Read on in a guest's hello; once it is whole, let the guest in or close."""
        guest = guests[fd]
        try:
            got = guest.sock.recv(handshake.HELLO_BYTES - len(guest.hello))
        except BlockingIOError:
            return
        except OSError:
            got = b""
        guest.hello += got
        if got and len(guest.hello) < handshake.HELLO_BYTES:
            return
        del guests[fd]
        rank = self._expected_guest(guest.hello) if got else None
        if rank is None:
            self.counters.refused_handshakes += 1
            guest.sock.close()
            return
        if not _answer(guest.sock, handshake.welcome_for(guest.hello, self._token)):
            guest.sock.close()
            return
        self._install(guest.sock, rank)

    def _expected_guest(self, raw: bytes) -> int | None:
        """The rank that a hello comes from, if it is a peer of this epoch in the very incarnation that we were told, and means us."""
        hello = handshake.parse_hello(raw, self._token)
        if hello is None or hello.target != self.rank or hello.target_digest != handshake.address_digest(self.address):
            return None
        address = self.peers.get(hello.rank)
        if hello.rank <= self.rank or address is None or hello.address_digest != handshake.address_digest(address):
            return None
        return hello.rank

    def _install(self, sock: socket.socket, rank: int) -> None:
        self.drop(rank)
        self.channels[rank] = Channel(sock, rank, self.peers[rank], self.counters, self._max_payload_bytes)


def _answer(sock: socket.socket, welcome: bytes) -> bool:
    """Send the welcome, unless the guest has hung up while it waited."""
    try:
        if sock.recv(1, socket.MSG_PEEK) == b"":
            return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    try:
        return sock.send(welcome, socket.MSG_NOSIGNAL) == len(welcome)
    except OSError:
        return False
