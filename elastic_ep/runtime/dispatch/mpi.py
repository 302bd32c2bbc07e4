"""Rows over MPI with fault tolerance (ULFM), where launcher and fabric are MPI's. Extra `[mpi]`; run it under `mpirun --with-ft ulfm`.

Point-to-point only: one message to and one from every peer per exchange, on the communicator that the job began with. ULFM lets survivors
go on talking there after a death, so there is no group to revoke, shrink or rebuild; epochs are in the messages, as on the sockets.

MPI has no way to wait until a deadline, so waiting is a loop of probes that yields the processor, then naps.

A rank's address is `mpi:N`, N its place in the communicator. Seats and places need not agree: a job started with more processes than seats
has spares, and a spare takes the seat of a dead rank by being named for it in `connect`. MPI's own spawning is not used.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.routing import RoutingTable
from elastic_ep.runtime.dispatch.base import DispatchHandle, FailureKind, Interrupted, PeerFailed, StepPoint
from elastic_ep.runtime.dispatch.checks import DTYPES, check_combine, check_dispatch, checked_ids
from elastic_ep.runtime.dispatch.frames import HEADER_BYTES, FrameFormat, FrameKey, Phase
from elastic_ep.runtime.dispatch.grouping import BadPairsError, Departure, distinct_rows, plan_arrival, plan_departure
from elastic_ep.runtime.dispatch.mpi_link import MAX_BYTES, Link, LinkGone, load_mpi
from elastic_ep.runtime.dispatch.rows import RowBuffer, as_array, gather, weighted_sum

_YIELDS = 200
_NAP_S = 50e-6


@dataclass(frozen=True, slots=True)
class _MpiState:
    """What combine needs of a dispatch: this rank's own plan, and where each source's pairs stand among the grouped rows."""

    at: StepPoint
    departure: Departure
    weights: torch.Tensor
    pairs_of: Mapping[int, slice]
    back: NDArray[np.int32]


@dataclass(slots=True)
class _Exchanged:
    failed: dict[int, FailureKind]
    arrived: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    interrupted: bool = False


class MpiDispatcher:
    """One rank's end. Not thread-safe. `rank`, `interrupt`, `deadline_s` and `grace_s` as for `SocketDispatcher`.

    Args:
        comm: the communicator (COMM_WORLD if None); tag `TAG` on it is ours.
    """

    def __init__(
        self, rank: int, *, comm: Any = None, interrupt: socket.socket | int | None = None, deadline_s: float = 10.0, grace_s: float = 0.005
    ):
        self.rank = rank
        self.deadline_s = deadline_s
        self.grace_s = grace_s
        self.refused_frames = 0
        self._comm = comm
        self._mpi: Any = None
        self._interrupt = select.poll()
        if interrupt is not None:
            self._interrupt.register(interrupt, select.POLLIN)
        self._links: dict[int, Link] = {}
        self._peers: dict[int, Link] = {}
        self._epoch = -1
        self._last_key = FrameKey(-1, -1, -1, -1)
        self._grouped = RowBuffer()
        self._used: list[tuple[Link, NDArray[np.uint8]]] = []

    # ---- membership

    @property
    def address(self) -> str:
        """What peers name; known once `listen` was called."""
        return f"mpi:{self._comm.rank}"

    @property
    def connected_ranks(self) -> tuple[int, ...]:
        """Peers with an open link, ascending."""
        return tuple(sorted(self._open()))

    @property
    def stale_frames(self) -> int:
        return sum(link.stale_frames for link in self._links.values())

    def listen(self) -> str:
        """Join the job (once) and return the address to announce. `connect` does it too. Raises InvalidInputError without MPI."""
        if self._mpi is None:
            self._mpi = load_mpi()
            self._comm = self._mpi.COMM_WORLD if self._comm is None else self._comm
            self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        return self.address

    def connect(self, peers: Mapping[int, str], deadline_s: float, *, epoch: int) -> PeerFailed | Interrupted | None:
        """See `Dispatcher.connect`. A process that MPI knows to be dead is named at once. Raises InvalidInputError."""
        self.listen()
        deadline = time.monotonic() + deadline_s
        places = {seat: self._place_of(address) for seat, address in peers.items()}
        if places.pop(self.rank, self._comm.rank) != self._comm.rank or len({self._comm.rank, *places.values()}) <= len(places):
            raise InvalidInputError(f"rank {self.rank} is {self.address}, peers are {dict(peers)}; give each rank its own process")
        if epoch <= self._epoch:
            raise InvalidInputError(f"connect for epoch {epoch} does not come after that for epoch {self._epoch}; give each a higher one")
        self._epoch = epoch
        for link in self._links.values():
            if places.get(link.seat) != link.place:
                self._drop(link)
            link.free_sent()
        self._peers = {seat: self._links.setdefault(place, Link(self._mpi, self._comm, place, self.rank)) for seat, place in places.items()}
        failed: dict[int, FailureKind] = {}
        for seat, link in self._peers.items():
            link.seat = seat
            link.call(epoch)
        idle, last_look = 0, False
        while True:
            for seat, link in self._peers.items():
                if seat not in failed and (kind := self._greet(link)) is not None:
                    failed[seat] = kind
            missing = [seat for seat, link in self._peers.items() if seat not in failed and not link.is_open]
            if not missing or last_look:
                failed.update(dict.fromkeys(missing, FailureKind.DEADLINE))
                return PeerFailed(failed) if failed else None
            last_look = time.monotonic() >= deadline
            if self._pause(idle := idle + 1):
                return Interrupted()

    def close(self) -> None:
        """Tell every peer. The process stays in the MPI job until it ends."""
        for link in self._links.values():
            self._drop(link)
            link.close()
        self._links, self._peers = {}, {}

    def __enter__(self) -> MpiDispatcher:
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _place_of(self, address: str) -> int:
        scheme, _, place = address.partition("#")[0].partition(":")
        if scheme != "mpi" or not place.isdecimal() or int(place) >= self._comm.size:
            raise InvalidInputError(f"{address!r} is no process of this MPI job; give mpi:0 to mpi:{self._comm.size - 1}")
        return int(place)

    def _greet(self, link: Link) -> FailureKind | None:
        """Say what there is to say, and take in what came. Returns how the peer failed, if it did for good."""
        try:
            if link.dead:
                return FailureKind.CLOSED
            link.greet()
            while link.read(FrameKey(self._epoch, -1, -1, -1)):
                pass
        except LinkGone as gone:
            if gone.kind is FailureKind.PROTOCOL:
                self._refuse(link)
            # after a farewell we greet again
            return gone.kind if link.dead or gone.kind is FailureKind.PROTOCOL else None
        return None

    def _drop(self, link: Link) -> None:
        """The next thing that a dropped process hears from us is a farewell."""
        try:
            link.drop()
        except LinkGone:
            pass

    def _open(self) -> dict[int, Link]:
        return {seat: link for seat, link in self._peers.items() if link.is_open}

    def _refuse(self, link: Link) -> None:
        self.refused_frames += 1
        self._drop(link)

    # ---- the two exchanges

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, routing: RoutingTable, at: StepPoint
    ) -> DispatchHandle | PeerFailed | Interrupted:
        """See `Dispatcher.dispatch`. Raises InvalidInputError for input that cannot be served; `at` must grow from call to call."""
        check_dispatch(x, topk_ids, topk_weights, routing, at)
        form = self._format(at, Phase.DISPATCH, x)
        ids = checked_ids(topk_ids, routing.replica_rank.shape[1])
        ranks = sorted({self.rank, *self._peers})
        departure = plan_departure(ids, routing.destination_ranks(at.layer, ids, self.rank, at.step), ranks[-1] + 1)
        strangers = [r for r in range(ranks[-1]) if r not in ranks and len(departure.pairs_for(r))]
        if strangers:
            raise InvalidInputError(
                f"the routing table sends rows to ranks {strangers}, the mesh has {ranks}; connect the epoch's peers first"
            )
        rows_of, pairs_of = {self.rank: as_array(x)}, {self.rank: departure.pairs_for(self.rank)}
        messages = {}
        for seat, link in self._open().items():
            tokens, pairs = distinct_rows(departure.pairs_for(seat))
            messages[seat] = self._message(link, form, pairs, rows_of[self.rank], tokens)
        done = self._exchange(form, messages)
        if done.interrupted:
            return Interrupted()
        for seat, message in done.arrived.items():
            header = form.parse(message.data, 0, MAX_BYTES)
            cut = HEADER_BYTES + header.pairs * 8
            pairs_of[seat] = message[HEADER_BYTES:cut].view(np.int32).reshape(-1, 2)
            rows_of[seat] = message[cut:].view(rows_of[self.rank].dtype).reshape(header.rows, x.shape[1])
        served = (routing.replica_rank[at.layer] == self.rank).any(-1)
        while True:
            sources = [r for r in ranks if r in rows_of and r not in done.failed]
            try:
                arrival = plan_arrival([pairs_of[r] for r in sources], [len(rows_of[r]) for r in sources], served)
                break
            except BadPairsError as error:
                if (seat := sources[error.source]) == self.rank:
                    raise
                done.failed[seat] = FailureKind.PROTOCOL
                self._refuse(self._peers[seat])
        grouped, array = self._grouped.take(len(arrival.row_of), x.shape[1], x.dtype)
        gather(array, [rows_of[r] for r in sources], arrival.source_of, arrival.row_of)
        ends = np.cumsum([len(pairs_of[r]) for r in sources]).tolist()
        parts = {r: slice(end - len(pairs_of[r]), end) for r, end in zip(sources, ends, strict=True)}
        handle = DispatchHandle(grouped, arrival.groups, _MpiState(at, departure, topk_weights, parts, arrival.back))
        return PeerFailed(done.failed, handle) if done.failed else handle

    def combine(self, y: torch.Tensor, handle: DispatchHandle) -> torch.Tensor | PeerFailed | Interrupted:
        """See `Dispatcher.combine`."""
        y = check_combine(y, handle)
        state: _MpiState = handle.state
        form = self._format(state.at, Phase.COMBINE, y)
        outputs, departure = as_array(y), state.departure
        ranks = sorted({self.rank, *self._peers})
        none = np.empty((0, 2), dtype=np.int32)
        back = {seat: state.back[state.pairs_of.get(seat, slice(0))] for seat in ranks}
        done = self._exchange(form, {seat: self._message(link, form, none, outputs, back[seat]) for seat, link in self._open().items()})
        if done.interrupted:
            return Interrupted()
        row_of = np.zeros(len(departure.pairs), dtype=np.int32)
        source_of = np.zeros_like(row_of)
        sources: list[NDArray[Any]] = []
        for seat in ranks:
            part = slice(departure.start[seat], departure.start[seat + 1])
            count = part.stop - part.start
            rows, indices = np.zeros((1, y.shape[1]), dtype=outputs.dtype), np.zeros(count, dtype=np.int32)
            if seat == self.rank:
                rows, indices = outputs, back[seat]
            elif (message := done.arrived.get(seat)) is not None and seat not in done.failed:
                if form.parse(message.data, 0, MAX_BYTES).pairs == count:
                    rows, indices = message[HEADER_BYTES:].view(outputs.dtype).reshape(count, y.shape[1]), np.arange(count, dtype=np.int32)
                else:
                    done.failed[seat] = FailureKind.PROTOCOL
                    self._refuse(self._peers[seat])
            row_of[part], source_of[part] = indices, len(sources)
            sources.append(rows)
        out = weighted_sum(sources, source_of, row_of, departure.position, state.weights, y.shape[1], y.dtype)
        return PeerFailed(done.failed, out) if done.failed else out

    def _format(self, at: StepPoint, phase: Phase, rows: torch.Tensor) -> FrameFormat:
        key = FrameKey.of(at, phase)
        if key <= self._last_key:
            raise InvalidInputError(
                f"{phase.name.lower()} at {tuple(at)} does not come after {tuple(self._last_key)}; run a void step again under a later one"
            )
        return FrameFormat(key, DTYPES.index(rows.dtype), rows.shape[1])

    def _message(
        self, link: Link, form: FrameFormat, pairs: NDArray[np.int32], rows: NDArray[Any], chosen: NDArray[np.int32]
    ) -> NDArray[np.uint8]:
        """A frame with rows[chosen]. In a combine the header's `pairs` counts the rows, which come in the order of the pairs."""
        combining = form.key.phase == Phase.COMBINE
        header = form.pack(False, 0 if combining else len(chosen), len(chosen) if combining else len(pairs))
        cut = HEADER_BYTES + pairs.nbytes
        size = cut + len(chosen) * form.row_bytes
        if size > MAX_BYTES:
            raise InvalidInputError(f"{size} bytes for rank {link.seat} are more than MPI sends at once ({MAX_BYTES}); give fewer tokens")
        message = link.buffer("out", size)
        message[:HEADER_BYTES] = np.frombuffer(header, dtype=np.uint8)
        message[HEADER_BYTES:cut] = pairs.reshape(-1).view(np.uint8)
        np.take(rows, chosen, axis=0, out=message[cut:].view(rows.dtype).reshape(-1, rows.shape[1]), mode="clip")
        return message

    def _exchange(self, form: FrameFormat, messages: Mapping[int, NDArray[np.uint8]]) -> _Exchanged:
        """Send each peer its message and await one of each, until the deadline; the same rules as `exchange.py` has for sockets."""
        began, self._last_key = time.monotonic(), form.key
        for link, message in self._used:
            link.give_back("in", message)
        self._used = []
        waiting = self._open()
        done = _Exchanged(dict.fromkeys(self._peers.keys() - waiting.keys(), FailureKind.CLOSED))
        deadline = began + (self.grace_s if done.failed else self.deadline_s)
        unsent, idle, last_look = dict(messages), 0, False
        while True:
            for seat, link in list(waiting.items()):
                try:
                    if seat in unsent:
                        link.post(unsent.pop(seat))
                    if seat not in done.arrived and (came := link.frame(form)) is not None:
                        done.arrived[seat] = came
                        self._used.append((link, came))
                        idle = 0
                    if seat in done.arrived:
                        if link.is_sent():
                            del waiting[seat]
                        else:
                            link.read(form.key)
                except LinkGone as gone:
                    if gone.kind is FailureKind.PROTOCOL:
                        self._refuse(link)
                    done.failed[seat] = gone.kind
                    del waiting[seat]
                    deadline = min(deadline, time.monotonic() + self.grace_s)
            if not waiting:
                return done
            if last_look:
                if not done.failed:
                    done.failed = dict.fromkeys(waiting, FailureKind.DEADLINE)
                return done
            # this process may have been stopped past the deadline itself, with all messages waiting to be read
            last_look = time.monotonic() >= deadline
            if self._pause(idle := idle + 1):
                done.interrupted = True
                return done

    def _pause(self, idle: int) -> bool:
        """Leave the processor to the ranks that we wait for. True if the interrupt is readable."""
        if idle < _YIELDS:
            os.sched_yield()
        else:
            time.sleep(_NAP_S)
        return bool(self._interrupt.poll(0))
