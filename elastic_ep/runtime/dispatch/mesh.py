"""The channels of one rank: listening, dialling, handshakes, and matching them to the peers of an epoch.

The higher rank dials, the lower one listens. At start all do so at once; when a newcomer joins, the ranks below it wait for its call and
those above it call it. A rank whose address changed is a new process: its old channel is closed, the new one takes its place.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Mapping

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch import addresses, handshake
from elastic_ep.runtime.dispatch.base import FailureKind, Interrupted, PeerFailed
from elastic_ep.runtime.dispatch.calls import Call, Guest
from elastic_ep.runtime.dispatch.channel import Channel, Counters
from elastic_ep.runtime.dispatch.outbox import Inbox, Outbox, OutboxError

GONE = select.POLLHUP | select.POLLERR | select.POLLRDHUP
"""poll events that say the other end has closed, also while unread bytes are left"""
_MAX_GUESTS = 1024


class Mesh:
    """Channels to the peers of the current epoch. `channels` lacks those that failed since the last `connect`.

    Args:
        region_bytes: size of each region of this rank's outbox. With 0, or if the listen address is not a Unix one, all rows go through
            sockets.
    """

    def __init__(self, rank: int, listen_address: str, token: str, interrupt_fd: int | None, max_payload_bytes: int, region_bytes: int):
        self.rank = rank
        self.address = listen_address
        self.peers: dict[int, str] = {}
        self.channels: dict[int, Channel] = {}
        self.counters = Counters()
        self.outbox: Outbox | None = None
        self.generation = 0
        """grows whenever a channel comes or goes"""
        self._token = token
        self._interrupt_fd = interrupt_fd
        self._max_payload_bytes = max_payload_bytes
        self._region_bytes = region_bytes
        self._listener: socket.socket | None = None
        self._calls: dict[int, Call] = {}

    def listen(self) -> str:
        """Start listening, once, or again where somebody has removed the socket's file. Returns the address that peers dial.

        Raises InvalidInputError.
        """
        if self._listener is not None and not addresses.exists(self.address):
            with contextlib.suppress(InvalidInputError):  # its folder is not there again yet; the channels that there are need no listener
                again, _ = addresses.listen(self.address)
                self._listener.close()
                self._listener = again
        if self._listener is None:
            self._listener, self.address = addresses.listen(self.address)
            if self._region_bytes and self._listener.family == socket.AF_UNIX:
                try:
                    self.outbox = Outbox(self._region_bytes)
                except OutboxError:
                    self.outbox = None
        return self.address

    def close(self) -> None:
        for rank in list(self.channels):
            self.drop(rank)
        self._hang_up()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            addresses.unlink(self.address)
        if self.outbox is not None:
            self.outbox.close()
            self.outbox = None

    def drop(self, rank: int) -> None:
        """Close the channel to a rank, if there is one."""
        channel = self.channels.pop(rank, None)
        if channel is not None:
            self.generation += 1
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
        self._hang_up({rank: address for rank, address in self.peers.items() if rank not in self.channels})
        for rank, address in self.peers.items():
            if rank < self.rank and rank not in self._calls:
                self._calls[rank] = Call(rank, address)
        for call in self._calls.values():
            call.outcome = FailureKind.DEADLINE
        guests: dict[int, Guest] = {}
        met = None
        try:
            met = self._meet(self._calls, guests, deadline)
        finally:
            for guest in guests.values():
                guest.close()
            self._hang_up({call.rank: call.address for call in self._calls.values() if met is not None and call.has_spoken})
        return met

    def _hang_up(self, but: Mapping[int, str] | None = None) -> None:
        """End the calls under way but those to these ranks at these addresses. One that an interrupt or the deadline cut short is kept
        if it has spoken: the peer may have answered already and count the channel as made; hanging up would leave it waiting for nobody."""
        for rank, call in list(self._calls.items()):
            if but is None or but.get(rank) != call.address:
                self._calls.pop(rank).close()

    def _drop_gone(self) -> None:
        """Close the channels whose other end is closed, also if unread frames are left."""
        poll = select.poll()
        for channel in self.channels.values():
            poll.register(channel.fd, select.POLLRDHUP)
        gone = {fd for fd, _ in poll.poll(0)}
        for rank in [r for r, c in self.channels.items() if c.broken or c.fd in gone]:
            self.drop(rank)

    # ---- the loop of connect

    def _meet(self, calls: dict[int, Call], guests: dict[int, Guest], deadline: float) -> PeerFailed | Interrupted | None:
        """Call and answer until every peer has a channel, the deadline passes or the interrupt fires."""
        self._accept(guests)
        last_look = False
        while True:
            now = time.monotonic()
            if self.channels.keys() >= self.peers.keys():
                self._drop_gone()  # the answer to an old call may have come from a peer that has hung up since
            missing = [rank for rank in self.peers if rank not in self.channels]
            if not missing:
                return None
            if last_look:
                return PeerFailed({r: calls[r].outcome if r in calls else FailureKind.DEADLINE for r in missing})
            last_look = now >= deadline  # this process may have been stopped past it, with all answers waiting to be read
            due = [calls[r] for r in missing if r in calls]
            for call in due:
                if call.sock is None and now >= call.retry_at:
                    call.start(self.rank, self.address, self._token, self.outbox, now)
            events = self._poll(due, guests, now, deadline)
            if self._interrupt_fd in events:
                return Interrupted()
            if any(channel.fd in events for channel in self.channels.values()):
                self._drop_gone()
            for call in due:
                if call.sock is not None and call.sock.fileno() in events:
                    self._advance(call)
            for fd in [fd for fd in guests if fd in events]:
                self._greet(guests, fd)
            self._accept(guests)

    def _poll(self, calls: list[Call], guests: dict[int, Guest], now: float, deadline: float) -> dict[int, int]:
        """Wait for any of the sockets, the next retry or the deadline. Returns fd -> events."""
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
        for call in calls:
            if call.sock is not None:
                poll.register(call.sock, select.POLLOUT if call.wants_to_write else select.POLLIN)
            else:
                wake = min(wake, call.retry_at)
        return dict(poll.poll(max(0.0, (wake - now) * 1e3)))

    def _advance(self, call: Call) -> None:
        answered = call.advance(self._token, self.outbox, time.monotonic())
        if answered is not None:
            self._install(call.rank, *answered)
        elif call.outcome is FailureKind.PROTOCOL and call.sock is None:
            self.counters.refused_handshakes += 1

    def _accept(self, guests: dict[int, Guest]) -> None:
        assert self._listener is not None
        while len(guests) < _MAX_GUESTS:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            addresses.tune(sock)
            guests[sock.fileno()] = Guest(sock)
            self._greet(guests, sock.fileno())

    def _greet(self, guests: dict[int, Guest], fd: int) -> None:
        """Read on in a guest's hello; once it is whole, let the guest in or close."""
        guest = guests[fd]
        hello = None
        try:
            guest.hello.read()
            hello = self._expected(handshake.parse_hello(guest.hello.raw, self._token))
            if hello is not None:
                inbox = guest.welcome(hello.region_bytes, self._token, self.outbox)
                self._install(hello.rank, guest.sock, inbox)
                del guests[fd]
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        if hello is None:
            self.counters.refused_handshakes += 1
        del guests[fd]
        guest.close()

    def _expected(self, hello: handshake.Hello | None) -> handshake.Hello | None:
        """The hello, if it is from a peer of this epoch in the very incarnation that we were told, and means us."""
        if hello is None or hello.target != self.rank or hello.target_digest != handshake.address_digest(self.address):
            return None
        address = self.peers.get(hello.rank)
        if hello.rank <= self.rank or address is None or hello.address_digest != handshake.address_digest(address):
            return None
        return hello

    def _install(self, rank: int, sock: socket.socket, inbox: Inbox | None) -> None:
        self.drop(rank)
        self.generation += 1
        self.channels[rank] = Channel(sock, rank, self.peers[rank], self.counters, self._max_payload_bytes, inbox)
