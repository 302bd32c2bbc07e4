"""The embedded default: a full mesh of stream sockets (Unix on one host, TCP between hosts); no group to rebuild after a death.

Per MoE layer each rank sends one frame to every peer and awaits one from each, twice: rows out (dispatch), expert outputs back (combine).
A call returns when every frame has come and every own byte has left, so a peer never waits for bytes that a busy rank still holds.

When a peer is known to have failed the step is void, and waiting for the others would only delay recovery: the call goes on for
`grace_s` to take in what is already on its way, then returns. Peers that were cut short by that are not named as failed.
A DEADLINE is a suspicion: a rank that waits for a hung one looks the same to a third.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.channel import Accept, Channel, Progress, byte_view
from elastic_ep.runtime.dispatch.checks import DTYPES, check_combine, check_dispatch
from elastic_ep.runtime.dispatch.frames import FrameError, FrameKey, Header, Phase, pack_header
from elastic_ep.runtime.dispatch.grouping import Departure, as_array, plan_arrival, plan_departure, take_rows, weighted_sum
from elastic_ep.runtime.dispatch.mesh import GONE, Mesh

_FAILURE_OF = {Progress.CLOSED: FailureKind.CLOSED, Progress.REFUSED: FailureKind.PROTOCOL}


@dataclass(frozen=True, slots=True)
class _Exchanged:
    """How an exchange ended: which peers failed, which frames came, whether the interrupt fired."""

    failed: dict[int, FailureKind]
    arrived: set[int]
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class _SocketState:
    """What combine needs of a dispatch: this rank's own plan, and where each source's pairs stand among the grouped rows."""

    at: StepPoint
    departure: Departure
    weights: torch.Tensor
    back: NDArray[np.int64]
    source_pairs: dict[int, tuple[int, int]]


class SocketDispatcher:
    """One rank's end of the mesh. Not thread-safe.

    Args:
        rank: this rank's seat.
        listen_address: `unix:/path`, `unix:@name` or `tcp:HOST:PORT` (port 0: any free one), optionally with
            `#incarnation`. Must be another one for each process that takes the seat.
        token: shared by the ranks of one run; who does not know it is not let in.
        interrupt: a socket or file descriptor; while it is readable, a call that has to wait returns Interrupted instead.
        deadline_s: longest wait for peers in one dispatch or combine. Must exceed the slowest peer's expert compute.
        grace_s: how much longer a call takes in other peers' frames once one peer is known to have failed.
        max_payload_bytes: a frame that claims more is refused.
    """

    def __init__(
        self,
        rank: int,
        listen_address: str,
        *,
        token: str,
        interrupt: socket.socket | int | None = None,
        deadline_s: float = 10.0,
        grace_s: float = 0.005,
        max_payload_bytes: int = 1 << 32,
    ):
        self.rank = rank
        self.deadline_s = deadline_s
        self.grace_s = grace_s
        self._interrupt_fd = interrupt.fileno() if isinstance(interrupt, socket.socket) else interrupt
        self._mesh = Mesh(rank, listen_address, token, self._interrupt_fd, max_payload_bytes)
        self._last_key = FrameKey(-1, -1, -1, -1)
        self._routing: RoutingTable | None = None
        self._served: dict[int, NDArray[np.bool_]] = {}

    # ---- membership

    @property
    def address(self) -> str:
        """What peers dial; final once `listen` was called."""
        return self._mesh.address

    @property
    def connected_ranks(self) -> tuple[int, ...]:
        """Peers with a channel, ascending."""
        return tuple(sorted(self._mesh.channels))

    bytes_sent = property(lambda self: self._mesh.counters.bytes_sent)
    bytes_received = property(lambda self: self._mesh.counters.bytes_received)
    stale_frames = property(lambda self: self._mesh.counters.stale_frames)
    refused_frames = property(lambda self: self._mesh.counters.refused_frames)
    refused_handshakes = property(lambda self: self._mesh.counters.refused_handshakes)

    def listen(self) -> str:
        """Start listening (once) and return the address to announce. `connect` does it too. Raises InvalidInputError."""
        return self._mesh.listen()

    def connect(self, peers: Mapping[int, str], deadline_s: float) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`."""
        return self._mesh.connect(peers, deadline_s)

    def close(self) -> None:
        """Close every channel and the listener."""
        self._mesh.close()

    def __enter__(self) -> SocketDispatcher:
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- one layer

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`. Raises InvalidInputError for input that cannot be served; `at` must grow from call to call."""
        ids = check_dispatch(x, topk_ids, topk_weights, routing, at)
        key = self._next_key(at, Phase.DISPATCH)
        ranks = self._ranks()
        departure = plan_departure(ids, routing.destination_ranks(at.layer, ids, self.rank, at.step), ranks[-1] + 1)
        self._check_destinations(departure, ranks)
        code, source = DTYPES.index(x.dtype), as_array(x)
        hidden = source.shape[1]
        leaving = np.empty((len(departure.tokens), hidden), dtype=source.dtype)
        take_rows(source, departure.tokens, leaving)
        parts = {r: self._own_part(departure, leaving, r) for r in ranks}
        received = {self.rank: parts[self.rank]}

        def accept(peer: int, header: Header) -> list[memoryview]:
            if header.hidden != hidden or header.dtype_code != code:
                raise FrameError(f"rank {peer} sent hidden {header.hidden} dtype {header.dtype_code}, here {hidden} and {code}")
            pairs = np.empty((header.pairs, 2), dtype=np.int32)
            rows = np.empty((header.rows, hidden), dtype=source.dtype)
            received[peer] = pairs, rows
            return [byte_view(a) for a in (pairs, rows) if a.size]

        frames = {
            r: [pack_header(key, code, len(rows), len(pairs), hidden), *(byte_view(a) for a in (pairs, rows) if a.size)]
            for r, (pairs, rows) in parts.items()
            if r != self.rank
        }
        done = self._exchange(key, frames, accept)
        if done.interrupted:
            return Interrupted()
        self._refuse_bad_pairs(done, received, routing, at.layer)
        sources = [r for r in ranks if r == self.rank or (r in done.arrived and r not in done.failed)]
        handle = self._group(x, topk_weights, at, departure, {r: received[r] for r in sources})
        return PeerFailed(done.failed, handle) if done.failed else handle

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`."""
        state: _SocketState = handle.state
        y = check_combine(y, handle)
        key = self._next_key(state.at, Phase.COMBINE)
        departure, code, outputs = state.departure, DTYPES.index(y.dtype), as_array(y)
        hidden = outputs.shape[1]
        leaving = np.empty(outputs.shape, dtype=outputs.dtype)
        take_rows(outputs, state.back, leaving)
        returned = np.empty((len(departure.pairs), hidden), dtype=outputs.dtype)
        own = state.source_pairs[self.rank]
        returned[departure.pair_start[self.rank] : departure.pair_start[self.rank + 1]] = leaving[own[0] : own[1]]

        def accept(peer: int, header: Header) -> list[memoryview]:
            start, end = departure.pair_start[peer], departure.pair_start[peer + 1]
            if (header.hidden, header.dtype_code, header.pairs) != (hidden, code, end - start):
                raise FrameError(f"rank {peer} returned {header.pairs} rows of hidden {header.hidden}; sent there were {end - start}")
            part = returned[start:end]
            return [byte_view(part)] if part.size else []

        frames = {}
        for peer, (start, end) in state.source_pairs.items():
            if peer != self.rank:
                part = leaving[start:end]
                frames[peer] = [pack_header(key, code, 0, end - start, hidden), *([byte_view(part)] if part.size else [])]
        done = self._exchange(key, frames, accept)
        if done.interrupted:
            return Interrupted()
        if done.failed:
            for peer in self._mesh.peers:
                if peer not in done.arrived or peer in done.failed:
                    returned[departure.pair_start[peer] : departure.pair_start[peer + 1]] = 0
        out = weighted_sum(returned, departure.position, state.weights, y.dtype)
        return PeerFailed(done.failed, out) if done.failed else out

    # ---- parts of dispatch

    def _ranks(self) -> list[int]:
        return sorted([self.rank, *self._mesh.peers])

    def _next_key(self, at: StepPoint, phase: Phase) -> FrameKey:
        key = FrameKey.of(at, phase)
        if key <= self._last_key:
            raise InvalidInputError(
                f"{phase.name.lower()} at {tuple(at)} is not after {tuple(self._last_key)}; run a void step again under a later one"
            )
        self._last_key = key
        return key

    def _check_destinations(self, departure: Departure, ranks: list[int]) -> None:
        start = departure.pair_start
        strangers = [r for r in range(ranks[-1] + 1) if start[r] != start[r + 1] and r not in ranks]
        if strangers:
            raise InvalidInputError(
                f"the routing table sends rows to ranks {strangers}, the mesh has {ranks}; connect the epoch's peers first"
            )

    @staticmethod
    def _own_part(departure: Departure, leaving: NDArray[Any], rank: int) -> tuple[NDArray[np.int32], NDArray[Any]]:
        pair, row = departure.pair_start, departure.row_start
        return departure.pairs[pair[rank] : pair[rank + 1]], leaving[row[rank] : row[rank + 1]]

    def _refuse_bad_pairs(
        self, done: _Exchanged, received: Mapping[int, tuple[NDArray[np.int32], NDArray[Any]]], routing: RoutingTable, layer: int
    ) -> None:
        """A peer that named a row it did not send, or an expert that this rank does not serve, has failed."""
        served = self._served_experts(routing, layer)
        for peer in done.arrived:
            pairs, rows = received[peer]
            if not len(pairs):
                continue
            top_row, top_expert = pairs.view(np.uint32).max(axis=0).tolist()
            if top_row >= len(rows) or top_expert >= len(served) or not served[pairs[:, 1]].all():
                self._mesh.counters.refused_frames += 1
                done.failed[peer] = FailureKind.PROTOCOL
                self._mesh.drop(peer)

    def _served_experts(self, routing: RoutingTable, layer: int) -> NDArray[np.bool_]:
        """bool [E]: the experts of a layer with a replica here."""
        if routing is not self._routing:
            self._routing, self._served = routing, {}
        served = self._served.get(layer)
        if served is None:
            served = self._served[layer] = (routing.replica_rank[layer] == self.rank).any(-1)
        return served

    def _group(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        at: StepPoint,
        departure: Departure,
        received: dict[int, tuple[NDArray[np.int32], NDArray[Any]]],
    ) -> DispatchHandle:
        """Rows of all sources (ascending) grouped by expert."""
        source_pairs, row_index, base, start = {}, [], 0, 0
        for rank, (pairs, rows) in received.items():
            source_pairs[rank] = (start, start + len(pairs))
            row_index.append(pairs[:, 0] + base)
            base, start = base + len(rows), start + len(pairs)
        arrival = plan_arrival(np.concatenate(row_index), np.concatenate([pairs[:, 1] for pairs, _ in received.values()]))
        grouped = torch.empty((len(arrival.source_row), x.shape[1]), dtype=x.dtype)
        take_rows(np.concatenate([rows for _, rows in received.values()]), arrival.source_row, as_array(grouped))
        return DispatchHandle(grouped, arrival.groups, _SocketState(at, departure, weights, arrival.back, source_pairs))

    # ---- the exchange

    def _exchange(self, key: FrameKey, frames: Mapping[int, Sequence[Any]], accept: Accept) -> _Exchanged:
        """Send one frame to each peer and take in one from each."""
        mesh = self._mesh
        failed = {r: FailureKind.CLOSED for r in mesh.peers if r not in mesh.channels}
        arrived: set[int] = set()
        waiting: dict[int, Channel] = {}
        poll = select.poll()
        for rank, channel in mesh.channels.items():
            if rank in frames:
                channel.post(frames[rank])
            waiting[channel.fd] = channel
            poll.register(channel.fd, select.POLLIN | select.POLLOUT if channel.has_unsent else select.POLLIN)
        if self._interrupt_fd is not None:
            poll.register(self._interrupt_fd, select.POLLIN)
        deadline = time.monotonic() + self.deadline_s
        if failed:
            deadline = min(deadline, time.monotonic() + self.grace_s)
        while waiting:
            events = poll.poll(max(0.0, (deadline - time.monotonic()) * 1e3))
            if not events:
                if not failed:
                    failed = {channel.peer: FailureKind.DEADLINE for channel in waiting.values()}
                break
            for fd, event in events:
                if fd == self._interrupt_fd:
                    return _Exchanged(failed, arrived, interrupted=True)
                channel = waiting[fd]
                kind = _advance(channel, event, key, accept, arrived, poll)
                if kind is not None:
                    failed[channel.peer] = kind
                    mesh.drop(channel.peer)
                    deadline = min(deadline, time.monotonic() + self.grace_s)
                if kind is not None or (channel.peer in arrived and not channel.has_unsent):
                    poll.unregister(fd)
                    del waiting[fd]
        return _Exchanged(failed, arrived)


def _advance(channel: Channel, event: int, key: FrameKey, accept: Accept, arrived: set[int], poll: select.poll) -> FailureKind | None:
    """Serve one ready channel and say what to poll it for next. Returns how the peer failed, if it did."""
    if channel.has_unsent:
        channel.flush()
    progress = Progress.DONE if channel.peer in arrived else channel.receive(key, accept)
    if progress is Progress.DONE:
        arrived.add(channel.peer)
    if progress in _FAILURE_OF:
        return _FAILURE_OF[progress]
    if channel.broken or (event & GONE and progress is Progress.PARKED):
        return FailureKind.CLOSED
    interest = select.POLLIN if progress is Progress.WAITING else select.POLLRDHUP
    poll.modify(channel.fd, interest | select.POLLOUT if channel.has_unsent else interest)
    return None
