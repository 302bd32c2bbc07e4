"""The embedded default: a full mesh of stream sockets (Unix on one host, TCP between hosts); no group to rebuild after a death.

Per MoE layer each rank sends one frame to every peer and awaits one from each, twice: rows out (dispatch), expert outputs back (combine).
On one host the rows themselves lie in shared memory (`outbox.py`) and frames only name them; the sockets remain the order of events,
the death notice and the way between hosts.

When a peer is known to have failed the step is void, and waiting for the others would only delay recovery: the call goes on for
`grace_s` to take in what is already on its way, then returns. Peers that were cut short by that are not named as failed.
A DEADLINE is a suspicion: a rank that waits for a hung one looks the same to a third.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable, sequence_phases
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.channel import Accept, Channel, byte_view
from elastic_ep.runtime.dispatch.checks import DTYPES, check_combine, check_dispatch, checked_ids
from elastic_ep.runtime.dispatch.exchange import Exchange, Exchanged
from elastic_ep.runtime.dispatch.frames import FrameError, FrameFormat, FrameKey, Header, Phase
from elastic_ep.runtime.dispatch.grouping import Arrival, BadPairsError, Departure, distinct_rows, plan_arrival, plan_departure
from elastic_ep.runtime.dispatch.link import LayerTables, Link, LinkedState, Sources, unpack_plan, unpack_sources
from elastic_ep.runtime.dispatch.mesh import Mesh
from elastic_ep.runtime.dispatch.outbox import OutboxError
from elastic_ep.runtime.dispatch.rows import RowBuffer, array_dtype, as_array, compiled, gather, weighted_sum
from elastic_ep.runtime.faults import FaultPlan

_SMALL_BYTES = 1 << 13
"""a payload up to this is copied behind its header: one buffer to send instead of two"""


@dataclass(frozen=True, slots=True)
class _SocketState:
    """What combine needs of a dispatch: this rank's own plan, and where each source's pairs stand among the grouped rows."""

    at: StepPoint
    departure: Departure
    weights: torch.Tensor
    sources: Sources


class SocketDispatcher:
    """One rank's end of the mesh. Not thread-safe.

    Args:
        rank: this rank's seat.
        listen_address: `unix:/path`, `unix:@name` or `tcp:HOST:PORT` (port 0: any free one), optionally with `#incarnation`. Must be
            another one for each process that takes the seat.
        token: shared by the ranks of one run; who does not know it is not let in.
        interrupt: a socket or file descriptor; while it is readable, a call that has to wait returns Interrupted instead.
        deadline_s: longest wait for peers in one dispatch or combine. Must exceed the slowest peer's expert compute.
        grace_s: how much longer a call takes in other peers' frames once one peer is known to have failed.
        max_payload_bytes: a frame that claims more is refused.
        shared_bytes: address space (not memory) for the rows of one phase in shared memory; a larger batch goes through sockets, as
            everything does with 0.
        faults: for tests; frames go one by one while one of its faults waits at a frame.
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
        shared_bytes: int = 1 << 32,
        faults: FaultPlan | None = None,
    ):
        self.rank = rank
        interrupt_fd = interrupt.fileno() if isinstance(interrupt, socket.socket) else interrupt
        self._mesh = Mesh(rank, listen_address, token, interrupt_fd, max_payload_bytes, shared_bytes)
        self._exchange = Exchange(self._mesh, interrupt_fd, deadline_s, grace_s)
        self._faults = faults
        self._link: Link | None = None
        self._ranks = [rank]
        self._last_key = FrameKey(-1, -1, -1, -1)
        self._routing: RoutingTable | None = None
        self._tables: dict[int, LayerTables] = {}
        self._grouped = RowBuffer()
        self._buffers: dict[tuple[str, int], NDArray[np.uint8]] = {}

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

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int = 0) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`."""
        self._ranks = sorted({self.rank, *peers})
        return self._mesh.connect(peers, deadline_s)

    def close(self) -> None:
        """Close every channel and the listener."""
        self._mesh.close()

    def __enter__(self) -> SocketDispatcher:
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- dispatch

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`. Raises InvalidInputError for input that cannot be served; `at` must grow from call to call."""
        check_dispatch(x, topk_ids, topk_weights, routing, at)
        form = self._format(at, Phase.DISPATCH, x)
        tables = self._tables_of(routing, at.layer)
        began = time.monotonic()
        begun = self._dispatch_linked(form, x, topk_ids, topk_weights, tables, at)
        if isinstance(begun, DispatchHandle):
            return begun
        source = as_array(x)
        hidden = source.shape[1]
        departure = begun or self._plan_departure(topk_ids, routing, at)
        self._last_key = form.key
        pairs_of, rows_of = {self.rank: departure.pairs_for(self.rank)}, {self.rank: source}

        def accept(channel: Channel, header: Header, payload: memoryview | None) -> list[Any]:
            rows = rows_of[channel.peer] = self._incoming_rows(channel, form, header.in_outbox, header.rows)
            if header.in_outbox and payload is not None:
                pairs_of[channel.peer] = np.frombuffer(payload, dtype=np.int32).reshape(-1, 2)
                return []
            pairs = pairs_of[channel.peer] = np.empty((header.pairs, 2), dtype=np.int32)
            return [a for a in (pairs, *([] if header.in_outbox else [rows])) if a.size]

        if begun is None:
            self._post(self._dispatch_frames(form, source, departure))
        done = self._settle(form, accept, began)
        if done.interrupted:
            return Interrupted()
        sources = [r for r in self._ranks if r == self.rank or (r in done.arrived and r not in done.failed)]
        arrival = self._plan_arrival(sources, pairs_of, rows_of, tables.served, done.failed)
        grouped, array = self._grouped.take(len(arrival.row_of), hidden, x.dtype)
        gather(array, [rows_of[r] for r in sources], arrival.source_of, arrival.row_of)
        source_pairs, start = {}, 0
        for r in sources:
            source_pairs[r] = start, start + len(pairs_of[r])
            start += len(pairs_of[r])
        state = _SocketState(at, departure, topk_weights, Sources(arrival.back, source_pairs))
        handle = DispatchHandle(grouped, arrival.groups, state)
        return PeerFailed(done.failed, handle) if done.failed else handle

    def _dispatch_linked(
        self, form: FrameFormat, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tables: LayerTables, at: StepPoint
    ) -> DispatchHandle | Departure | None:
        """The common case; see `Link.dispatch`."""
        link = self._idle_link()
        if link is None or ids.dtype != torch.int64 or not ids.is_contiguous():
            return None
        begun = link.dispatch(form, x, ids, weights, tables, sequence_phases(self.rank, at.step), at, self._grouped)
        if begun is not None:
            self._last_key = form.key
        return begun

    def _plan_departure(self, topk_ids: torch.Tensor, routing: RoutingTable, at: StepPoint) -> Departure:
        ids = checked_ids(topk_ids, routing.replica_rank.shape[1])
        departure = plan_departure(ids, routing.destination_ranks(at.layer, ids, self.rank, at.step), self._ranks[-1] + 1)
        strangers = [r for r in range(self._ranks[-1] + 1) if r not in self._ranks and len(departure.pairs_for(r))]
        if strangers:
            raise InvalidInputError(
                f"the routing table sends rows to ranks {strangers}, the mesh has {self._ranks}; connect the epoch's peers first"
            )
        return departure

    def _dispatch_frames(self, form: FrameFormat, source: NDArray[Any], departure: Departure) -> dict[int, list[Any]]:
        shared = self._publish(Phase.DISPATCH, source)
        frames = {}
        for rank, channel in self._mesh.channels.items():
            pairs = departure.pairs_for(rank)
            if shared and channel.inbox is not None:
                frames[rank] = _frame(form.pack(True, len(source), len(pairs)), pairs)
                continue
            tokens, pairs = distinct_rows(pairs)
            rows = self._buffer("out", rank, len(tokens), form.hidden, source.dtype)
            np.take(source, tokens, axis=0, out=rows, mode="clip")
            frames[rank] = _frame(form.pack(False, len(tokens), len(pairs)), pairs, rows)
        return frames

    def _plan_arrival(
        self,
        sources: list[int],
        pairs_of: Mapping[int, NDArray[np.int32]],
        rows_of: Mapping[int, NDArray[Any]],
        served: NDArray[np.bool_],
        failed: dict[int, FailureKind],
    ) -> Arrival:
        """Group what came. A peer that named a row it did not send, or an expert that is not served here, has failed: it is left out."""
        while True:
            try:
                return plan_arrival([pairs_of[r] for r in sources], [len(rows_of[r]) for r in sources], served)
            except BadPairsError as error:
                peer = sources[error.source]
                if peer == self.rank:
                    raise
                self._refuse(peer, failed)
                sources.remove(peer)

    # ---- combine

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`."""
        y = check_combine(y, handle)
        form = self._format(handle.state.at, Phase.COMBINE, y)
        self._last_key = form.key
        began = time.monotonic()
        begun = self._combine_linked(form, y, handle.state)
        if isinstance(begun, torch.Tensor):
            return begun
        state = self._general_state(handle.state)
        outputs, departure = as_array(y), state.departure
        hidden = outputs.shape[1]
        row_of = np.empty(len(departure.pairs), dtype=np.int32)
        rows_of: dict[int, NDArray[Any]] = {self.rank: outputs}

        def part(rank: int) -> NDArray[np.int32]:
            return row_of[departure.start[rank] : departure.start[rank + 1]]

        def accept(channel: Channel, header: Header, payload: memoryview | None) -> list[Any]:
            indices = part(channel.peer)
            if header.pairs != len(indices):
                raise FrameError(f"rank {channel.peer} returned {header.pairs} rows for {len(indices)} pairs")
            rows = rows_of[channel.peer] = self._incoming_rows(
                channel, form, header.in_outbox, header.rows if header.in_outbox else header.pairs
            )
            if not header.in_outbox:
                indices[:] = np.arange(len(indices))
            elif payload is not None:
                indices[:] = np.frombuffer(payload, dtype=np.int32)
                return []
            received = indices if header.in_outbox else rows
            return [received] if received.size else []

        if not begun:
            self._post(self._combine_frames(form, outputs, state))
        done = self._settle(form, accept, began)
        if done.interrupted:
            return Interrupted()
        begin, end = state.sources.pairs[self.rank]
        part(self.rank)[:] = state.sources.back[begin:end]
        for peer in done.arrived - done.failed.keys():
            if (indices := part(peer)).size and indices.view(np.uint32).max() >= len(rows_of[peer]):
                self._refuse(peer, done.failed)
        for peer in self._mesh.peers:
            if peer not in done.arrived or peer in done.failed:
                part(peer)[:] = 0
                rows_of[peer] = np.zeros((1, hidden), dtype=outputs.dtype)
        out = self._sum(rows_of, row_of, state, hidden, y.dtype)
        return PeerFailed(done.failed, out) if done.failed else out

    def _combine_linked(self, form: FrameFormat, y: torch.Tensor, state: Any) -> torch.Tensor | bool:
        """The common case; see `Link.combine`."""
        link = self._idle_link() if isinstance(state, LinkedState) else None
        if link is None or link.generation != state.generation:
            return False
        return link.combine(form, y, state)

    def _general_state(self, state: Any) -> _SocketState:
        if isinstance(state, _SocketState):
            return state
        departure = unpack_plan(state.plan, state.ranks[-1] + 1, *state.weights.shape)
        return _SocketState(state.at, departure, state.weights, unpack_sources(state.arrival, state.ranks))

    def _combine_frames(self, form: FrameFormat, outputs: NDArray[Any], state: _SocketState) -> dict[int, list[Any]]:
        shared = self._publish(Phase.COMBINE, outputs)
        frames = {}
        for rank, (begin, end) in state.sources.pairs.items():
            channel = self._mesh.channels.get(rank)
            if channel is None:
                continue
            indices = state.sources.back[begin:end]
            if shared and channel.inbox is not None:
                frames[rank] = _frame(form.pack(True, len(outputs), len(indices)), indices)
                continue
            rows = self._buffer("out", rank, len(indices), form.hidden, outputs.dtype)
            np.take(outputs, indices, axis=0, out=rows, mode="clip")
            frames[rank] = _frame(form.pack(False, 0, len(indices)), rows)
        return frames

    def _sum(
        self, rows_of: Mapping[int, NDArray[Any]], row_of: NDArray[np.int32], state: _SocketState, hidden: int, dtype: torch.dtype
    ) -> torch.Tensor:
        start = state.departure.start
        ranks = [r for r in self._ranks if start[r] != start[r + 1]]
        source_of = np.repeat(np.arange(len(ranks), dtype=np.int32), [start[r + 1] - start[r] for r in ranks])
        sources = [rows_of[r] for r in ranks]
        return weighted_sum(sources, source_of, row_of, state.departure.position, state.weights, hidden, dtype)

    # ---- parts of both

    def _format(self, at: StepPoint, phase: Phase, rows: torch.Tensor) -> FrameFormat:
        key = FrameKey(at.epoch, at.step, at.layer, int(phase))
        if key <= self._last_key:
            raise InvalidInputError(
                f"{phase.name.lower()} at {tuple(at)} does not come after {tuple(self._last_key)}; run a void step again under a later one"
            )
        return FrameFormat(key, DTYPES.index(rows.dtype), rows.shape[1])

    def _idle_link(self) -> Link | None:
        """The mesh as the extension can use it now, or None: some peer is missing, or shares no memory, or left something over."""
        mesh = self._mesh
        if self._faults is not None and self._faults.watches_frames:
            return None
        if self._link is None or self._link.generation != mesh.generation:
            self._link = None
            if compiled is None or mesh.outbox is None or len(mesh.channels) != len(mesh.peers):
                return None
            if any(channel.inbox is None for channel in mesh.channels.values()):
                return None
            self._link = Link(mesh, self._exchange.interrupt_fd, self._exchange.deadline_s)
        return self._link if self._link.is_idle() else None

    def _tables_of(self, routing: RoutingTable, layer: int) -> LayerTables:
        if routing is not self._routing:
            self._routing, self._tables = routing, {}
        tables = self._tables.get(layer)
        if tables is None:
            ranks = np.ascontiguousarray(routing.replica_rank[layer], dtype=np.int32)
            quota = np.ascontiguousarray(routing.cumulative_quota[layer], dtype=np.float64)
            tables = self._tables[layer] = LayerTables(ranks, quota, (ranks == self.rank).any(-1))
        return tables

    def _refuse(self, peer: int, failed: dict[int, FailureKind]) -> None:
        """A complete frame that asks for what is not there."""
        self._mesh.counters.refused_frames += 1
        self._mesh.drop(peer)
        failed[peer] = FailureKind.PROTOCOL

    def _publish(self, phase: Phase, rows: NDArray[Any]) -> bool:
        """Put rows where the peers of this host read them. False if nobody would, or they do not fit."""
        outbox = self._mesh.outbox
        if outbox is None or not any(channel.inbox is not None for channel in self._mesh.channels.values()):
            return False
        return outbox.write(phase, rows)

    def _incoming_rows(self, channel: Channel, form: FrameFormat, in_outbox: bool, num_rows: int) -> NDArray[Any]:
        """[num_rows, hidden]: where they lie in the peer's outbox, or where they are to be received."""
        dtype = array_dtype(DTYPES[form.dtype_code])
        if not in_outbox:
            return self._buffer("in", channel.peer, num_rows, form.hidden, dtype)
        if channel.inbox is None:
            raise FrameError(f"rank {channel.peer} points into an outbox that is not shared with us")
        try:
            return channel.inbox.rows(form.key.phase, num_rows, form.hidden, dtype)
        except OutboxError as error:
            raise FrameError(str(error)) from error

    def _post(self, frames: Mapping[int, Sequence[Any]]) -> None:
        for rank, buffers in frames.items():
            if self._faults is not None:
                self._faults.reach("frame_out")
            self._mesh.channels[rank].post(buffers)
        if self._faults is not None:
            self._faults.reach("frames_out")

    def _settle(self, form: FrameFormat, accept: Accept, began: float) -> Exchanged:
        done = self._exchange.settle(form, accept if self._faults is None else self._watched(accept, self._faults), began)
        if done.failed or done.interrupted:
            # a channel may still hold one
            self._buffers = {}
        return done

    def _watched(self, accept: Accept, faults: FaultPlan) -> Accept:
        """`accept`, that says when a frame came."""

        def watched(channel: Channel, header: Header, payload: memoryview | None) -> Sequence[Any]:
            faults.reach("frame_in", peer=channel.peer)
            return accept(channel, header, payload)

        return watched

    def _buffer(self, use: str, peer: int, num_rows: int, hidden: int, dtype: Any) -> NDArray[Any]:
        """[num_rows, hidden] that the next exchange may use again."""
        size = num_rows * hidden * np.dtype(dtype).itemsize
        buffer = self._buffers.get((use, peer))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[use, peer] = np.empty(size + size // 4, dtype=np.uint8)
        rows: NDArray[Any] = buffer[:size].view(dtype).reshape(num_rows, hidden)
        return rows


def _frame(header: bytes, *payload: NDArray[Any]) -> list[Any]:
    """The buffers to send. A small payload is copied, a large one must stay as it is until the channel has sent it."""
    if sum(a.nbytes for a in payload) <= _SMALL_BYTES:
        return [b"".join([header, *(a.tobytes() for a in payload)])]
    return [header, *(byte_view(a) for a in payload if a.size)]
