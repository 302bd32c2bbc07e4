"""Who the peers are and where their memory is: introductions over the mesh's channels, mappings, and the words shared with kernels.

The channels carry one message each way, when they are new; after that they only serve as the death notice.
"""

from __future__ import annotations

import ctypes
import select
import time
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.runtime.dispatch.base import FailureKind, Interrupted, PeerFailed
from elastic_ep.runtime.dispatch.calls import send_whole
from elastic_ep.runtime.dispatch.channel import Channel
from elastic_ep.runtime.dispatch.cuda.bindings import CudaCallError, Library
from elastic_ep.runtime.dispatch.cuda.region import HELLO_BYTES, Hello
from elastic_ep.runtime.dispatch.mesh import GONE, Mesh

_KINDS = {1: FailureKind.DEADLINE, 2: FailureKind.CLOSED, 3: FailureKind.PROTOCOL}


class HostWords:
    """Pinned words that kernels and the host both reach: `cut` [R] written here, `failed` [R + 1] written by kernels."""

    def __init__(self, library: Library, num_seats: int):
        self._library = library
        self._num_seats = num_seats
        self._pointer = library.host_alloc(4 * (2 * num_seats + 1))
        self._words = (ctypes.c_int * (2 * num_seats + 1)).from_address(self._pointer)
        self.clear()

    @property
    def cut_at(self) -> int:
        return self._pointer

    @property
    def failed_at(self) -> int:
        return self._pointer + 4 * self._num_seats

    def clear(self) -> None:
        for i in range(len(self._words)):
            self._words[i] = 0

    def cut(self, rank: int) -> None:
        """Tell kernels, running ones too, that this peer is gone."""
        self._words[rank] = 1

    def outcome(self) -> PeerFailed | None:
        """What kernels have recorded since `clear`. Raises InvalidInputError for a batch that could not be routed."""
        *failed, batch = self._words[self._num_seats :]
        if batch == 2:
            raise InvalidInputError("more rows came than the buffers hold; give the cuda dispatch backend a larger max_rows")
        if batch:
            raise InvalidInputError(
                "a token's expert does not exist or has no live replica; install a routing table in which every expert has one"
            )
        kinds = {rank: _KINDS[how] for rank, how in enumerate(failed) if how}
        return PeerFailed(kinds) if kinds else None

    def close(self) -> None:
        self._library.host_free(self._pointer)


@dataclass
class _Peer:
    """One channel's introduction, and the mapping that came of it."""

    channel: Channel
    raw: bytearray = field(default_factory=bytearray)
    hello: Hello | None = None
    pointer: int = 0
    mapped: bool = False


class Peers:
    """The regions of all connected peers."""

    def __init__(self, library: Library, mesh: Mesh, own: Hello, interrupt_fd: int | None):
        self._library = library
        self._mesh = mesh
        self._own = own
        self._interrupt_fd = interrupt_fd
        self._peers: dict[int, _Peer] = {}

    @property
    def regions(self) -> dict[int, int]:
        """Addresses of the peers' regions here."""
        return {rank: peer.pointer for rank, peer in self._peers.items() if peer.pointer}

    @property
    def ranks_on_this_gpu(self) -> int:
        """Ranks that share the GPU, this one included."""
        return 1 + sum(peer.hello is not None and peer.hello.gpu == self._own.gpu for peer in self._peers.values())

    def introduce(self, deadline_s: float) -> PeerFailed | Interrupted | None:
        """Unmap who has gone, exchange hellos over new channels, map who came."""
        deadline = time.monotonic() + deadline_s
        channels = self._mesh.channels
        for rank in [r for r, p in self._peers.items() if channels.get(r) is not p.channel]:
            self._forget(rank)
        failed: dict[int, FailureKind] = {}
        for rank, channel in channels.items():
            if rank not in self._peers:
                self._peers[rank] = _Peer(channel)
                try:
                    send_whole(channel.sock, self._own.pack(), [])
                except OSError:
                    failed[rank] = FailureKind.CLOSED
        while True:
            waiting = {p.channel.fd: r for r, p in self._peers.items() if p.hello is None and r not in failed}
            if not waiting:
                break
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                failed.update(dict.fromkeys(waiting.values(), FailureKind.DEADLINE))
                break
            ready = self._poll(waiting, left_s)
            if self._interrupt_fd in ready:
                return Interrupted()
            for fd in ready:
                kind = self._listen(waiting[fd])
                if kind is not None:
                    failed[waiting[fd]] = kind
        for rank in failed:
            self._forget(rank)
            self._mesh.drop(rank)
        return PeerFailed(failed) if failed else None

    def _poll(self, fds: Any, timeout_s: float) -> set[int]:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        if self._interrupt_fd is not None:
            poll.register(self._interrupt_fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(timeout_s * 1e3)}

    def _listen(self, rank: int) -> FailureKind | None:
        """Read on in a hello; once it is whole, map the region that it names."""
        peer = self._peers[rank]
        try:
            got = peer.channel.sock.recv(HELLO_BYTES - len(peer.raw))
        except BlockingIOError:
            return None
        except OSError:
            return FailureKind.CLOSED
        if not got:
            return FailureKind.CLOSED
        peer.raw += got
        if len(peer.raw) < HELLO_BYTES:
            return None
        hello = Hello.parse(bytes(peer.raw))
        if hello is None:
            return FailureKind.PROTOCOL
        if hello.capacity != self._own.capacity:
            raise InvalidInputError(f"rank {rank} has other buffer sizes than this rank; give all ranks of a run the same Capacity")
        peer.hello = hello
        peer.pointer = hello.pointer
        if not hello.is_local:
            try:
                peer.pointer, peer.mapped = self._library.open(hello.handle), True
            except CudaCallError:
                return FailureKind.CLOSED
        return None

    def _forget(self, rank: int) -> None:
        peer = self._peers.pop(rank)
        if peer.mapped:
            self._library.close(peer.pointer)

    def close(self) -> None:
        for rank in list(self._peers):
            self._forget(rank)


class Watch:
    """Waits for the device without blocking in the driver, with an eye on the channels: a closed one is told to the kernels at once."""

    _SPIN_S = 0.002

    def __init__(self, mesh: Mesh, words: HostWords, interrupt_fd: int | None):
        self._mesh = mesh
        self._words = words
        self._interrupt_fd = interrupt_fd

    def wait(self, done: Any) -> bool:
        """Until the CUDA event, which kernels' deadlines bound. Returns True if the interrupt fired, which ends the kernels' waits."""
        interrupted = False
        began = time.monotonic()
        poll, ranks = self._watched()
        while not done.query():
            spinning = time.monotonic() - began < self._SPIN_S
            for fd, event in poll.poll(0 if spinning else 1):
                if fd == self._interrupt_fd:
                    interrupted = True
                    for rank in self._mesh.peers:
                        self._words.cut(rank)
                elif event & GONE:
                    self._words.cut(ranks[fd])
                    self._mesh.drop(ranks[fd])
                poll.unregister(fd)
        return interrupted

    def _watched(self) -> tuple[select.poll, dict[int, int]]:
        poll, ranks = select.poll(), {}
        for rank, channel in self._mesh.channels.items():
            ranks[channel.fd] = rank
            poll.register(channel.fd, select.POLLRDHUP)
        if self._interrupt_fd is not None:
            poll.register(self._interrupt_fd, select.POLLIN)
        return poll, ranks
